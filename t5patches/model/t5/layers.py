"""The layers of T5 in Flax: parameter names, logical axes and initialisers are those of T5X.

Written to the parameter tree of `t5x.examples.t5.layers` [1], so that a checkpoint written there
loads here and gives the same numbers. What differs on purpose:

* the cached step writes its key and value in place instead of through a one-hot product, and may
  advance several streams per input (`MultiHeadDotProductAttention`);
* keys and values of the encoder outputs may be handed in, projected once (same class).

Masks are arrays broadcastable to `[batch, heads, queries, keys]`, greater than 0 where attention is
allowed.

[1] Roberts et al., "Scaling Up Models and Data with t5x and seqio", 2022, arXiv:2203.17189.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning
from jax import lax

param_with_axes = partitioning.param_with_axes
with_sharding_constraint = partitioning.with_sharding_constraint

Array = jax.Array
DType = Any
PRNGKey = Array
Shape = Sequence[int]
Activation = Callable[..., Array]
Initializer = Callable[..., Array]

default_embed_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)

# Added to the attention logits where the mask forbids. Finite, so that a query that may attend to
# nothing (padding) averages everything instead of becoming NaN.
_FORBIDDEN = -1e10


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    dropout_rng: PRNGKey | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DType = jnp.float32,
    float32_logits: bool = False,
) -> Array:
    r"""Attention of T5: no division by the square root of the head size.

    For each head, :math:`\mathrm{softmax}(q k^T + b)\, v` with the softmax over keys.

    Args:
      query: `[batch, queries, heads, depth]`.
      key: `[batch, keys, heads, depth]`.
      value: `[batch, keys, heads, value_depth]`.
      bias: broadcastable to `[batch, heads, queries, keys]`; masks and relative positions.
      dropout_rng: needed where dropout is on.
      dropout_rate: probability of dropping an attention weight; the same for all queries.
      deterministic: no dropout.
      dtype: of the attention weights, thus of the result.
      float32_logits: multiply queries and keys in float32 whatever `dtype` is.

    Returns:
      `[batch, queries, heads, value_depth]`.

    Raises:
      ValueError: for shapes that do not fit together.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.ones((2, 3, 4, 8))
      >>> dot_product_attention(x, x, x, deterministic=True).shape
      (2, 3, 4, 8)
    """
    _check_attention_shapes(query.shape, key.shape, value.shape)
    if float32_logits:
        query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    # In the layout of the cache, so that a decoding step moves no key and no value it has written.
    key, value = (jnp.moveaxis(x, -3, -1) for x in (key, value))
    logits = jnp.einsum("bqhd,bhdk->bhqk", query, key)
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)
    weights = jax.nn.softmax(logits).astype(dtype)
    if not deterministic and dropout_rate > 0.0:
        weights = _drop_weights(weights, dropout_rng, dropout_rate)
    return jnp.einsum("bhqk,bhdk->bqhd", weights, value)


def _check_attention_shapes(query: Shape, key: Shape, value: Shape) -> None:
    fits = (
        len(query) == len(key) == len(value) >= 3
        and query[:-3] == key[:-3] == value[:-3]
        and query[-2] == key[-2] == value[-2]
        and key[-3] == value[-3]
        and query[-1] == key[-1]
    )
    if not fits:
        raise ValueError(
            "query, key and value must be [batch, queries, heads, depth], [batch, keys, heads, "
            "depth] and [batch, keys, heads, value_depth]; got "
            f"{tuple(query)}, {tuple(key)}, {tuple(value)}."
        )


def _drop_weights(weights: Array, rng: PRNGKey | None, rate: float) -> Array:
    if rng is None:
        raise ValueError(
            "dropout_rng is None where dropout_rate > 0: pass a key, or deterministic=True."
        )
    # One draw for all queries: T5 drops a key, not a (query, key) pair.
    shape = (*weights.shape[:-2], 1, weights.shape[-1])
    keep = jax.random.bernoulli(rng, 1.0 - rate, shape)
    return weights * (keep.astype(weights.dtype) / jnp.asarray(1.0 - rate, weights.dtype))


class MultiHeadDotProductAttention(nn.Module):
    """Multi-head attention with T5's scaling, optionally with a cache for step-by-step decoding.

    With `decode=True` the first call (no `cache` collection yet) allocates `cached_key` and
    `cached_value` of shape `[batch, heads, depth, length]` and `cache_index`; the calls after it
    take one position a row, write it at `cache_index` and attend to what has been written. A cache
    of `batch * streams` rows makes `inputs_q` of shape `[batch, streams, features]` one position of
    each of `streams` independent sequences per input, so that what belongs to the input (its
    encoder outputs) is held and read once for all of them.

    Where the collection `projected` holds this module's `key` and `value`, laid out as in the
    cache, they are used and `inputs_kv` is not projected again.

    Attributes:
      num_heads: number of heads.
      head_dim: size of each head.
      dtype: of the computation; parameters are float32.
      dropout_rate: dropout on the attention weights.
      kernel_init: initialiser of the four kernels; the query's is divided by `sqrt(head_dim)`.
      float32_logits: attention logits in float32 whatever `dtype` is.
    """

    num_heads: int
    head_dim: int
    dtype: DType = jnp.float32
    dropout_rate: float = 0.0
    kernel_init: Initializer = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    float32_logits: bool = False

    @nn.compact
    def __call__(
        self,
        inputs_q: Array,
        inputs_kv: Array,
        mask: Array | None = None,
        bias: Array | None = None,
        *,
        decode: bool = False,
        deterministic: bool = False,
    ) -> Array:
        """Attends from `inputs_q` `[batch, queries, features]` to `inputs_kv` `[batch, keys, _]`.

        Args:
          inputs_q: what asks.
          inputs_kv: what is attended to.
          mask: `[batch, heads or 1, queries, keys]`, greater than 0 where allowed.
          bias: added to the attention logits, same shape up to broadcasting. When decoding step by
            step, the whole `[1, heads, length, length]` table: the step's row is taken from it.
          decode: allocate or use the cache.
          deterministic: no dropout.

        Returns:
          `[batch, queries, features]`.
        """
        query, key, value = self._project(inputs_q, inputs_kv)
        rows = query.shape
        if decode and self._cache_exists(key, value):
            query, key, value, mask, bias = self._cached_step(query, key, value, mask, bias)
        if mask is not None:
            forbid = jnp.where(mask > 0, 0.0, _FORBIDDEN).astype(self.dtype)
            bias = combine_biases(forbid, bias)
        use_dropout = not deterministic and self.dropout_rate > 0.0
        x = dot_product_attention(
            query,
            key,
            value,
            bias=bias,
            dropout_rng=self.make_rng("dropout") if use_dropout else None,
            dropout_rate=self.dropout_rate,
            deterministic=deterministic,
            dtype=self.dtype,
            float32_logits=self.float32_logits,
        )
        return DenseGeneral(
            features=inputs_q.shape[-1],
            axis=(-2, -1),
            kernel_init=self.kernel_init,
            kernel_axes=("joined_kv", "embed"),
            dtype=self.dtype,
            name="out",
        )(x.reshape(rows))

    def _project(self, inputs_q: Array, inputs_kv: Array) -> tuple[Array, Array, Array]:
        projection = functools.partial(
            DenseGeneral,
            axis=-1,
            features=(self.num_heads, self.head_dim),
            kernel_axes=("embed", "joined_kv"),
            dtype=self.dtype,
        )

        def query_init(*args: Any) -> Array:
            # The 1/sqrt(depth) of attention lives in the initial weights: under Adafactor, whose
            # updates are relative to the weights, that is the same as dividing the logits.
            return self.kernel_init(*args) / math.sqrt(self.head_dim)

        def constrain(x: Array) -> Array:
            return with_sharding_constraint(x, ("batch", "length", "heads", "kv"))

        query = projection(kernel_init=query_init, name="query")(inputs_q)
        if self.has_variable("projected", "key"):
            key, value = (
                jnp.moveaxis(self.get_variable("projected", name), -1, -3)
                for name in ("key", "value")
            )
        else:
            key = projection(kernel_init=self.kernel_init, name="key")(inputs_kv)
            value = projection(kernel_init=self.kernel_init, name="value")(inputs_kv)
        return constrain(query), constrain(key), constrain(value)

    def _cache_exists(self, key: Array, value: Array) -> bool:
        """Whether there is a cache; where there is none, allocates it as large as `key`."""
        exists = self.has_variable("cache", "cached_key")
        for name, x in (("cached_key", key), ("cached_value", value)):
            shape = (*x.shape[:-3], x.shape[-2], x.shape[-1], x.shape[-3])
            self.variable("cache", name, jnp.zeros, shape, x.dtype)
        self.variable("cache", "cache_index", lambda: jnp.zeros((), jnp.int32))
        return exists

    def _cached_step(
        self, query: Array, key: Array, value: Array, mask: Array | None, bias: Array | None
    ) -> tuple[Array, Array, Array, Array, Array | None]:
        """Writes one position a row; returns the query a row and all that it may attend to."""
        old_key: Array = self.get_variable("cache", "cached_key")
        rows, heads, depth, length = old_key.shape
        index = jnp.asarray(self.get_variable("cache", "cache_index"))
        if query.shape[0] * query.shape[1] != rows or query.shape[-2:] != (heads, depth):
            raise ValueError(
                f"Decoding takes one position a row of the cache: {rows} rows of {heads} heads of "
                f"{depth}, got queries of shape {query.shape}. Pass [{rows}, 1] tokens, or "
                "allocate the cache for this batch."
            )
        query = query.reshape(rows, 1, heads, depth)
        full = {}
        for name, x in (("cached_key", key), ("cached_value", value)):
            cached = jnp.asarray(self.get_variable("cache", name))
            position = x.reshape(rows, heads, depth, 1).astype(cached.dtype)
            cached = lax.dynamic_update_slice_in_dim(cached, position, index, axis=-1)
            self.put_variable("cache", name, cached)
            full[name] = jnp.moveaxis(cached, -1, -3)
        self.put_variable("cache", "cache_index", index + 1)
        written = (jnp.arange(length) <= index)[None, None, None, :]
        if bias is not None:
            bias = lax.dynamic_slice_in_dim(bias, index, 1, axis=-2)
        return query, full["cached_key"], full["cached_value"], combine_masks(mask, written), bias


class DenseGeneral(nn.Module):
    """A linear map without bias from any axes to any number of axes.

    The kernel is kept as a matrix, `[prod(inputs), prod(features)]`. Where the parameters hold an
    adapter beside it (`t5patches.model.lora`), `lora_a` `[prod(inputs), rank]` and `lora_b`
    `[rank, prod(features)]`, their product is part of the map.

    Attributes:
      features: size or sizes of the outputs.
      axis: axis or axes of the input that are summed over.
      dtype: of the computation; the kernel is float32.
      kernel_init: initialiser, called with the matrix shape.
      kernel_axes: logical names of the matrix' two axes.
    """

    features: Iterable[int] | int
    axis: Iterable[int] | int = -1
    dtype: DType = jnp.float32
    kernel_init: Initializer = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
    kernel_axes: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Maps the axes `axis` of `inputs` to `features`, which come last."""
        features, axis = _as_tuple(self.features), _as_tuple(self.axis)
        inputs = jnp.asarray(inputs, self.dtype)
        axis = tuple(a % inputs.ndim for a in axis)
        contracted = tuple(inputs.shape[a] for a in axis)
        kernel = param_with_axes(
            "kernel",
            self.kernel_init,
            (int(np.prod(contracted)), int(np.prod(features))),
            jnp.float32,
            axes=self.kernel_axes,
        )

        def product(matrix: Array, sizes: tuple[int, ...]) -> Array:
            matrix = jnp.asarray(matrix, self.dtype).reshape(contracted + sizes)
            return lax.dot_general(inputs, matrix, ((axis, tuple(range(len(axis)))), ((), ())))

        out = product(kernel, features)
        if not self.has_variable("params", "lora_a"):
            return out
        low = product(self.get_variable("params", "lora_a"), (-1,))
        lora_b = jnp.asarray(self.get_variable("params", "lora_b"), self.dtype)
        return out + jnp.tensordot(low, lora_b.reshape(-1, *features), 1)


