"""T5 as a language model: an encoder reads the prompt, and the decoder begins with the padding id.

The network itself, with T5X's parameters, is `t5patches.network`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from t5patches.model.family import Family
from t5patches.model.protocol import Array, OutputHead, Params
from t5patches.model.t5 import folder
from t5patches.model.t5.network import T5Config, Transformer, head_params, output_head


class T5Cache(NamedTuple):
    """What decoding keeps.

    Attributes:
      prompts: `[rows, S]`, for the mask.
      encoded: the encoder's output, `[rows, S, emb_dim]`.
      projected: the collection of its keys and values, once for all streams of a row.
      written: the collection of the decoder's own keys and values, of `rows * streams` rows.
    """

    prompts: Array
    encoded: Array
    projected: Mapping[str, Any]
    written: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class T5:
    """T5 1.0, T5 1.1, Flan-T5 and mT5; see `t5patches.model.protocol.LanguageModel`.

    Attributes:
      config: sizes and switches.

    Example:
      >>> model = small_t5(vocab_size=8, width=4, layers=1)
      >>> params = model.init(jax.random.key(0))
      >>> batch = {"inputs": np.array([[5, 6, 1]]), "outputs": np.array([[3, 4, 7, 1]])}
      >>> model.head(params).logits(model.hidden(params, batch)).shape
      (1, 4, 8)
    """

    config: T5Config
    family: ClassVar[Family]

    def __post_init__(self) -> None:
        """A list of activations, as a config file may give it, has no hash."""
        activations = tuple(self.config.mlp_activations)
        config = dataclasses.replace(self.config, mlp_activations=activations)
        buckets = config.relative_attention_num_buckets
        furthest = config.relative_attention_max_distance
        if buckets < 4 or furthest <= buckets // 2:
            raise ValueError(
                f"relative_attention_max_distance is {furthest}, and {buckets} buckets need more "
                "than half of their number, and to be 4 at least: near distances have a bucket each"
            )
        object.__setattr__(self, "config", config)

    def replace(self, **changes: Any) -> Self:
        """The same model with other fields in its config."""
        return type(self)(dataclasses.replace(self.config, **changes))

    def init(self, key: Array) -> Params:
        """Random parameters, as training begins with them."""
        return self._init(key)["params"]

    def param_shapes(self) -> Params:
        """Shapes and types of the parameters."""
        return _variables(self)["params"]

    def param_axes(self) -> Mapping[tuple[str, ...], Sequence[str]]:
        """T5X's logical axes of each parameter."""
        flat = traverse_util.flatten_dict(_variables(self)["params_axes"])
        return {(*path, name.removesuffix("_axes")): x.names for (*path, name), x in flat.items()}

    def axis_units(self) -> Mapping[str, int]:
        """What T5X splits; heads are not cut through, and what has them in it goes with them."""
        config = self.config
        heads = dict.fromkeys(("heads", "joined_kv"), config.num_heads)
        return {"vocab": config.vocab_size, "mlp": config.mlp_dim, **heads}

    def hidden(
        self, params: Params, batch: Mapping[str, Any], *, dropout_key: Array | None = None
    ) -> Array:
        """The decoder's last states, given the outputs.

        Nothing in an output is taken for padding, as while it was decoded: a sampled one may hold
        the padding id. What stands behind its end is seen by no token before.
        """
        prompts, outputs = jnp.asarray(batch["inputs"]), jnp.asarray(batch["outputs"])
        rows = outputs.reshape(-1, outputs.shape[-1])
        given = jnp.pad(rows, ((0, 0), (1, 0)), constant_values=self.config.begin_id)[:, :-1]
        apply: Any = functools.partial(
            Transformer(self.config).apply,
            {"params": params},
            enable_dropout=dropout_key is not None,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
        )
        each = len(rows) // len(prompts)
        states = apply(
            jnp.repeat(apply(prompts, method="encode"), each, axis=0),
            jnp.repeat(prompts, each, axis=0),
            given,
            jnp.ones_like(given),
            return_hidden=True,
            method="decode",
        )
        return states.reshape(*outputs.shape, -1)

    def head(self, params: Params) -> OutputHead:
        """The matrix of the logits: T5 1.0's is the embedding."""
        return output_head(self.config, params)

    def head_params(self, params: Params) -> dict[str, Any]:
        """That matrix in its place."""
        return head_params(self.config, params)

    def first_inputs(self, prompts: Array) -> Array:
        """The decoder's first input is the same for all."""
        return jnp.full(len(prompts), self.config.begin_id, jnp.int32)

    def prefill(
        self,
        params: Params,
        prompts: Array,
        begun: Array,
        start: Array,
        *,
        streams: int,
        max_length: int,
    ) -> T5Cache:
        """The encoder's output with its keys and values, and the decoder's for what is begun."""
        module = Transformer(self.config)
        encoded: Any = module.apply(
            {"params": params}, prompts, enable_dropout=False, method="encode"
        )
        tokens = jnp.concatenate([self.first_inputs(prompts)[:, None], begun[:, :-1]], axis=1)
        _, captured = module.apply(
            {"params": params},
            encoded,
            prompts,
            tokens,
            jnp.ones_like(tokens),
            enable_dropout=False,
            return_hidden=True,
            method="decode",
            capture_intermediates=lambda module, _: module.name in ("key", "value"),
            mutable=["intermediates"],
        )
        projected, written = {}, {}
        flat = traverse_util.flatten_dict(captured["intermediates"])
        for (*layer, attention, name, _), (x,) in flat.items():
            x = jnp.moveaxis(x, -3, -1)  # to the layout of the cache
            if attention == "encoder_decoder_attention":
                projected[(*layer, attention, name)] = x
                continue
            # What lies beyond `start` is overwritten before it is read.
            x = jnp.pad(x, [(0, 0)] * 3 + [(0, max_length - x.shape[-1])])
            written[(*layer, attention, f"cached_{name}")] = jnp.repeat(x, streams, axis=0)
            written[(*layer, attention, "cache_index")] = start
        return T5Cache(
            prompts,
            encoded,
            traverse_util.unflatten_dict(projected),
            traverse_util.unflatten_dict(written),
        )

    def decode(self, params: Params, cache: T5Cache, tokens: Array) -> tuple[Array, T5Cache]:
        """One step of the decoder in every stream."""
        flat = traverse_util.flatten_dict(cache.written)
        length = next(x.shape[-1] for path, x in flat.items() if path[-1] == "cached_key")
        logits, changed = Transformer(self.config).apply(
            {"params": params, "projected": cache.projected, "cache": cache.written},
            cache.encoded,
            cache.prompts,
            tokens,
            tokens,
            enable_dropout=False,
            decode=True,
            max_decode_length=length,
            method="decode",
            mutable=["cache"],
        )
        return logits, cache._replace(written=changed["cache"])

    def _init(self, key: Array) -> Any:
        ids = np.ones((1, 2), np.int32)
        return Transformer(self.config).init(key, ids, ids, ids, enable_dropout=False)


