r"""A decoder-only network of many switches, as functions on a nested dict of parameters.

A layer adds attention and a feed-forward block to the residual stream:

    x = x + attention(norm(x));  x = x + mlp(norm(x))      sequential
    x = x + attention(norm(x)) + mlp(norm(x))              parallel

with norms before a block, or before and after it. `layer` is that text, and it asks its caller
what the queries find: `run` lets them look at a whole sequence, `step` at a cache.

The parameters come from one table, `parameters`. Matrices are `[inputs, outputs]`; those of
attention are of heads one after the other, in groups that share a key and a value.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from t5patches.model.protocol import Array, OutputHead, Params
from t5patches.model.remat import remat

FULL, SLIDING = "full_attention", "sliding_attention"

# In place of the attention logits where the mask forbids. Finite, so that a query that may attend
# to nothing (padding) averages everything instead of becoming NaN.
_FORBIDDEN = -1e30


class Rotary(NamedTuple):
    r"""Rotary position embedding: entries j and j + R/2 of a head turn by `position * f_j`.

    .. math:: f_j = \mathrm{base}^{-2j/R}, \quad 0 \le j < R/2

    Attributes:
      base: see above.
      share: R is this share of the head, its first entries; the rest do not turn.
      scaling: "default"; "linear" divides all f by `factor`; "llama3" does so for wavelengths above
        `positions / low`, not below `positions / high`, and goes from one to the other between.
      factor: see `scaling`.
      low: see `scaling`.
      high: see `scaling`.
      positions: the number of them in the texts that a model was trained on before it was scaled.
    """

    base: float = 10_000.0
    share: float = 1.0
    scaling: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 1.0
    positions: float = 0.0

    def turns(self, head_dim: int) -> np.ndarray:
        """The frequencies f, float32 `[R / 2]`."""
        size = int(head_dim * self.share)
        turns = self.base ** -(np.arange(0, size, 2) / size)
        if self.scaling == "linear":
            turns = turns / self.factor
        if self.scaling == "llama3":
            in_training = self.positions * turns / (2 * math.pi)
            kept = np.clip((in_training - self.low) / (self.high - self.low), 0, 1)
            turns = kept * turns + (1 - kept) * turns / self.factor
        return turns.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a decoder-only network.

    Attributes:
      family: whose names and settings its folders have, see `t5patches.model.decoder.families`.
      vocab_size: number of ids, rows of the embedding.
      emb_dim: width D of the residual stream.
      num_layers: layers.
      num_heads: attention heads.
      num_kv_heads: heads of keys and values: each serves as many heads as the next.
      head_dim: size of each head; `num_heads * head_dim` need not be `emb_dim`.
      mlp_dim: width inside the feed-forward block.
      max_positions: tokens that a prompt and its output may have together, but for the last one.
      begin_id: predicts the first token where a prompt is empty.
      end_ids: tokens that end an output; data gets the first where text has no ids.
      dtype: of activations and of the cache; parameters and logits are float32.
      dropout_rate: of the embedding and of what each block adds.
      activation: of the feed-forward block, a key of `ACTIVATIONS`.
      gated: whether the activation multiplies a second matrix' outputs.
      gate_up: how the folder holds these two matrices: "split", or in one as "blocks", the gate
        before what it multiplies.
      norm: "rms", or "layer", which also subtracts the mean.
      norm_eps: added to the mean square.
      norm_offset: added to the scale: 1 where a scale is stored as its difference from 1.
      norm_bias: whether norms have biases.
      norms: "before" a block, "after" it, or "both".
      parallel: whether both blocks of a layer read the same residual stream.
      shared_norm: whether they then share the norm before them.
      qk_norm: whether queries and keys are normalised before they turn: of each of the "heads" by
        itself, as a "whole", or "none".
      qkv: how the folder holds queries, keys and values: "split" in three matrices; in one as
        "blocks", all queries, all keys, all values; or in "groups", of each key-value head its
        queries, its key, its value.
      attention_bias: biases of these ("qkv"), of attention's last matrix too ("all"), or "none".
      mlp_bias: biases of the feed-forward block.
      layer_types: `FULL` or `SLIDING` for each layer.
      sliding_window: how many tokens a sliding layer sees, the one that asks counted; 0 for all.
      rotaries: of full and of sliding layers; None where positions are learned.
      turning: of each layer whether its heads turn; () where all do.
      query_scalar: attention logits are divided by its square root; 0 stands for `head_dim`.
      attention_softcap: bound c of the attention logits, `c * tanh(z / c)`; 0 for none.
      logit_softcap: the same for the logits.
      scaled_embedding: whether the embedding is multiplied by `sqrt(emb_dim)`.
      embedding_multiplier: multiplies the embedding besides.
      residual_multiplier: multiplies what each block adds.
      logit_divisor: divides the logits.
      tied: whether the embedding makes the logits.
      remat: whether training runs each layer again in the backward pass instead of holding what is
        inside it: less memory, a third more arithmetic. No property of the model.
    """

    family: str
    vocab_size: int
    emb_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_positions: int
    begin_id: int
    end_ids: tuple[int, ...]
    dtype: Any = jnp.float32
    dropout_rate: float = 0.0
    activation: str = "silu"
    gated: bool = True
    gate_up: str = "split"
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    norm_bias: bool = False
    norms: str = "before"
    parallel: bool = False
    shared_norm: bool = False
    qk_norm: str = "none"
    qkv: str = "split"
    attention_bias: str = "none"
    mlp_bias: bool = False
    layer_types: tuple[str, ...] = ()
    sliding_window: int = 0
    rotaries: tuple[Rotary, Rotary] | None = (Rotary(), Rotary())
    turning: tuple[bool, ...] = ()
    query_scalar: float = 0.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    scaled_embedding: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_divisor: float = 1.0
    tied: bool = False
    remat: bool = False

    @property
    def pad_id(self) -> int:
        """No id: most of these models have none for it, or use the one that ends an output."""
        return -1

    @property
    def end_id(self) -> int:
        """The first of `end_ids`."""
        return self.end_ids[0]

    @property
    def group(self) -> int:
        """How many heads share a key and a value."""
        return self.num_heads // self.num_kv_heads

    def window(self, number: int) -> int:
        """How many tokens a layer sees; 0 for all."""
        return self.sliding_window if self.layer_types[number] == SLIDING else 0

    def rotary(self, number: int) -> Rotary | None:
        """How the heads of a layer turn; None where they do not."""
        if self.rotaries is None or (self.turning and not self.turning[number]):
            return None
        return self.rotaries[self.layer_types[number] == SLIDING]

    @property
    def widening(self) -> tuple[str, ...]:
        """The matrices of a feed-forward block before its activation."""
        if not self.gated:
            return ("up",)
        return ("gate_up",) if self.gate_up == "blocks" else ("gate", "up")


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class Parameter(NamedTuple):
    """An array of the network.

    Attributes:
      shape: its shape.
      axes: its logical axes.
      spread: standard deviation of its first values; None where they are all `fill`.
      fill: see `spread`.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    spread: float | None = None
    fill: float = 0.0


def parameters(config: DecoderConfig) -> dict[tuple[str, ...], Parameter]:
    """Every array of the network by its path: the one table of them.

    Args:
      config: of the network.

    Returns:
      The table.
    """
    width, inner = config.emb_dim, config.mlp_dim
    joined, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    bias = config.attention_bias != "none"
    out: dict[tuple[str, ...], Parameter] = {}

    def table(rows: int, axis: str, *path: str) -> None:
        out[(*path, "embedding")] = Parameter((rows, width), (axis, "embed"), 0.02)

    def linear(sizes: tuple[int, int], axes: tuple[str, str], bias: bool, *path: str) -> None:
        out[(*path, "kernel")] = Parameter(sizes, axes, sizes[0] ** -0.5)
        if bias:
            out[(*path, "bias")] = Parameter(sizes[1:], axes[1:])

    def norm(size: int, axis: str, *path: str) -> None:
        out[(*path, "scale")] = Parameter((size,), (axis,), fill=1.0 - config.norm_offset)
        if config.norm_bias:
            out[(*path, "bias")] = Parameter((size,), (axis,))

    table(config.vocab_size, "vocab", "token_embedder")
    if config.rotaries is None:
        table(config.max_positions, "positions", "position_embedder")
    for i in range(config.num_layers):
        at = f"layers_{i}"
        if config.norms != "after":
            norm(width, "embed", at, "pre_attention_norm")
            if not config.shared_norm:
                norm(width, "embed", at, "pre_mlp_norm")
        if config.norms != "before":
            norm(width, "embed", at, "post_attention_norm")
            norm(width, "embed", at, "post_mlp_norm")
        if config.qkv == "split":
            for part, size in (("query", joined), ("key", kv), ("value", kv)):
                axes = ("embed", "heads")
                linear((width, size), axes, bias, at, "attention", part)
        else:
            # Only groups can be divided between devices: a part of them has whole heads.
            axes = ("embed", "heads" if config.qkv == "groups" else "qkv")
            linear((width, joined + 2 * kv), axes, bias, at, "attention", "qkv")
        if config.qk_norm != "none":
            for part, size in (("query", joined), ("key", kv)):
                whole = config.qk_norm == "whole"
                sizes = (size, "heads") if whole else (config.head_dim, "head_dim")
                norm(*sizes, at, "attention", f"{part}_norm")
        of_out = config.attention_bias == "all"
        linear((joined, width), ("heads", "embed"), of_out, at, "attention", "out")
        for part in config.widening:
            # A part of two matrices in one has not the same rows of both.
            both = part == "gate_up"
            axes = ("embed", "gate_up" if both else "mlp")
            linear((width, (1 + both) * inner), axes, config.mlp_bias, at, "mlp", part)
        linear((inner, width), ("mlp", "embed"), config.mlp_bias, at, "mlp", "down")
    norm(width, "embed", "final_norm")
    if not config.tied:
        linear((width, config.vocab_size), ("embed", "vocab"), False, "head")
    return out


def output_head(config: DecoderConfig, params: Params) -> OutputHead:
    """The last linear map, see `t5patches.model.protocol.LanguageModel.head`."""
    softcap, scale = config.logit_softcap or None, 1.0 / config.logit_divisor
    if config.tied:
        return OutputHead(params["token_embedder"]["embedding"], True, scale, softcap)
    return OutputHead(params["head"]["kernel"], False, scale, softcap)


def linear(params: Params, x: Array) -> Array:
    """`x @ kernel + bias`: every matrix product of the network but the head's.

    Where the parameters hold an adapter (`t5patches.model.lora`), `x @ lora_a @ lora_b` is added.
    """
    return summed(params, products(params, x))


def products(params: Params, x: Array) -> list[Array]:
    """Of `linear` what `summed` makes its result of: `x @ kernel`, and of an adapter `x @ lora_a`.

    Their sum is as large as the first. Held for the backward pass it would be two arrays of that
    size: XLA adds where the sum is read, each time again.
    """
    matrices = (params[name] for name in ("kernel", "lora_a") if name in params)
    return [product(x, matrix.astype(x.dtype)) for matrix in matrices]


def product(x: Array, matrix: Array) -> Array:
    """`x @ matrix`, on one axis of all tokens.

    With several of them XLA transposes a copy of `x` on CPUs, to make the gradient of `matrix`.
    """
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], matrix.shape[-1])


def summed(params: Params, made: list[Array]) -> Array:
    """What `linear` gives, of its `products`."""
    y, *inner = made
    if inner:
        y = y + product(inner[0], params["lora_b"].astype(y.dtype))
    return y + _over(params["bias"], y) if "bias" in params else y


def _over(vector: Array, x: Array) -> Array:
    """A vector as it is added to the last axis of an array."""
    return vector.astype(x.dtype).reshape(*(1,) * (x.ndim - 1), -1)


def normalize(config: DecoderConfig, params: Params, x: Array) -> Array:
    """The norm over the last axis, in float32."""
    y = x.astype(jnp.float32)
    if config.norm == "layer":
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.norm_eps)
    y = y * (_over(params["scale"], y) + config.norm_offset)
    return (y + _over(params["bias"], y) if "bias" in params else y).astype(x.dtype)


def embed(config: DecoderConfig, params: Params, tokens: Array, positions: Array) -> Array:
    """The residual stream before the first layer, `[..., D]`; padding is looked up as id 0."""
    ids = jnp.where(tokens == config.pad_id, 0, tokens)
    x = params["token_embedder"]["embedding"][ids].astype(config.dtype)
    if config.scaled_embedding:
        x = x * jnp.asarray(math.sqrt(config.emb_dim), config.dtype)
    if config.embedding_multiplier != 1.0:
        x = x * config.embedding_multiplier
    if config.rotaries is None:
        # Padding may stand beyond the last position.
        at = jnp.minimum(positions, config.max_positions - 1)
        x = x + params["position_embedder"]["embedding"][at].astype(config.dtype)
    return x


Turned = tuple[Array, Array]
"""Sines and cosines of the angles that heads turn by, float32 `[*shape, R / 2]`, see `Rotary`."""


def turned_at(config: DecoderConfig, positions: Array, most: int) -> list[Turned | None]:
    """How the heads of each layer turn.

    Args:
      config: of the network.
      positions: of tokens, `[*shape]`.
      most: all positions are below it.

    Returns:
      Looked up in a table, as XLA would compute them again for each head and layer; None where
      they do not turn.
    """

    def look_up(rotary: Rotary) -> Turned:
        turns = jnp.asarray(rotary.turns(config.head_dim))
        angles = jnp.outer(jnp.arange(most, dtype=jnp.float32), turns)
        sin, cos = (of.at[positions].get(mode="clip") for of in (jnp.sin(angles), jnp.cos(angles)))
        return sin, cos

    found = {rotary: look_up(rotary) for rotary in config.rotaries or ()}
    rotaries = (config.rotary(number) for number in range(config.num_layers))
    return [None if rotary is None else found[rotary] for rotary in rotaries]


def rotate(x: Array, turned: Turned) -> Array:
    """Turns the heads `[*shape, ..., head_dim]` of tokens."""
    sin, cos = (jnp.expand_dims(of, range(of.ndim - 1, x.ndim - 1)) for of in turned)
    half = sin.shape[-1]
    a, b, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
    return out.astype(x.dtype)


def _heads(config: DecoderConfig, params: Params, x: Array) -> tuple[Array, Array, Array]:
    """Queries `[..., kv heads, group, head_dim]`, keys and values `[..., kv heads, head_dim]`."""
    kv, group, size = config.num_kv_heads, config.group, config.head_dim
    if config.qkv == "groups":
        groups = linear(params["qkv"], x).reshape(*x.shape[:-1], kv, group + 2, size)
        return groups[..., :group, :], groups[..., group, :], groups[..., group + 1, :]
    if config.qkv == "blocks":
        ends = (kv * group * size, kv * (group + 1) * size)
        query, key, value = jnp.split(linear(params["qkv"], x), ends, axis=-1)
    else:
        query, key, value = (linear(params[part], x) for part in ("query", "key", "value"))
    return (
        query.reshape(*x.shape[:-1], kv, group, size),
        key.reshape(*x.shape[:-1], kv, size),
        value.reshape(*x.shape[:-1], kv, size),
    )


Attend = Callable[[Array, Array, Array], Array]
"""Gives queries, keys and values what the queries find, shaped like the queries."""


def layer(
    config: DecoderConfig,
    params: Params,
    x: Array,
    turned: Turned | None,
    attend: Attend,
    drop: Callable[[Array], Array] = lambda x: x,
) -> Array:
    """A layer.

    Args:
      config: of the network.
      params: of the layer.
      x: the residual stream, `[*shape, D]`.
      turned: how the heads of its tokens turn, see `turned_at`.
      attend: see `Attend`.
      drop: dropout, on what is added to the stream.

    Returns:
      The stream after it.
    """

    def before(name: str, params: Params, x: Array) -> Array:
        return x if config.norms == "after" else normalize(config, params[f"pre_{name}_norm"], x)

    def after(name: str, x: Array) -> Array:
        if config.norms != "before":
            x = normalize(config, params[f"post_{name}_norm"], x)
        if config.residual_multiplier != 1.0:
            x = x * config.residual_multiplier
        return drop(x)

    def normalized(params: Params, heads: Array, x: Array) -> Array:
        if config.qk_norm == "heads":
            return normalize(config, params, heads)
        return normalize(config, params, heads.reshape(*x.shape[:-1], -1)).reshape(heads.shape)

    # Of the three parts nothing inside is held for the backward pass: next to their products it is
    # made in no time, and it would be the most of what a layer holds.
    again = _again(config)

    @again
    def heads(params: Params, x: Array, turned: Turned | None) -> tuple[Array, Array, Array]:
        query, key, value = _heads(config, params["attention"], before("attention", params, x))
        if config.qk_norm != "none":
            query = normalized(params["attention"]["query_norm"], query, x)
            key = normalized(params["attention"]["key_norm"], key, x)
        if turned is not None:
            query, key = rotate(query, turned), rotate(key, turned)
        return query, key, value

    @again
    def widened(params: Params, x: Array) -> list[list[Array]]:
        read = before("attention" if config.shared_norm else "mlp", params, x)
        return [products(params["mlp"][part], read) for part in config.widening]

    @again
    def narrowed(params: Params, made: list[list[Array]]) -> Array:
        mlp, act = params["mlp"], ACTIVATIONS[config.activation]
        wide = [summed(mlp[part], of) for part, of in zip(config.widening, made, strict=True)]
        if "gate_up" in config.widening:
            wide = jnp.split(wide[0], 2, axis=-1)
        return linear(mlp["down"], act(wide[0]) * wide[1] if config.gated else act(wide[0]))

    found = attend(*heads(params, x, turned)).reshape(*x.shape[:-1], -1)
    added = after("attention", linear(params["attention"]["out"], found))
    if not config.parallel:
        x = x + added
    x = x + after("mlp", narrowed(params, widened(params, x)))
    return x + added if config.parallel else x


def _again(config: DecoderConfig) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`remat` for a part of a layer: without use where the whole layer is run again."""
    return (lambda part: part) if config.remat else remat


