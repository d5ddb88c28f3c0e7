"""What goes into the TPU kernel and comes out: scalars, row statistics, block specifications."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from t5patches_kernels.backends.pallas_tpu.plan import LANES, Call
from t5patches_kernels.core.operation import Tokens
from t5patches_kernels.core.statistics import Array, Stats

NONE = 1 << 30  # no column: its group is the first, its lane in none


def within(call: Call, ids: Array) -> Array:
    """Ids ``[n, R]`` as columns of each window ``[n, tiles, R]``, `NONE` where they are not in."""
    first = jnp.arange(call.tiles, dtype=jnp.int32)[None, :, None] * call.plan.columns
    local = ids[:, None, :] - first
    here = (local >= 0) & (local < call.plan.columns) & (ids < call.columns)[:, None, :]
    return jnp.where(here, local, NONE)


def group(column: Array) -> Array:
    """Where the group of a column starts."""
    return column & (NONE - LANES)


def edit_lists(call: Call, ids: Array, log_factors: Array) -> tuple[Array, Array]:
    """The edits by window: which lists have any, their lengths, and columns; and their factors.

    The first of these is the first list that has an edit, and one after each list the next, so that
    the others take no time. A list is as long as to its last edit. It is not sorted: that would
    take XLA longer than the kernel takes to pass over places without one.

    Args:
      call: the kernel.
      ids: columns ``[n, R * K]``; those that are out of the row stand for none.
      log_factors: ``[n, R * K]``.
    """
    blocks, rows = ids.shape[0], call.plan.rows

    def padded(x: Array, fill: float) -> Array:
        x = x.reshape(blocks, rows, -1)
        pad = ((0, 0), (0, 0), (0, call.edits // rows - x.shape[2]))
        return jnp.pad(x, pad, constant_values=fill).reshape(blocks, -1)

    local = within(call, padded(ids, call.columns))
    log_factors = jnp.broadcast_to(padded(log_factors, 0.0)[:, None, :], local.shape)
    there = ((local < NONE) & (log_factors != 0.0)).reshape(blocks, call.tiles, call.lists, -1)
    place = jax.lax.broadcasted_iota(jnp.int32, there.shape, 3)
    length = jnp.max(jnp.where(there, place + 1, 0), axis=3)
    n = jax.lax.broadcasted_iota(jnp.int32, length.shape, 2)
    after = jax.lax.cummin(jnp.where(length > 0, n, call.lists), axis=2, reverse=True)
    none = jnp.full_like(after[..., :1], call.lists)
    return jnp.concatenate([after, none, length, local], axis=2), log_factors


def scalars_of(call: Call, tokens: Tokens, blocks: int) -> list[Array]:
    """What the kernel reads entry by entry ``[windows, 1, n]``: targets' groups, edits, a flag."""

    def by_block(x: Array, fill: float) -> Array:
        pad = ((0, blocks * call.plan.rows - x.shape[0]),) + ((0, 0),) * (x.ndim - 1)
        return jnp.pad(x, pad, constant_values=fill).reshape(blocks, -1)

    ids = [group(within(call, by_block(tokens.targets, call.columns)))]
    factors = []
    if call.edits and tokens.edit_ids is not None and tokens.log_factors is not None:
        found = by_block(tokens.edit_ids, call.columns), by_block(tokens.log_factors, 0.0)
        edits, log_factors = edit_lists(call, *found)
        ids.append(edits)
        factors.append(log_factors)
    elif call.edits:  # a private copy without a change
        places = 1 + 2 * call.lists + call.edits
        ids.append(jnp.full((blocks, call.tiles, places), call.lists, jnp.int32))
        factors.append(jnp.zeros((blocks, call.tiles, call.edits), jnp.float32))
    if call.branches:  # whether a block has any token pushed down
        pushed = jnp.any(by_block(tokens.weights, 0.0) < 0, axis=1).astype(jnp.int32)
        ids.append(jnp.broadcast_to(pushed[:, None, None], (blocks, call.tiles, 1)))
    arrays = [jnp.concatenate(ids, axis=2), *factors]
    return [x.reshape(blocks * call.tiles, 1, -1) for x in arrays]