def small_t5(*, vocab_size: int, width: int, layers: int) -> T5:
    """A T5 1.1 of any size, without dropout.

    Args:
      vocab_size: number of ids.
      width: of the model: a multiple of 4, the number of its heads.
      layers: of the encoder, and of the decoder.

    Returns:
      The model.
    """
    return T5(
        T5Config(
            vocab_size=vocab_size,
            emb_dim=width,
            num_heads=4,
            head_dim=width // 4,
            mlp_dim=2 * width,
            num_encoder_layers=layers,
            num_decoder_layers=layers,
            mlp_activations=("gelu", "linear"),
            dropout_rate=0.0,
        )
    )


@functools.lru_cache(maxsize=4)
def _variables(model: T5) -> Any:
    return jax.eval_shape(model._init, jax.random.key(0))


T5.family = Family(
    name="T5",
    model_types=folder.MODEL_TYPES,
    settings=folder.SETTINGS,
    tensors=folder.tensors,
    model=lambda **fields: T5(T5Config(**fields)),
    layers=lambda config: config.num_encoder_layers + config.num_decoder_layers,
    constants=folder.CONSTANTS,
    complete=folder.complete,
    written=folder.written,
    shown=folder.shown,
    unused=folder.UNUSED,
    task="SEQ_2_SEQ_LM",
)