def _weights(config: DecoderConfig, products: Array, allowed: Array) -> Array:
    """Attention weights, float32, of the products of queries and keys."""
    logits = products.astype(jnp.float32) * (config.query_scalar or config.head_dim) ** -0.5
    if config.attention_softcap:
        logits = config.attention_softcap * jnp.tanh(logits / config.attention_softcap)
    return jax.nn.softmax(jnp.where(allowed, logits, _FORBIDDEN), axis=-1)


class Sequence(NamedTuple):
    """Prompts and what follows each in one or several streams, `[batch, T]`, T = S + K L.

    Attributes:
      prompts: `[batch, S]`.
      given: `[batch, K, L]`: a stream sees the prompt and itself.
      before: `[batch]`, tokens of a prompt that the streams see; they go on at this position.
    """

    prompts: Array
    given: Array
    before: Array

    @property
    def tokens(self) -> Array:
        """`[batch, T]`."""
        return self._flat(self.prompts, self.given)

    @property
    def positions(self) -> Array:
        """`[batch, T]`."""
        in_prompt, in_stream = self._places
        return self._flat(
            jnp.broadcast_to(in_prompt[None], self.prompts.shape),
            jnp.broadcast_to((self.before[:, None] + in_stream[None])[:, None], self.given.shape),
        )

    def allowed(self, window: int) -> tuple[Array, Array]:
        """What each token may see.

        Args:
          window: how many tokens, back from itself and with it; 0 for all.

        Returns:
          Bool `[batch, S, S]`, of prompts, and `[batch, L, S + L]`, of a stream: of its prompt and
          of itself.
        """
        in_prompt, in_stream = self._places
        seen = (in_prompt[None] < self.before[:, None])[:, None]

        def back(here: Array, there: Array) -> Array:
            distance = here[..., :, None] - there[..., None, :]
            return (distance >= 0) & (distance < window) if window else distance >= 0

        rows, length = len(self.before), len(in_stream)
        in_text = self.before[:, None] + in_stream[None]
        to_prompt = back(in_text, jnp.broadcast_to(in_prompt[None], (rows, len(in_prompt)))) & seen
        to_stream = jnp.broadcast_to(back(in_stream, in_stream)[None], (rows, length, length))
        return back(in_prompt, in_prompt)[None] & seen, jnp.concatenate([to_prompt, to_stream], -1)

    @property
    def _places(self) -> tuple[Array, Array]:
        prompts, given = (
            jnp.arange(x.shape[-1], dtype=jnp.int32) for x in (self.prompts, self.given)
        )
        return prompts, given

    def _flat(self, prompts: Array, given: Array) -> Array:
        return jnp.concatenate([prompts, given.reshape(len(given), -1)], axis=1)


