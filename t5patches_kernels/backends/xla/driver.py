"""Streaming XLA: a loop over blocks of whole rows, each block small enough for the cache.

Runs wherever XLA does. Beyond inputs and outputs it holds a few blocks. XLA fuses a block's body
into a handful of loops and splits each over the host's threads.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5patches_kernels.backends import tiling
from t5patches_kernels.core import objectives, statistics
from t5patches_kernels.core.operation import Operands, Operation, Result, Stage, Tokens
from t5patches_kernels.core.statistics import Array, Functions, Stats, Tile

# A float32 block of one logits array. Measured on a 2-core Zen 5 with 1 MiB of L2 a core
# (`make bench`): 2 MiB are 4% faster than 1, as a block's dozen of forks and joins weighs less, and
# more holds more; below 4 rows XLA no longer splits a block over cores.
_BLOCK_BYTES = 1 << 21
_LEAST_ROWS = 4


def block_rows(columns: int) -> int:
    """Rows a block."""
    return max(_LEAST_ROWS, _BLOCK_BYTES // (4 * columns))


def target_logit(x: Array, targets: Array) -> Array:
    """The target's logit ``[R, 1]`` in float32, 0 where the target is not among the columns."""
    columns = x.shape[-1]
    own = jnp.take_along_axis(x, jnp.minimum(targets, columns - 1)[:, None], axis=-1)
    return jnp.where((targets < columns)[:, None], own.astype(jnp.float32), 0.0)


class Form(NamedTuple):
    """What differs from platform to platform."""

    functions: Functions
    # Whether a reference in float32 is edited, and maxima are taken, before the loop: on a
    # CPU 5 to 10% less time, as no block is cut out for them; on a TPU a scatter stores such an
    # array again.
    whole: bool


class _Rows(NamedTuple):
    """What a stage reads, whole or a block of it; by name, "z" the model's, "r" the reference's.

    The gradient is written over one of the arrays: where nobody reads that any more, as in a
    training step, a gradient needs no memory of its own, and else no zeros are written first.
    """

    logits: dict[str, Array]
    tokens: Tokens  # with the edits that are still to be made
    stats: Stats  # what is known: finished, or maxima and targets' logits taken on whole arrays
    d_stats: Stats | None


def _edited(reference: Array, tokens: Tokens) -> Array:
    if tokens.edit_ids is None:
        return reference
    rows = jnp.arange(reference.shape[0])[:, None]
    return reference.at[rows, tokens.edit_ids].add(tokens.log_factors, mode="drop")


def _rows(whole: bool, stage: Stage, rows: _Rows) -> tuple[_Rows, dict[str, Array]]:
    """What a stage reads, and of it the array that the gradient is written over."""
    logits, tokens, stats = dict(rows.logits), rows.tokens, dict(rows.stats)
    if stage not in (Stage.VALUE_AND_GRAD, Stage.GRADIENT):
        return rows, {}
    name = "r" if "r" in logits and logits["r"].dtype == logits["z"].dtype else "z"
    donated = {name: logits.pop(name)}
    if whole and name == "r" and donated["r"].dtype == jnp.float32:  # which edits are
        donated["r"] = _edited(donated["r"], tokens)
        tokens = tokens._replace(edit_ids=None, log_factors=None)
    if whole and stage is Stage.VALUE_AND_GRAD:
        for of, x in (logits | donated).items():
            if x.dtype == jnp.float32 and (of == "z" or tokens.edit_ids is None):
                stats[statistics.MAXIMUM[of]] = statistics.row_max(x)
    return _Rows(logits, tokens, stats, rows.d_stats), donated


def _block(functions: Functions, op: Operation, stage: Stage, rows: _Rows) -> Result:
    """One stage on whole rows ``[R, V]``."""
    c = op.settings
    tokens, stats, d_stats = rows.tokens, rows.stats, rows.d_stats
    z = rows.logits["z"].astype(jnp.float32)
    r = _edited(rows.logits["r"].astype(jnp.float32), tokens) if "r" in rows.logits else None
    names = objectives.needs(c)

    if "s" not in stats:
        stats = stats | statistics.first_pass(z, r, names, functions, stats)
        if stage is Stage.FIRST_PASS:
            return Result(stats)
        stats = objectives.finish(stats, tokens.of_rows())

    def tile(row: Stats) -> Tile:
        return Tile(z, r, row, c.smoothing, functions=functions)

    if objectives.needs_second_pass(c) and stage is not Stage.GRADIENT:
        more = statistics.second_pass(tile(stats), names)
        if stage is Stage.SECOND_PASS:
            return Result(more)
        stats = stats | more
    if stage is Stage.STATISTICS:
        return Result(stats)

    if d_stats is None:
        d_stats = objectives.derivatives(stats, c, {"loss": jnp.ones_like(stats["m"])})
        # Where the loss is no number, neither is the gradient. So this waits for every sum, and
        # XLA need not fear that one may read logits whose place the gradient has taken: it would
        # copy the whole array for every block.
        loss = objectives.evaluate(stats, c, "loss")
        d_stats = {name: jnp.where(jnp.isnan(loss), loss, x) for name, x in d_stats.items()}
    is_target = jnp.arange(z.shape[-1], dtype=jnp.int32)[None, :] == tokens.targets[:, None]
    dz = statistics.gradient(
        tile(stats), statistics.coefficients(stats, d_stats, functions), is_target
    )
    return Result(stats, (dz,))


@partial(jax.jit, static_argnums=(0, 1, 2))
def run(
    form: Form,
    op: Operation,
    stage: Stage,
    operands: Operands,
    tokens: Tokens,
    stats: Stats | None = None,
    d_stats: Stats | None = None,
) -> Result:
    """The driver (`operation.Driver`), in the form of a platform."""
    (z,) = operands.model
    of = objectives.reference_of(op.settings)
    logits = {"z": z}
    if of is not None:
        logits["r"] = z if of == "self" else operands.reference[0]
    if stats is None:
        own = {"z": "zy", "r": "ry"}
        stats = {own[name]: target_logit(x, tokens.targets) for name, x in logits.items()}

    rows, columns = z.shape
    given = _Rows(logits, tokens, stats, d_stats)
    if op.skip_ignored:  # zeros are the gradient of rows that are skipped: written first

        def of_some(block: _Rows, donated, fresh, total):
            out = _block(form.functions, op, stage, block)
            gradient = jax.tree.map(lambda x: x.astype(z.dtype), out.gradient)
            return Result(out.stats, gradient), donated, total

        return tiling.for_row_blocks(
            of_some, given, rows, block_rows(columns), counts=tokens.weights != 0
        )[0]

    def body(block: _Rows, donated, fresh, total):
        del fresh  # nothing is summed over rows
        out = _block(form.functions, op, stage, block._replace(logits=block.logits | donated))
        gradient = zip(donated.items(), out.gradient or (), strict=True)
        return out.stats, {name: dz.astype(x.dtype) for (name, x), dz in gradient}, total

    inputs, donated = _rows(form.whole, stage, given)
    out, dz, _ = tiling.for_row_blocks(body, inputs, rows, block_rows(columns), donated)
    return Result(out, tuple(dz.values()) or None)
