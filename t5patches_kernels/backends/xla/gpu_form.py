"""Streaming XLA for GPUs: reductions and one gradient loop over whole ``[T, V]`` arrays.

One reduction that carries the maxima along (`statistics.merge`) takes all sums of a pass: 5 passes
over ``[T, V]`` arrays for value and gradient where one is enough (two to read both models' logits,
two to read them again, one to write), 6 where the reference's normaliser must be known first.
Holds nothing else of that size.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp

from t5patches_kernels.backends.xla.driver import target_logit
from t5patches_kernels.core import objectives, statistics
from t5patches_kernels.core.operation import Operands, Operation, Result, Stage, Tokens
from t5patches_kernels.core.statistics import Array, Stats, Tile

# The longest row that XLA reduces in one step. A longer one it cuts into many short parts, each of
# which pays for merges between threads (seen in the optimised HLO; not yet timed on hardware).
_PART = 16384


def _read(op: Operation, operands: Operands, tokens: Tokens) -> tuple[Array, Array | None]:
    """Both rows in float32, the reference's edits applied; all of it fuses into what reads them.

    An edit is a compare per entry: patching a ``[T, V]`` array would copy it. An ignored row that
    need not be read is the first row again, which the card's cache has.
    """
    if op.skip_ignored:
        row = jnp.where(tokens.weights != 0, jnp.arange(len(tokens.weights)), 0)
        operands = jax.tree.map(lambda x: x.at[row].get(mode="promise_in_bounds"), operands)
    z = operands.model[0].astype(jnp.float32)
    of = objectives.reference_of(op.settings)
    if of is None:
        return z, None
    r = z if of == "self" else operands.reference[0].astype(jnp.float32)
    if tokens.edit_ids is not None and tokens.log_factors is not None:
        column = jax.lax.broadcasted_iota(jnp.int32, r.shape, 1)
        for k in range(tokens.edit_ids.shape[1]):
            edited = column == tokens.edit_ids[:, k : k + 1]
            r = r + jnp.where(edited, tokens.log_factors[:, k : k + 1], 0.0)
    return z, r


def _reduce(entries: Stats) -> Stats:
    """The statistics of whole rows ``[T, 1]`` from those of their entries ``[T, V]``."""
    least = dict.fromkeys(statistics.MAXIMA, statistics.FLOOR)
    start = {name: jnp.asarray(least.get(name, 0.0), x.dtype) for name, x in entries.items()}
    rows, columns = next(iter(entries.values())).shape
    parts = parts_of(columns)
    split = (rows, parts, columns // parts)
    total = {name: jnp.reshape(x, split) for name, x in entries.items()}
    for axis in (2, 1):
        total = jax.lax.reduce(total, start, statistics.merge, (axis,))
    return {name: x[:, None] for name, x in total.items()}


def parts_of(columns: int) -> int:
    """Into how many equal parts a row is cut so that a thread block can reduce each."""
    least = -(-columns // _PART)
    return next((n for n in range(least, 4 * least) if columns % n == 0), 1)


def _entries(
    z: Array | None, r: Array | None, names: Iterable[str], known: Stats, smoothing: float
) -> Stats:
    """The statistics of each entry by itself ``[T, V]``, each sum's apart from the others'.

    What several sums have in common, XLA would store, on one card or another. Of copies of what is
    known it cannot tell that they are equal, and computes each sum's entries afresh.
    """
    floor = jnp.float32(statistics.FLOOR)
    entries: Stats = {}
    for name in sorted(names):
        known, floor = jax.lax.optimization_barrier((known, floor))
        entries |= statistics.entries(z, r, frozenset({name}), known, smoothing, floor)
    return entries


def _sums(op: Operation, operands: Operands, tokens: Tokens, stage: Stage) -> Stats:
    """The sums of whole rows, with those that the second pass's statistics are made from."""
    c = op.settings
    z, r = _read(op, operands, tokens)
    names = objectives.needs(c)
    if stage is Stage.FIRST_PASS or not objectives.needs_second_pass(c):
        return _reduce(_entries(z, r, names - statistics.SECOND_PASS.keys(), {}, 0.0))
    alone = names & frozenset(statistics.OF_REFERENCE)
    of_reference = _reduce(_entries(None, r, alone, {}, 0.0))
    z, r, of_reference = _next_pass(op, operands, tokens, of_reference)
    made_from = {statistics.SECOND_PASS.get(name, name) for name in names - alone}
    sums = statistics.with_normalisers(frozenset(made_from))
    known = objectives.finish_reference(of_reference)
    return _reduce(_entries(z, r, sums, known, c.smoothing)) | of_reference


def _next_pass(op, operands, tokens, stats):
    """The rows read anew once `stats` are known: else XLA keeps what it computed from them."""
    operands, tokens, stats = jax.lax.optimization_barrier((operands, tokens, stats))
    return *_read(op, operands, tokens), stats


@partial(jax.jit, static_argnums=(0, 1))
def run(
    op: Operation,
    stage: Stage,
    operands: Operands,
    tokens: Tokens,
    stats: Stats | None = None,
    d_stats: Stats | None = None,
) -> Result:
    """The driver (`operation.Driver`)."""
    c = op.settings
    if stage is Stage.SECOND_PASS and stats is not None:
        z, r = _read(op, operands, tokens)
        names = objectives.needs(c)
        return Result(statistics.second_pass(Tile(z, r, stats, c.smoothing), names))

    if stage is not Stage.GRADIENT:
        stats = _sums(op, operands, tokens, stage)
        stats["zy"] = target_logit(operands.model[0], tokens.targets)
        if "rm" in stats:
            stats["ry"] = target_logit((operands.reference or operands.model)[0], tokens.targets)
        if stage is Stage.FIRST_PASS:
            return Result(stats)
        stats = objectives.finish(stats, tokens.of_rows())
        if stage is Stage.STATISTICS:
            return Result(stats)
        d_stats = objectives.derivatives(stats, c, {"loss": jnp.ones_like(stats["m"])})

    z, r, (stats, d_stats) = _next_pass(op, operands, tokens, (stats, d_stats))
    is_target = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1) == tokens.targets[:, None]
    tile = Tile(z, r, stats, c.smoothing)
    dz = statistics.gradient(tile, statistics.coefficients(stats, d_stats), is_target)
    return Result(stats, (dz.astype(operands.model[0].dtype),))
