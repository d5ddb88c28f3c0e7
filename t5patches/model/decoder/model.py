"""Decoder-only networks as a language model: an output goes on where its prompt ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import traverse_util

from t5patches.model.decoder import network
from t5patches.model.decoder.families import families
from t5patches.model.decoder.network import SLIDING, DecoderCache, DecoderConfig
from t5patches.model.family import Family
from t5patches.model.protocol import Array, OutputHead, Params


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder-only network; see `t5patches.model.protocol.LanguageModel`.

    Attributes:
      config: sizes and switches.

    Example:
      >>> import numpy as np
      >>> model = small_decoder(vocab_size=8, width=4, layers=1)
      >>> params = model.init(jax.random.key(0))
      >>> batch = {"inputs": np.array([[5, 6, -1]]), "outputs": np.array([[3, 4, 7, 1]])}
      >>> model.head(params).logits(model.hidden(params, batch)).shape
      (1, 4, 8)
    """

    config: DecoderConfig

    def __post_init__(self) -> None:
        """Refuses switches that do not go together.

        Raises:
          ValueError: naming them by the keys of a folder's `config.json`.
        """
        config = self.config
        if config.num_heads % config.num_kv_heads:
            raise ValueError(
                f"{config.num_heads} attention heads cannot share {config.num_kv_heads} heads of "
                "keys and values: each must serve as many as the next"
            )
        if len(config.layer_types) != config.num_layers:
            raise ValueError(
                f"layer_types has {len(config.layer_types)} entries and there are "
                f"{config.num_layers} layers"
            )
        if len(config.turning) not in (0, config.num_layers):
            raise ValueError(
                f"no_rope_layers has {len(config.turning)} entries and there are "
                f"{config.num_layers} layers"
            )
        if SLIDING in config.layer_types and not config.sliding_window:
            raise ValueError(f"layer_types has {SLIDING!r}, and no sliding_window says how wide")
        ids = (*config.end_ids, config.begin_id)
        if not 0 <= min(ids) <= max(ids) < config.vocab_size:
            raise ValueError(
                f"eos_token_id and bos_token_id are {ids}, and vocab_size is {config.vocab_size}"
            )
        for rotary in config.rotaries or ():
            size = int(config.head_dim * rotary.share)
            if size % 2 or not 0 < size <= config.head_dim:
                raise ValueError(
                    f"{size} entries of a head of {config.head_dim} turn with its position: an "
                    "even number is needed"
                )

    @property
    def family(self) -> Family:
        """How its folders are written."""
        return FAMILIES[self.config.family]

    def replace(self, **changes: Any) -> Self:
        """The same model with other fields in its config."""
        return type(self)(dataclasses.replace(self.config, **changes))

    def init(self, key: Array) -> Params:
        """Random parameters, as training begins with them."""
        table = network.parameters(self.config)
        made = {}
        for (path, parameter), k in zip(
            table.items(), jax.random.split(key, len(table)), strict=True
        ):
            if parameter.spread is None:
                made[path] = jnp.full(parameter.shape, parameter.fill, jnp.float32)
            else:
                made[path] = parameter.spread * jax.random.normal(k, parameter.shape, jnp.float32)
        return traverse_util.unflatten_dict(made)

    def param_shapes(self) -> Params:
        """Shapes and types of the parameters."""
        return traverse_util.unflatten_dict(
            {
                path: jax.ShapeDtypeStruct(parameter.shape, jnp.float32)
                for path, parameter in network.parameters(self.config).items()
            }
        )

    def param_axes(self) -> Mapping[tuple[str, ...], Sequence[str]]:
        """The logical axes of each parameter."""
        return {path: parameter.axes for path, parameter in network.parameters(self.config).items()}

    def axis_units(self) -> Mapping[str, int]:
        """Vocabulary, feed-forward block, and heads; those that share a key stay together."""
        config = self.config
        return {"vocab": config.vocab_size, "mlp": config.mlp_dim, "heads": config.num_kv_heads}

    def hidden(
        self, params: Params, batch: Mapping[str, Any], *, dropout_key: Array | None = None
    ) -> Array:
        """The last states at the tokens before each token of the outputs."""
        config = self.config
        prompts, outputs = jnp.asarray(batch["inputs"]), jnp.asarray(batch["outputs"])
        streams = outputs[:, None] if outputs.ndim == 2 else outputs
        first = jnp.broadcast_to(self.first_inputs(prompts)[:, None, None], streams[..., :1].shape)
        given = jnp.concatenate([first, streams[..., :-1]], axis=-1)
        x, _ = network.run(config, params, network.follow(config, prompts, given), dropout_key)
        states = x[:, prompts.shape[1] :].reshape(*outputs.shape, -1)
        return network.normalize(config, params["final_norm"], states)

    def head(self, params: Params) -> OutputHead:
        """The matrix of the logits: of a tied model the embedding."""
        return network.output_head(self.config, params)

    def head_params(self, params: Params) -> dict[str, Any]:
        """That matrix in its place."""
        place = "token_embedder" if self.config.tied else "head"
        return {place: params[place]}

    def first_inputs(self, prompts: Array) -> Array:
        """The last token of each prompt."""
        return network.last_tokens(self.config, prompts)

    def prefill(
        self,
        params: Params,
        prompts: Array,
        begun: Array,
        start: Array,
        *,
        streams: int,
        max_length: int,
    ) -> DecoderCache:
        """Keys and values of the prompts, once, and of what is begun, for each stream."""
        config = self.config
        first = self.first_inputs(prompts)[:, None]
        given = jnp.concatenate([first, begun], axis=1)[:, : begun.shape[1]]
        _, made = network.run(config, params, network.follow(config, prompts, given[:, None]))
        return network.make_cache(
            made,
            jnp.maximum(network.prompt_lengths(config, prompts), 1) - 1,
            jnp.asarray(start, jnp.int32),
            prompt_length=prompts.shape[1],
            streams=streams,
            max_length=max_length,
        )

    def decode(
        self, params: Params, cache: DecoderCache, tokens: Array
    ) -> tuple[Array, DecoderCache]:
        """One step in every stream."""
        x, cache = network.step(self.config, params, cache, tokens)
        states = network.normalize(self.config, params["final_norm"], x)
        return self.head(params).logits(states), cache


def small_decoder(*, vocab_size: int, width: int, layers: int, **changes: Any) -> Decoder:
    """A network of Llama's kind, of any size.

    Args:
      vocab_size: number of ids, 3 at least.
      width: of the network: a multiple of 4.
      layers: of it.
      **changes: other fields of its config.

    Returns:
      The model; 2 of its heads share a key and a value, id 1 ends an output.
    """
    fields: dict[str, Any] = {
        "family": "llama",
        "vocab_size": vocab_size,
        "emb_dim": width,
        "num_layers": layers,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": width // 2,
        "mlp_dim": 2 * width,
        "max_positions": 4096,
        "begin_id": 2,
        "end_ids": (1,),
        "layer_types": (network.FULL,) * layers,
    }
    return Decoder(DecoderConfig(**fields | changes))


FAMILIES: Mapping[str, Family] = families(Decoder)