def _as_tuple(sizes: Iterable[int] | int) -> tuple[int, ...]:
    return tuple(sizes) if isinstance(sizes, Iterable) else (sizes,)


def _activation(name: str | Activation) -> Activation:
    if callable(name):
        return name
    if name == "linear":
        return lambda x: x
    if name == "gelu_exact":
        return functools.partial(nn.gelu, approximate=False)
    found = getattr(nn, name, None) if isinstance(name, str) else None
    if found is None:
        raise ValueError(
            f"Unknown activation {name!r}: give 'linear', 'gelu_exact', the name of a function in "
            "flax.linen such as 'relu', 'gelu' (approximate) or 'silu', or a function."
        )
    return found


class MlpBlock(nn.Module):
    r"""T5's feed-forward block, gated where there are several activations.

    :math:`\left(\prod_i a_i(x W_i)\right) W_o`, with the activations `('relu',)` in T5 1.0 and
    `('gelu', 'linear')` in T5 1.1.

    Attributes:
      intermediate_dim: width of each `W_i`.
      activations: one per input matrix: `'linear'`, `'gelu_exact'`, a name in `flax.linen` (whose
        `'gelu'` is the approximation by tanh), or a function.
      kernel_init: initialiser of all kernels.
      intermediate_dropout_rate: dropout before `W_o`.
      dtype: of the computation.
    """

    intermediate_dim: int = 2048
    activations: Sequence[str | Activation] = ("relu",)
    kernel_init: Initializer = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
    intermediate_dropout_rate: float = 0.1
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, inputs: Array, decode: bool = False, deterministic: bool = False) -> Array:
        """Maps `[batch, length, features]` to the same shape; `decode` is accepted for T5X."""
        dense = functools.partial(DenseGeneral, dtype=self.dtype, kernel_init=self.kernel_init)
        names = [f"wi_{i}" for i in range(len(self.activations))]
        factors = [
            _activation(activation)(
                dense(self.intermediate_dim, kernel_axes=("embed", "mlp"), name=name)(inputs)
            )
            for activation, name in zip(
                self.activations, names if len(names) > 1 else ["wi"], strict=True
            )
        ]
        x = functools.reduce(operator.mul, factors)
        x = nn.Dropout(rate=self.intermediate_dropout_rate, broadcast_dims=(-2,))(
            x, deterministic=deterministic
        )
        x = with_sharding_constraint(x, ("batch", "length", "mlp"))
        return dense(inputs.shape[-1], kernel_axes=("mlp", "embed"), name="wo")(x)