def attend_within(
    config: DecoderConfig,
    streams: int,
    query: Array,
    key: Array,
    value: Array,
    of_prompt: Array,
    of_stream: Array,
) -> Array:
    """What the tokens of a sequence find in it.

    Args:
      config: of the network.
      streams: K, that follow each prompt.
      query: `[batch, T, kv heads, group, head_dim]`, see `Sequence`.
      key: `[batch, T, kv heads, head_dim]`.
      value: the same.
      of_prompt: see `Sequence.allowed`.
      of_stream: see there.

    Returns:
      An array like `query`.
    """
    length = of_prompt.shape[-1]
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def parts(x: Array) -> tuple[Array, Array]:
        """Of the prompts, `[batch, kv heads, S, ...]`, and streams, `[batch, kv heads, K, L, ...]`.

        Products of matrices, one to a key-value head, then leave weights as the next ones read
        them: nothing of their size is turned.
        """
        x = jnp.moveaxis(x, 2, 1)
        rest = x[:, :, length:]
        return x[:, :, :length], rest.reshape(*x.shape[:2], streams, -1, *x.shape[3:])

    (query, queries), (key, keys), (value, values) = map(parts, (query, key, value))
    products = dot("bktgh,bksh->bktgs", query, key)
    weights = _weights(config, products, of_prompt[:, None, :, None]).astype(value.dtype)
    found = jnp.einsum("bktgs,bksh->bktgh", weights, value)
    products = jnp.concatenate(
        [dot("bkntgh,bksh->bkntgs", queries, key), dot("bkntgh,bknsh->bkntgs", queries, keys)],
        axis=-1,
    )
    weights = _weights(config, products, of_stream[:, None, None, :, None]).astype(value.dtype)
    in_streams = jnp.einsum("bkntgs,bksh->bkntgh", weights[..., :length], value) + jnp.einsum(
        "bkntgs,bknsh->bkntgh", weights[..., length:], values
    )
    in_streams = in_streams.reshape(*found.shape[:2], -1, *found.shape[3:])
    return jnp.moveaxis(jnp.concatenate([found, in_streams], axis=2), 1, 2)


