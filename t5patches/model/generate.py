"""Greedy decoding and sampling from any language model, batched, cached, compiled once per shape.

One row of a batch is one prompt with any number of *streams*: outputs decoded side by side that
share the prompt. What the model keeps of the prompt, and of the tokens that all streams of a prompt
are forced to begin with, is computed and held once per prompt, not per stream; that is what makes
tens of thousands of forced-prefix rollouts affordable.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from t5patches.model.batches import by_length, row_lengths
from t5patches.model.memory import beside
from t5patches.model.protocol import Array, LanguageModel, ModelConfig, Params, require_positions


def generate(
    model: LanguageModel,
    params: Params,
    prompts: np.ndarray,
    *,
    max_length: int,
    prefixes: np.ndarray | None = None,
    temperature: float = 0.0,
    greedy_first: bool = False,
    rng: Array | None = None,
    batch_size: int = 256,
    numbers: np.ndarray | None = None,
    beyond_prefix: int | None = None,
) -> np.ndarray:
    r"""Decodes one or several outputs for each prompt.

    At each position the likeliest token is taken, or with a temperature :math:`\tau` one is drawn
    from :math:`\mathrm{softmax}(z / \tau)`. A row that has produced one of the
    model's end tokens is padded from there on; a batch ends when all its rows have. A sampled row
    depends on `rng` and its own number, not on the batch it falls in.

    Args:
      model: the network.
      params: its parameters.
      prompts: integer `[inputs, input_length]`, the model's `pad_id` after their end.
      max_length: tokens of every output, a forced prefix and the end token included.
      prefixes: tokens that the outputs are forced to begin with, `pad_id` after their end: integer
        `[inputs, length]` for one output per prompt, `[inputs, streams, length]` for several.
        Length 0 forces nothing: `np.zeros((n, 4, 0), int)` asks for 4 outputs per prompt.
      temperature: 0 for greedy.
      greedy_first: whether the first output of each prompt is greedy at any temperature. The others
        are drawn as if it were not there: one reading of a prompt gives what two calls give.
      rng: `jax.random.key`, needed where the temperature is not 0.
      batch_size: outputs decoded at a time. Prompts go together by length, see
        `t5patches.model.batches`; each shape of a batch compiles once.
      numbers: `[inputs]`, which number of a longer list each prompt is: a sampled row is then the
        one that the whole list would give. Default: 0, 1, 2 and so on.
      beyond_prefix: tokens that an output may have behind a forced prefix; default, as many as
        `max_length` leaves.

    Returns:
      int32 `[inputs, max_length]`, or `[inputs, streams, max_length]` for prefixes of that form:
      prefix, continuation, the end token where it came in time, padding.

    Raises:
      ValueError: for shapes that do not fit, prefixes longer than `max_length`, ids outside the
        vocabulary, more tokens than the model has positions for, a temperature that is below 0,
        infinite or no number, or one above 0 without `rng`.
      TypeError: for tokens that are not integers.

    Example:
      >>> import jax, numpy as np
      >>> from t5patches.model.t5.model import small_t5
      >>> model = small_t5(vocab_size=8, width=4, layers=1)
      >>> outputs = generate(model, model.init(jax.random.key(0)), np.array([[5, 6, 1], [7, 1, 0]]),
      ...                    max_length=4, prefixes=np.array([[3, 2], [4, 0]]), batch_size=2)
      >>> outputs.shape, outputs[0, :2].tolist(), int(outputs[1, 0])
      ((2, 4), [3, 2], 4)
    """
    plan = _Plan(model, max_length, temperature > 0, greedy_first)
    tokens = _check_tokens("prompts", prompts, 2, model.config)
    forced, lengths = _check_prefixes(prefixes, len(tokens), plan)
    require_temperature(temperature)
    if temperature > 0 and rng is None:
        raise ValueError(f"temperature is {temperature}: above 0 needs rng=jax.random.key(seed).")
    beyond = max_length if beyond_prefix is None else beyond_prefix
    if min(batch_size, max_length, beyond) < 1:
        raise ValueError(
            f"batch_size ({batch_size}), max_length ({max_length}) and beyond_prefix ({beyond}) "
            "are at least 1."
        )
    inputs, streams = forced.shape[:2]
    params = jax.tree.map(jnp.asarray, params)
    rng = jax.random.key(0) if rng is None else rng
    numbers = np.arange(inputs) if numbers is None else np.asarray(numbers)
    out = np.full((inputs, streams, max_length), model.config.pad_id, np.int32)
    # Prompts of like length whose streams part at about the same place go together, so that few
    # streams wait for others to leave their prefix.
    common = _common_length(forced, lengths)
    ends = np.minimum(lengths + beyond, max_length).astype(np.int32)
    sizes = row_lengths(tokens, model.config.pad_id)
    require_positions(model.config, sizes, max_length)
    width, at_a_time = tokens.shape[1], max(1, batch_size // streams)
    for group in by_length(sizes, at_a_time, longest=width, then=common):
        rows = group.filled
        shared = np.int32(common[rows].min())
        part = tokens[rows, : group.length]
        batch = _Batch(part, forced[rows], lengths[rows], ends[rows], shared, numbers[rows])
        # Waited for here: a signal that comes while NumPy reads becomes an error of its own.
        decoded = jax.block_until_ready(_decode(plan, params, batch, temperature, rng))
        out[group.rows] = decoded[: len(group.rows)]
    return out[:, 0] if prefixes is None or np.ndim(prefixes) == 2 else out


def require_temperature(temperature: float) -> None:
    """Refuses a temperature by which float32 cannot divide logits.

    Args:
      temperature: to sample with, 0 for none.

    Raises:
      ValueError: it is negative, or no number, or so small or large that all tokens become alike.
    """
    if temperature != 0 and not 1e-30 <= temperature < 1e38:
        raise ValueError(
            f"the temperature is {temperature}: 0 (greedy), or a number of 1e-30 to 1e38, is needed"
        )


class _Plan(NamedTuple):
    """What a compiled decoder is specialised to, beside shapes."""

    model: LanguageModel
    max_length: int
    sample: bool
    greedy_first: bool


class _Batch(NamedTuple):
    """`rows` prompts of `streams` streams each."""

    prompts: Any  # [rows, input_length]
    forced: Any  # [rows, streams, prefix_length]
    lengths: Any  # [rows, streams]: how much of it is forced
    ends: Any  # [rows, streams]: how many tokens an output may have
    start: Any  # how many forced tokens all streams of each prompt share
    numbers: Any  # [rows]: the prompt's number, which seeds its draws


def working_memory(
    model: LanguageModel,
    *,
    rows: int,
    input_length: int,
    max_length: int,
    streams: int = 1,
    forced: int = 0,
    sample: bool = False,
    greedy_first: bool = False,
    params: Params | None = None,
) -> int:
    """What a batch of `generate` holds beside the parameters, as the compiler has planned it.

    The program is the one that `generate` then runs: it is compiled once.

    Args:
      model: the network.
      rows: prompts in the batch.
      input_length: of the prompts.
      max_length: see `generate`.
      streams: outputs to each prompt.
      forced: length of `prefixes`.
      sample: whether there is a temperature.
      greedy_first: see `generate`.
      params: shapes of the parameters and where they lie, for programs on parameters with an
        adapter or on a device that was chosen; default, the model's own.

    Returns:
      Bytes.
    """

    def ids(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.int32)

    batch = _Batch(
        ids(rows, input_length),
        ids(rows, streams, forced),
        ids(rows, streams),
        ids(rows, streams),
        np.int32(0),
        jax.ShapeDtypeStruct((rows,), jax.dtypes.canonicalize_dtype(np.int64)),
    )
    plan = _Plan(model, max_length, sample, greedy_first)
    params = params or model.param_shapes()
    program = _decode.lower(plan, params, batch, 0.0, jax.random.key(0)).compile()
    return beside(params, program)


def _check_tokens(name: str, tokens: Any, rank: int, config: ModelConfig) -> np.ndarray:
    tokens = np.asarray(tokens)
    if not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(f"{name} must hold integer ids; got {tokens.dtype}. Cast them.")
    if tokens.ndim != rank:
        raise ValueError(f"{name} must have {rank} dimensions; got shape {tokens.shape}.")
    ids = tokens[tokens != config.pad_id]
    if ids.size and not 0 <= ids.min() <= ids.max() < config.vocab_size:
        raise ValueError(
            f"{name} holds ids from {ids.min()} to {ids.max()}; the model has 0 to "
            f"{config.vocab_size - 1}. Is this the model's own tokenizer?"
        )
    return tokens.astype(np.int32)


def _check_prefixes(prefixes: Any, inputs: int, plan: _Plan) -> tuple[np.ndarray, np.ndarray]:
    """The prefixes as `[inputs, streams, length]`, nothing after their end, and their lengths."""
    if prefixes is None:
        prefixes = np.zeros((inputs, 0), np.int32)
    rank = 3 if np.ndim(prefixes) == 3 else 2
    forced = _check_tokens("prefixes", prefixes, rank, plan.model.config)
    if len(forced) != inputs or (rank == 3 and forced.shape[1] == 0):
        raise ValueError(
            f"prefixes of shape {forced.shape} for {inputs} inputs: must be [{inputs}, length] or "
            f"[{inputs}, streams, length] with at least one stream."
        )
    forced = forced if rank == 3 else forced[:, None]
    pad_id, end = plan.model.config.pad_id, np.isin(forced, plan.model.config.end_ids)
    forced = np.where(np.cumsum(end, axis=-1) > end, pad_id, forced)
    lengths = row_lengths(forced, pad_id)
    longest = int(lengths.max(initial=0))
    if longest > plan.max_length:
        raise ValueError(
            f"A prefix has {longest} tokens and max_length, which counts them, is "
            f"{plan.max_length}: raise max_length or shorten the prefix."
        )
    return forced[..., : plan.max_length].astype(np.int32), lengths


def _common_length(forced: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """How many tokens all streams of an input are forced to share, `[inputs]`."""
    differs = np.any(forced != forced[:, :1], axis=1)
    first = np.argmax(np.pad(differs, ((0, 0), (0, 1)), constant_values=True), axis=-1)
    return np.minimum(first, lengths.min(axis=1))


@functools.partial(jax.jit, static_argnums=0)
def _decode(plan: _Plan, params: Any, batch: _Batch, temperature: Array, rng: Array) -> Array:
    """The tokens of a batch, `[rows, streams, max_length]`."""
    model, max_length = plan.model, plan.max_length
    pad_id, end_ids = model.config.pad_id, jnp.array(model.config.end_ids, jnp.int32)
    rows, streams, forced = batch.forced.shape
    cache = model.prefill(
        params,
        batch.prompts,
        batch.forced[:, 0],
        batch.start,
        streams=streams,
        max_length=max_length,
    )
    # What each stream is given: the token before its output, then what was forced and decoded.
    given = jnp.full((rows, streams, max_length + 1), pad_id, jnp.int32)
    given = given.at[..., 0].set(model.first_inputs(batch.prompts)[:, None])
    given = given.at[..., 1 : forced + 1].set(batch.forced)
    taken = (jnp.arange(forced) < batch.start)[None, None]
    done = jnp.any(jnp.isin(batch.forced, end_ids) & taken, axis=-1)
    greedy = int(plan.greedy_first) if plan.sample else streams
    drawn = streams - greedy
    number = batch.numbers[:, None] * drawn + jnp.arange(drawn)[None]
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (None, 0))(rng, number)

    def unfinished(state: tuple) -> Array:
        t, _, done, _ = state
        return (t < max_length) & ~jnp.all(done)

    def step(state: tuple) -> tuple:
        t, given, done, cache = state
        tokens = lax.dynamic_index_in_dim(given, t, axis=-1, keepdims=False)
        logits, cache = model.decode(params, cache, tokens)
        draws = _sample(keys, t, logits[:, greedy:] / temperature)
        chosen = jnp.concatenate([_likeliest(logits[:, :greedy]), draws], axis=1)
        forced = lax.dynamic_index_in_dim(given, t + 1, axis=-1, keepdims=False)
        chosen = jnp.where(t < batch.lengths, forced, chosen)
        chosen = jnp.where(done, pad_id, chosen)
        given = lax.dynamic_update_index_in_dim(given, chosen, t + 1, axis=-1)
        done |= jnp.isin(chosen, end_ids) | (t + 1 >= batch.ends)
        return t + 1, given, done, cache

    _, given, _, _ = lax.while_loop(unfinished, step, (batch.start, given, done, cache))
    return given[..., 1:]


def _likeliest(logits: Array) -> Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _sample(keys: Array, t: Array, logits: Array) -> Array:
    def draw(key: Array, row: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(key, t), row).astype(jnp.int32)

    return jax.vmap(jax.vmap(draw))(keys, logits)