def sources_of(call: Call, tokens: Tokens, blocks: int) -> Array:
    """Which block of logits is in the windows while each is worked on ``[blocks]``.

    Its own, or where all of its tokens are ignored the one that is there already: then nothing is
    fetched for it.
    """
    pad = (0, blocks * call.plan.rows - tokens.weights.shape[0])
    counts = jnp.any(jnp.pad(tokens.weights, pad).reshape(blocks, -1) != 0, axis=1)
    before = jax.lax.cummax(jnp.where(counts, jnp.arange(blocks, dtype=jnp.int32), -1))
    return jnp.where(before < 0, jnp.argmax(counts).astype(jnp.int32), before)


def lanes_of(call: Call, tokens: Tokens, stats: Stats | None, d_stats: Stats | None) -> Array:
    """What the kernel reads row by row ``[T, 128]``: a narrower array would be padded to that."""
    inside = (tokens.targets >= 0) & (tokens.targets < call.columns)
    target = jnp.where(inside, tokens.targets, -1)
    parts = divmod(target, LANES)  # float32 has not every whole number beyond 2^24
    of_rows = tokens.of_rows()
    columns = [of_rows["w"], of_rows["bad"], *(x[:, None] for x in parts)]
    columns += [of_rows[name] for name in call.numbers]
    columns += [(stats or {})[name] for name in call.given]
    columns += [(d_stats or {})[name] for name in call.d_stats]
    lanes = jnp.concatenate([x.astype(jnp.float32) for x in columns], axis=1)
    return jnp.pad(lanes, ((0, 0), (0, LANES - lanes.shape[1])))


def specs(call: Call, scalars: list[Array]) -> tuple[list[pl.BlockSpec], list[pl.BlockSpec]]:
    """The windows of inputs and outputs."""
    rows, tiles, held = call.plan.rows, call.tiles, call.plan.held

    # Where ignored tokens are skipped, `sources_of` comes in as a last argument.
    def read(at: Callable[..., Any]) -> pl.BlockSpec:
        def index(i: Any, p: Any, j: Any, *sources: Any) -> tuple[Any, Any]:
            return (sources[0][i] if sources else i), at(p, j)

        return pl.BlockSpec((rows, call.plan.columns), index)

    def write(at: Callable[..., Any]) -> pl.BlockSpec:
        return pl.BlockSpec((rows, call.plan.columns), lambda i, p, j, *_: (i, at(p, j)))

    if not call.plan.streamed:
        window = reference = read(lambda p, j: j)
        out = write(lambda p, j: j)
    else:  # where a phase has no use for a window, the one before or after stays
        last = tiles - 1
        again = lambda j: last if held >= tiles else jnp.where(j < held, last, j)  # noqa: E731
        window = read(lambda p, j: jnp.where(p == 0, 0, jnp.where(p == 1, j, again(j))))
        reference = read(lambda p, j: jnp.where(p == 0, j, last))
        out = write(lambda p, j: jnp.where(p == 2, j, 0))
    lanes = pl.BlockSpec((rows, LANES), lambda i, p, j, *_: (i, 0))
    stats = pl.BlockSpec((1, rows, LANES), lambda i, p, j, *_: (0 if call.phases > 1 else j, i, 0))

    def entries(x: Array) -> pl.BlockSpec:
        at = lambda i, p, j, *_: (i * tiles + j, 0, 0)  # noqa: E731
        return pl.BlockSpec((1, *x.shape[1:]), at, memory_space=pltpu.SMEM)

    logits = [window] + [reference] * (call.reference == "given")
    outputs = [stats] * bool(call.returned) + [out] * call.makes_gradient
    return [*map(entries, scalars), lanes, *logits], outputs


def cost(call: Call, operands: list[Array], rows: int) -> pl.CostEstimate:
    """What XLA's scheduler and profiles are told."""
    entries = rows * call.columns
    pair = 2 if call.reference else 1
    passes = call.has_first_pass + call.has_second_pass + call.makes_gradient
    moved = sum(x.size * x.dtype.itemsize for x in operands)
    moved += entries * operands[-1].dtype.itemsize * call.makes_gradient
    moved += round(entries * call.again) * operands[-1].dtype.itemsize
    return pl.CostEstimate(
        flops=entries * 6 * pair * passes,
        transcendentals=entries * (pair + call.has_second_pass),
        bytes_accessed=moved,
    )