class Embed(nn.Module):
    """A table of vectors looked up by id, and its use as an output layer.

    Attributes:
      num_embeddings: number of ids.
      features: size of a vector.
      cast_input_dtype: cast the ids to this type first.
      dtype: of the vectors looked up; the table is float32.
      attend_dtype: of the table in `attend`; `dtype` where None.
      embedding_init: initialiser of the table.
      one_hot: look up by a product with one-hot rows, as old partitioners needed.
    """

    num_embeddings: int
    features: int
    cast_input_dtype: DType | None = None
    dtype: DType = jnp.float32
    attend_dtype: DType | None = None
    embedding_init: Initializer = default_embed_init
    one_hot: bool = False

    def setup(self) -> None:
        """Declares the table, `[num_embeddings, features]` with axes `('vocab', 'embed')`."""
        self.embedding = param_with_axes(
            "embedding",
            self.embedding_init,
            (self.num_embeddings, self.features),
            jnp.float32,
            axes=("vocab", "embed"),
        )

    def __call__(self, inputs: Array) -> Array:
        """Looks up ids of any shape; the vector is the last axis of the result."""
        if self.cast_input_dtype is not None:
            inputs = inputs.astype(self.cast_input_dtype)
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError(
                f"Input type must be an integer or unsigned integer. Got {inputs.dtype}: cast the "
                "ids, or set cast_input_dtype."
            )
        table = jnp.asarray(self.embedding, self.dtype)
        if self.one_hot:
            return jnp.dot(jax.nn.one_hot(inputs, self.num_embeddings, dtype=self.dtype), table)
        return with_sharding_constraint(table[inputs], ("batch", "length", "embed"))

    def attend(self, query: Array) -> Array:
        """The product of `query` `[..., features]` with every vector: `[..., num_embeddings]`."""
        dtype = self.dtype if self.attend_dtype is None else self.attend_dtype
        return jnp.dot(query.astype(dtype), jnp.asarray(self.embedding, dtype).T)