def prompt_lengths(config: DecoderConfig, prompts: Array) -> Array:
    """How many tokens each prompt has, `[batch]`."""
    places = jnp.arange(1, prompts.shape[1] + 1, dtype=jnp.int32)[None]
    return jnp.max(jnp.where(prompts == config.pad_id, 0, places), axis=1, initial=0)


def last_tokens(config: DecoderConfig, prompts: Array) -> Array:
    """The last token of each prompt, `[batch]`; `begin_id` of an empty one."""
    lengths = prompt_lengths(config, prompts)
    # A column of its own, so that a prompt may also have no room for a token.
    filled = jnp.pad(prompts, ((0, 0), (1, 0)), constant_values=config.begin_id)
    return jnp.take_along_axis(filled, lengths[:, None], axis=1)[:, 0].astype(jnp.int32)


def follow(config: DecoderConfig, prompts: Array, given: Array) -> Sequence:
    """Puts tokens behind prompts.

    Args:
      config: of the network.
      prompts: `[batch, S]`.
      given: `[batch, K, L]`; the first of each stream is the last token of the prompt, which is not
        seen in its own place.

    Returns:
      Both, side by side.
    """
    return Sequence(prompts, given, jnp.maximum(prompt_lengths(config, prompts), 1) - 1)


def run(
    config: DecoderConfig,
    params: Params,
    sequence: Sequence,
    dropout_key: Array | None = None,
) -> tuple[Array, list[tuple[Array, Array]]]:
    """Reads a sequence.

    Args:
      config: of the network.
      params: its parameters.
      sequence: what is read, see `follow`.
      dropout_key: for dropout; None for none.

    Returns:
      The residual stream after the last layer, `[batch, T, D]`, and each layer's keys and values,
      `[batch, T, kv heads, head_dim]`.
    """
    positions, streams = sequence.positions, sequence.given.shape[1]
    turned = turned_at(config, positions, sequence.prompts.shape[1] + sequence.given.shape[2])
    windows = {config.window(i) for i in range(config.num_layers)}
    allowed = {window: sequence.allowed(window) for window in windows}

    def drop(number: int, dropout_key: Array | None, x: Array) -> Array:
        if dropout_key is None or not config.dropout_rate:
            return x
        key = jax.random.fold_in(dropout_key, number)
        kept = jax.random.bernoulli(key, 1 - config.dropout_rate, x.shape)
        return jnp.where(kept, x / jnp.asarray(1 - config.dropout_rate, x.dtype), 0)

    def read(
        number: int,
        params: Params,
        x: Array,
        turned: Turned | None,
        allowed: tuple[Array, Array],
        dropout_key: Array | None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """A layer, and its keys and values."""
        made: list[tuple[Array, Array]] = []
        drops = itertools.count(1 + 2 * number)  # after those of the embedding and other layers

        # Its weights, [batch, kv heads, queries, group, keys], are the largest of all.
        @_again(config)
        def within(_: Params, *arrays: Array) -> Array:
            return attend_within(config, streams, *arrays)

        def attend(query: Array, key: Array, value: Array) -> Array:
            made.append((key, value))
            return within({}, query, key, value, *allowed)

        def drop_next(x: Array) -> Array:
            return drop(next(drops), dropout_key, x)

        x = layer(config, params, x, turned, attend, drop_next)
        return x, made[0]

    x, made = drop(0, dropout_key, embed(config, params, sequence.tokens, positions)), []
    for i in range(config.num_layers):
        read_layer = functools.partial(read, i)
        x, of_layer = (remat(read_layer) if config.remat else read_layer)(
            params[f"layers_{i}"], x, turned[i], allowed[config.window(i)], dropout_key
        )
        made.append(of_layer)
    return x, made


class LayerCache(NamedTuple):
    """Keys and values of a layer, laid out for the products of a step, in `config.dtype`.

    Attributes:
      prompt_keys: `[rows, kv heads, head_dim, S]`, once for all streams of a prompt.
      prompt_values: `[rows, kv heads, S, head_dim]`.
      keys: `[rows, streams, kv heads, head_dim, max_length]`, of the prompt's last token and of the
        output.
      values: `[rows, streams, kv heads, max_length, head_dim]`.
    """

    prompt_keys: Array
    prompt_values: Array
    keys: Array
    values: Array


class DecoderCache(NamedTuple):
    """What decoding keeps.

    Attributes:
      before: `[rows]`, tokens of a prompt before its last.
      taken: scalar, how many tokens each stream has taken.
      layers: a cache each.
    """

    before: Array
    taken: Array
    layers: tuple[LayerCache, ...]


def make_cache(
    made: list[tuple[Array, Array]],
    before: Array,
    taken: Array,
    *,
    prompt_length: int,
    streams: int,
    max_length: int,
) -> DecoderCache:
    """Lays out what `run` made of prompts and what all streams of each begin with.

    Args:
      made: each layer's keys and values; those of what follows beyond `taken` may be anything, as
        they are overwritten before they are seen.
      before: see `DecoderCache`.
      taken: see `DecoderCache`.
      prompt_length: S.
      streams: to each prompt.
      max_length: tokens that a stream may take.

    Returns:
      The cache.
    """

    def own(x: Array, axis: int) -> Array:
        room = [(0, 0)] * x.ndim
        room[axis] = (0, max_length - x.shape[axis])
        x = jnp.pad(x, room)[:, None]
        return jnp.broadcast_to(x, (x.shape[0], streams, *x.shape[2:]))

    layers = []
    for key, value in made:
        key, value = jnp.moveaxis(key, 1, -1), jnp.moveaxis(value, 1, -2)
        layers.append(
            LayerCache(
                key[..., :prompt_length],
                value[..., :prompt_length, :],
                own(key[..., prompt_length:], -1),
                own(value[..., prompt_length:, :], -2),
            )
        )
    return DecoderCache(before, taken, tuple(layers))


def step(
    config: DecoderConfig, params: Params, cache: DecoderCache, tokens: Array
) -> tuple[Array, DecoderCache]:
    """Takes one more token in every stream.

    Args:
      config: of the network.
      params: its parameters.
      cache: of `make_cache` or of the step before.
      tokens: `[rows, streams]`.

    Returns:
      The residual stream after the last layer, `[rows, streams, D]`, and the cache.
    """
    before, taken, _ = cache
    here = (before + taken)[:, None]
    positions = jnp.broadcast_to(here, tokens.shape)
    room = cache.layers[0]
    turned = turned_at(config, positions, room.prompt_keys.shape[-1] + room.keys.shape[-1])
    x, layers = embed(config, params, tokens, positions), []
    for i, old in enumerate(cache.layers):
        window, length = config.window(i), old.prompt_keys.shape[-1]
        in_prompt, in_output = jnp.arange(length)[None], jnp.arange(old.keys.shape[-1])[None]
        of_prompt = in_prompt < before[:, None]
        of_output = jnp.broadcast_to(in_output <= taken, (len(before), in_output.shape[1]))
        if window:
            of_prompt &= here - in_prompt < window
            of_output &= taken - in_output < window
        allowed = jnp.concatenate([of_prompt, of_output], axis=1)[:, None, None, None]

        def attend(
            query: Array,
            key: Array,
            value: Array,
            old: LayerCache = old,
            allowed: Array = allowed,
            length: int = length,
        ) -> Array:
            new = old._replace(
                keys=lax.dynamic_update_index_in_dim(old.keys, key, taken, axis=-1),
                values=lax.dynamic_update_index_in_dim(old.values, value, taken, axis=-2),
            )
            layers.append(new)
            products = jnp.concatenate(
                [
                    jnp.einsum("rskgh,rkht->rskgt", query, new.prompt_keys),
                    jnp.einsum("rskgh,rskht->rskgt", query, new.keys),
                ],
                axis=-1,
            )
            weights = _weights(config, products, allowed).astype(value.dtype)
            to_prompt, to_output = weights[..., :length], weights[..., length:]
            return jnp.einsum("rskgt,rkth->rskgh", to_prompt, new.prompt_values) + jnp.einsum(
                "rskgt,rskth->rskgh", to_output, new.values
            )

        x = layer(config, params[f"layers_{i}"], x, turned[i], attend)
    return x, DecoderCache(before, taken + 1, tuple(layers))
