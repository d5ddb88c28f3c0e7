"""Greedy decoding and sampling from `t5patches.network`, batched, cached, compiled once per shape.

One row of a batch is one input with any number of *streams*: sequences decoded side by side that
share the input. The encoder output, its projections to keys and values, and the tokens that all
streams of an input are forced to begin with are computed and held once per input, not per stream;
that is what makes tens of thousands of forced-prefix rollouts affordable.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax

from t5patches.model.t5.layers import Array
from t5patches.model.t5.network import T5Config, Transformer

# T5 has no token for "begin": the decoder's first input is the padding id.
_BEGIN_ID = 0


def generate(
    config: T5Config,
    params: Mapping[str, Any],
    encoder_tokens: np.ndarray,
    *,
    max_length: int,
    prefixes: np.ndarray | None = None,
    temperature: float = 0.0,
    rng: Array | None = None,
    eos_id: int = 1,
    pad_id: int = 0,
    batch_size: int = 256,
    first: int = 0,
) -> np.ndarray:
    r"""Decodes one or several outputs for each input.

    At each position the likeliest token is taken, or with a temperature :math:`\tau` one is drawn
    from :math:`\mathrm{softmax}(z / \tau)`. A row that has produced `eos_id` is padded from there
    on; a batch ends when all its rows have. A sampled row depends on `rng` and its own index, not
    on the batch it falls in.

    Args:
      config: of the model.
      params: its parameters, the tree under `'params'`.
      encoder_tokens: integer `[inputs, input_length]`, 0 where padding.
      max_length: tokens of every output, a forced prefix and the end token included.
      prefixes: tokens that the outputs are forced to begin with, `pad_id` after their end: integer
        `[inputs, length]` for one output per input, `[inputs, streams, length]` for several.
        Length 0 forces nothing: `np.zeros((n, 4, 0), int)` asks for 4 outputs per input.
      temperature: 0 for greedy.
      rng: `jax.random.key`, needed where the temperature is not 0.
      eos_id: the token that ends an output.
      pad_id: the token put after the end.
      batch_size: outputs decoded at a time. Each combination of `batch_size`, input length, prefix
        shape and `max_length` compiles once; a last batch is filled up, not compiled again.
      first: number of the first input, where these are some of a longer list: a sampled row is then
        the one that the whole list would give.

    Returns:
      int32 `[inputs, max_length]`, or `[inputs, streams, max_length]` for prefixes of that form:
      prefix, continuation, `eos_id` where it came in time, padding.

    Raises:
      ValueError: for shapes that do not fit, prefixes longer than `max_length`, ids outside the
        vocabulary, a temperature below 0 or one above 0 without `rng`.
      TypeError: for tokens that are not integers.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from t5patches.model.t5.network import T5Config, Transformer
      >>> config = T5Config(vocab_size=8, emb_dim=4, num_heads=1, head_dim=4, mlp_dim=4,
      ...                   num_encoder_layers=1, num_decoder_layers=1)
      >>> ids = jnp.ones((1, 3), jnp.int32)
      >>> variables = Transformer(config).init(jax.random.key(0), ids, ids, ids,
      ...                                      enable_dropout=False)
      >>> outputs = generate(config, variables['params'], np.array([[5, 6, 1], [7, 1, 0]]),
      ...                    max_length=4, prefixes=np.array([[3, 2], [4, 0]]), batch_size=2)
      >>> outputs.shape, outputs[0, :2].tolist(), int(outputs[1, 0])
      ((2, 4), [3, 2], 4)
    """
    # A list, as a config file may give, has no hash, and the compiled decoder is looked up by it.
    config = dataclasses.replace(config, mlp_activations=tuple(config.mlp_activations))
    plan = _Plan(config, max_length, temperature > 0, eos_id, pad_id)
    tokens = _check_tokens("encoder_tokens", encoder_tokens, 2, config)
    forced, lengths = _check_prefixes(prefixes, len(tokens), plan)
    if temperature < 0 or (temperature > 0 and rng is None):
        raise ValueError(
            f"temperature is {temperature} and rng {rng}: a temperature is 0 (greedy) or above, "
            "and above 0 needs rng=jax.random.key(seed)."
        )
    if batch_size < 1 or max_length < 1:
        raise ValueError(f"batch_size ({batch_size}) and max_length ({max_length}) are at least 1.")
    inputs, streams = forced.shape[:2]
    params = jax.tree.map(jnp.asarray, params)
    rng = jax.random.key(0) if rng is None else rng
    out = np.zeros((inputs, streams, max_length), np.int32)
    # Inputs whose streams part at about the same place go together, so that few streams wait for
    # others to leave their prefix.
    common = _common_length(forced, lengths)
    order = np.argsort(common, kind="stable")
    rows = max(1, batch_size // streams)
    for start in range(0, inputs, rows):
        real = order[start : start + rows]
        index = np.resize(real, rows)
        shared = np.int32(common[index].min())
        batch = _Batch(tokens[index], forced[index], lengths[index], shared, first + index)
        out[real] = _decode(plan, params, batch, temperature, rng)[: len(real)]
    return out[:, 0] if prefixes is None or np.ndim(prefixes) == 2 else out


class _Plan(NamedTuple):
    """What a compiled decoder is specialised to, beside shapes."""

    config: T5Config
    max_length: int
    sample: bool
    eos_id: int
    pad_id: int


class _Batch(NamedTuple):
    """`rows` inputs of `streams` streams each."""

    tokens: Any  # [rows, input_length]
    forced: Any  # [rows, streams, prefix_length]
    lengths: Any  # [rows, streams]: how much of it is forced
    start: Any  # how many forced tokens all streams of each input share
    index: Any  # [rows]: the input's number, which seeds its draws


def _check_tokens(name: str, tokens: Any, rank: int, config: T5Config) -> np.ndarray:
    tokens = np.asarray(tokens)
    if not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(f"{name} must hold integer ids; got {tokens.dtype}. Cast them.")
    if tokens.ndim != rank:
        raise ValueError(f"{name} must have {rank} dimensions; got shape {tokens.shape}.")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
        raise ValueError(
            f"{name} holds ids from {tokens.min()} to {tokens.max()}; the model has 0 to "
            f"{config.vocab_size - 1}. Is this the model's own tokenizer?"
        )
    return tokens.astype(np.int32)


def _check_prefixes(prefixes: Any, inputs: int, plan: _Plan) -> tuple[np.ndarray, np.ndarray]:
    """The prefixes as `[inputs, streams, length]`, nothing after their end, and their lengths."""
    if prefixes is None:
        prefixes = np.zeros((inputs, 0), np.int32)
    rank = 3 if np.ndim(prefixes) == 3 else 2
    forced = _check_tokens("prefixes", prefixes, rank, plan.config)
    if len(forced) != inputs or (rank == 3 and forced.shape[1] == 0):
        raise ValueError(
            f"prefixes of shape {forced.shape} for {inputs} inputs: must be [{inputs}, length] or "
            f"[{inputs}, streams, length] with at least one stream."
        )
    forced = forced if rank == 3 else forced[:, None]
    end = forced == plan.eos_id
    forced = np.where(np.cumsum(end, axis=-1) > end, plan.pad_id, forced)
    position = np.arange(1, forced.shape[-1] + 1)
    lengths = np.max(np.where(forced == plan.pad_id, 0, position), axis=-1, initial=0)
    longest = int(lengths.max(initial=0))
    if longest > plan.max_length:
        raise ValueError(
            f"A prefix has {longest} tokens and max_length, which counts them, is "
            f"{plan.max_length}: raise max_length or shorten the prefix."
        )
    return forced[..., : plan.max_length].astype(np.int32), lengths.astype(np.int32)


def _common_length(forced: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """How many tokens all streams of an input are forced to share, `[inputs]`."""
    differs = np.any(forced != forced[:, :1], axis=1)
    first = np.argmax(np.pad(differs, ((0, 0), (0, 1)), constant_values=True), axis=-1)
    return np.minimum(first, lengths.min(axis=1))


@functools.partial(jax.jit, static_argnums=0)
def _decode(plan: _Plan, params: Any, batch: _Batch, temperature: Array, rng: Array) -> Array:
    """The tokens of a batch, `[rows, streams, max_length]`."""
    module = Transformer(plan.config)
    encoded: Any = module.apply(
        {"params": params}, batch.tokens, enable_dropout=False, method="encode"
    )
    held, cache = _prefill(module, params, encoded, batch, plan.max_length)
    rows, streams, forced = batch.forced.shape
    # What each stream was told or has said, after the token that the decoder begins with.
    said = jnp.full((rows, streams, plan.max_length + 1), plan.pad_id, jnp.int32)
    said = said.at[..., 0].set(_BEGIN_ID).at[..., 1 : forced + 1].set(batch.forced)
    told = (jnp.arange(forced) < batch.start)[None, None]
    done = jnp.any((batch.forced == plan.eos_id) & told, axis=-1)
    stream = batch.index[:, None] * streams + jnp.arange(streams)[None]
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (None, 0))(rng, stream)

    def unfinished(state: tuple) -> Array:
        t, _, done, _ = state
        return (t < plan.max_length) & ~jnp.all(done)

    def step(state: tuple) -> tuple:
        t, said, done, cache = state
        token = lax.dynamic_index_in_dim(said, t, axis=-1, keepdims=False)
        logits, changed = module.apply(
            held | {"cache": cache},
            encoded,
            batch.tokens,
            token,
            token,
            enable_dropout=False,
            decode=True,
            max_decode_length=plan.max_length,
            method="decode",
            mutable=["cache"],
        )
        chosen = _sample(keys, t, logits / temperature) if plan.sample else _likeliest(logits)
        told = lax.dynamic_index_in_dim(said, t + 1, axis=-1, keepdims=False)
        chosen = jnp.where(t < batch.lengths, told, chosen)
        chosen = jnp.where(done, plan.pad_id, chosen)
        said = lax.dynamic_update_index_in_dim(said, chosen, t + 1, axis=-1)
        return t + 1, said, done | (chosen == plan.eos_id), changed["cache"]

    _, said, _, _ = lax.while_loop(unfinished, step, (batch.start, said, done, cache))
    return said[..., 1:]


def _likeliest(logits: Array) -> Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _sample(keys: Array, t: Array, logits: Array) -> Array:
    def draw(key: Array, row: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(key, t), row).astype(jnp.int32)

    return jax.vmap(jax.vmap(draw))(keys, logits)


def _prefill(
    module: Transformer, params: Any, encoded: Array, batch: _Batch, max_length: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One pass over the forced tokens that the streams share.

    Returns:
      The variables that stay (parameters, keys and values of the encoder outputs) and the cache,
      which stands at `batch.start`; what lies beyond in it will be overwritten before it is read.
    """
    rows, streams, _ = batch.forced.shape
    begin = jnp.full((rows, 1), _BEGIN_ID, jnp.int32)
    tokens = jnp.concatenate([begin, batch.forced[:, 0, :-1]], axis=1)
    _, captured = module.apply(
        {"params": params},
        encoded,
        batch.tokens,
        tokens,
        jnp.ones_like(tokens),
        enable_dropout=False,
        return_hidden=True,
        method="decode",
        capture_intermediates=lambda module, _: module.name in ("key", "value"),
        mutable=["intermediates"],
    )
    projected, cache = {}, {}
    flat = traverse_util.flatten_dict(captured["intermediates"])
    for (*layer, attention, name, _), (x,) in flat.items():
        x = jnp.moveaxis(x, -3, -1)  # to the layout of the cache
        if attention == "encoder_decoder_attention":
            projected[(*layer, attention, name)] = x
            continue
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, max_length - x.shape[-1])])
        cache[(*layer, attention, f"cached_{name}")] = jnp.repeat(x, streams, axis=0)
        cache[(*layer, attention, "cache_index")] = batch.start
    held = {"params": params, "projected": traverse_util.unflatten_dict(projected)}
    return held, traverse_util.unflatten_dict(cache)