class RelativePositionBiases(nn.Module):
    """T5's relative positions: a learned number per head and bucket of distance.

    Attributes:
      num_buckets: buckets in all; half of them for each direction where bidirectional.
      max_distance: distances from here on share the last bucket.
      num_heads: number of heads.
      dtype: of the result; the table is float32.
      embedding_init: initialiser of the `[num_heads, num_buckets]` table.
    """

    num_buckets: int
    max_distance: int
    num_heads: int
    dtype: DType
    embedding_init: Initializer = nn.linear.default_embed_init

    @staticmethod
    def _relative_position_bucket(
        relative_position: np.ndarray,
        bidirectional: bool = True,
        num_buckets: int = 32,
        max_distance: int = 128,
    ) -> np.ndarray:
        """Bucket of each `key position - query position`: exact when near, logarithmic when far."""
        distance = -relative_position
        start = np.zeros_like(distance)
        if bidirectional:
            num_buckets //= 2
            start = np.where(distance < 0, num_buckets, 0)
            distance = np.abs(distance)
        distance = np.maximum(distance, 0)
        exact = num_buckets // 2
        # In float32 and with its epsilon, as T5X and the original do: the bucket borders are where
        # the logarithm is whole, and float64 would put some of them one position further.
        ratio = distance.astype(np.float32) / np.float32(exact) + np.finfo(np.float32).eps
        far = np.log(ratio) / np.log(max_distance / exact) * (num_buckets - exact)
        bucket = np.minimum(exact + far.astype(np.int32), num_buckets - 1)
        return start + np.where(distance < exact, distance, bucket)

    @nn.compact
    def __call__(self, qlen: int, klen: int, bidirectional: bool = True) -> Array:
        """The bias `[1, num_heads, qlen, klen]` for queries and keys that start together."""
        bucket = self._relative_position_bucket(
            np.arange(klen)[None, :] - np.arange(qlen)[:, None],
            bidirectional=bidirectional,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        table = param_with_axes(
            "rel_embedding",
            self.embedding_init,
            (self.num_heads, self.num_buckets),
            jnp.float32,
            axes=("heads", "relpos_buckets"),
        )
        # A product rather than a lookup: its gradient is a product too, not a scatter of every
        # (query, key) pair into a few dozen numbers.
        chosen = jax.nn.one_hot(bucket, self.num_buckets, dtype=self.dtype)
        return jnp.einsum("hn,qkn->hqk", jnp.asarray(table, self.dtype), chosen)[None]


class LayerNorm(nn.Module):
    """T5's layer norm: divided by the root mean square, no mean taken off, no bias.

    Attributes:
      epsilon: added to the mean square.
      dtype: of the result; statistics and the scale are float32.
      scale_init: initialiser of the scale.
    """

    epsilon: float = 1e-6
    dtype: DType = jnp.float32
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises the last axis."""
        x = jnp.asarray(x, jnp.float32)
        mean_square = jnp.mean(lax.square(x), axis=-1, keepdims=True)
        normal = jnp.asarray(x * lax.rsqrt(mean_square + self.epsilon), self.dtype)
        scale = param_with_axes(
            "scale", self.scale_init, (x.shape[-1],), jnp.float32, axes=("embed",)
        )
        return normal * jnp.asarray(scale, self.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def make_attention_mask(
    query_input: Array,
    key_input: Array,
    pairwise_fn: Callable[..., Array] = jnp.multiply,
    extra_batch_dims: int = 0,
    dtype: DType = jnp.float32,
) -> Array:
    """The mask whose entry (i, j) is `pairwise_fn(query_input[i], key_input[j])`.

    Args:
      query_input: `[batch..., queries]`.
      key_input: `[batch..., keys]`.
      pairwise_fn: elementwise function of the two; `jnp.multiply` of 0/1 means "both real",
        `jnp.equal` of segment ids means "same example".
      extra_batch_dims: axes of size 1 put in front.
      dtype: of the mask.

    Returns:
      `[batch..., 1, queries, keys]`; the axis of size 1 stands for the heads.

    Example:
      >>> import jax.numpy as jnp
      >>> real = jnp.array([[5, 7, 0]]) > 0
      >>> make_attention_mask(real, real)[0, 0].astype(int).tolist()
      [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    """
    mask = pairwise_fn(query_input[..., :, None], key_input[..., None, :])
    mask = jnp.expand_dims(mask, axis=-3)
    return jnp.expand_dims(mask, axis=tuple(range(extra_batch_dims))).astype(dtype)


def make_causal_mask(x: Array, extra_batch_dims: int = 0, dtype: DType = jnp.float32) -> Array:
    """The mask that lets each position see itself and what came before; only `x.shape` counts.

    Args:
      x: `[batch..., length]`.
      extra_batch_dims: axes of size 1 put in front.
      dtype: of the mask.

    Returns:
      `[batch..., 1, length, length]`.

    Example:
      >>> import jax.numpy as jnp
      >>> make_causal_mask(jnp.zeros((1, 3)))[0, 0].astype(int).tolist()
      [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    positions = jnp.broadcast_to(jnp.arange(x.shape[-1]), x.shape)
    return make_attention_mask(positions, positions, jnp.greater_equal, extra_batch_dims, dtype)


def combine_masks(*masks: Array | None, dtype: DType = jnp.float32) -> Any:
    """What all the masks allow; None where all are None.

    Args:
      *masks: masks of one rank; None stands for "everything allowed".
      dtype: of the result.

    Returns:
      The mask, or None.

    Raises:
      ValueError: for masks of different rank.
    """
    given = [mask.astype(bool) for mask in _of_one_rank(masks)]
    return functools.reduce(jnp.logical_and, given).astype(dtype) if given else None


def combine_biases(*masks: Array | None) -> Any:
    """The sum of the biases; None where all are None.

    Args:
      *masks: biases of one rank; None stands for 0.

    Returns:
      The bias, or None.

    Raises:
      ValueError: for biases of different rank.
    """
    given = _of_one_rank(masks)
    return functools.reduce(operator.add, given) if given else None


def _of_one_rank(masks: Sequence[Array | None]) -> list[Array]:
    given = [m for m in masks if m is not None]
    if len({m.ndim for m in given}) > 1:
        raise ValueError(f"Masks must have the same rank; got shapes {[m.shape for m in given]}.")
    return given


def make_decoder_mask(
    decoder_target_tokens: Array,
    dtype: DType,
    decoder_causal_attention: Array | None = None,
    decoder_segment_ids: Array | None = None,
) -> Array:
    """The decoder's self-attention mask: causal, no padding, within one packed example.

    Args:
      decoder_target_tokens: `[batch, length]`, 0 where padding.
      dtype: of the mask.
      decoder_causal_attention: `[batch, length]`, 1 on the positions (the inputs of a prefix
        language model) that see each other in both directions.
      decoder_segment_ids: `[batch, length]`, the number of the packed example, 0 where padding.

    Returns:
      `[batch, 1, length, length]`.

    Example:
      >>> import jax.numpy as jnp
      >>> mask = make_decoder_mask(jnp.array([[6, 7, 3, 0]]), jnp.float32,
      ...                          decoder_causal_attention=jnp.array([[1, 1, 0, 0]]))
      >>> mask[0, 0].astype(int).tolist()
      [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    """
    order = make_causal_mask(decoder_target_tokens, dtype=dtype)
    if decoder_causal_attention is not None:
        inputs = decoder_causal_attention
        both = make_attention_mask(inputs, inputs, jnp.logical_and, dtype=dtype)
        order = jnp.maximum(order, both)
    real = decoder_target_tokens > 0
    packing = None
    if decoder_segment_ids is not None:
        packing = make_attention_mask(decoder_segment_ids, decoder_segment_ids, jnp.equal)
    return combine_masks(order, make_attention_mask(real, real), packing, dtype=dtype)
