"""Streaming XLA: a loop over blocks of whole rows, each block small enough for the cache.

Runs wherever XLA does. Beyond inputs and outputs it holds a few blocks. XLA fuses a block's body
into a handful of loops and splits each over the host's threads.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from t5patches_kernels import tiling
from t5patches_kernels.operation import Operands, Operation, Result, Stage, Tokens
from t5patches_kernels.spec import objectives, statistics
from t5patches_kernels.spec.statistics import Array, Functions, Numbers, Tile

# A float32 block of one logits array. Measured on a 2-core Zen 5 with 1 MiB of L2 a core
# (`make bench`): 2 MiB are 4% faster than 1, as a block's dozen of forks and joins weighs less, and
# more holds more; below 4 rows XLA no longer splits a block over cores.
_BLOCK_BYTES = 1 << 21
_LEAST_ROWS = 4


def block_rows(columns: int) -> int:
    """Rows a block."""
    return max(_LEAST_ROWS, _BLOCK_BYTES // (4 * columns))


def own_logit(x: Array, targets: Array) -> Array:
    """The target's logit ``[R, 1]`` in float32, 0 where the target is not among the columns."""
    columns = x.shape[-1]
    own = jnp.take_along_axis(x, jnp.minimum(targets, columns - 1)[:, None], axis=-1)
    return jnp.where((targets < columns)[:, None], own.astype(jnp.float32), 0.0)


def _edited(reference: Array, tokens: Tokens) -> Array:
    if tokens.edit_ids is None:
        return reference
    rows = jnp.arange(reference.shape[0])[:, None]
    return reference.at[rows, tokens.edit_ids].add(tokens.log_factors, mode="drop")


def _block(
    functions: Functions,
    op: Operation,
    stage: Stage,
    operands: Operands,
    tokens: Tokens,
    numbers: Numbers | None,
    by: Numbers | None,
) -> Result:
    """One stage on whole rows ``[R, V]``."""
    c = op.settings
    (z,) = (x.astype(jnp.float32) for x in operands.model)
    of = objectives.reference_of(c)
    plain = z if of == "self" else operands.reference[0].astype(jnp.float32) if of else None
    r = None if plain is None else _edited(plain, tokens)
    names = objectives.needs(c)
    w = tokens.weights[:, None]
    either = objectives.either(c) if stage in (Stage.NUMBERS, Stage.VISIT) else None

    if numbers is None:
        numbers = statistics.first_look(z, r, names, functions, either, w)
        numbers["zy"] = own_logit(z, tokens.targets)
        if plain is not None:
            numbers["ry"] = own_logit(plain, tokens.targets)
        if stage is Stage.FIRST:
            return Result(numbers)
        numbers = objectives.finish(numbers, w, tokens.bad[:, None])
        if either is not None:
            numbers = numbers | either.second(numbers, c.smoothing)

    def tile(row: Numbers) -> Tile:
        return Tile(z, r, row, c.smoothing, functions=functions)

    if objectives.looks_twice(c) and stage is not Stage.GRADIENT:
        more = statistics.second_look(tile(numbers), names, either)
        if stage is Stage.SECOND:
            return Result(more)
        numbers = numbers | more
    if stage is Stage.NUMBERS:
        return Result(numbers)

    if by is None:
        by = objectives.derivatives(numbers, c, {"loss": jnp.ones_like(numbers["m"])})
    is_target = jnp.arange(z.shape[-1])[None, :] == tokens.targets[:, None]
    dz = statistics.gradient(
        tile(numbers), statistics.coefficients(numbers, by, either, functions), is_target
    )
    return Result(numbers, (dz.astype(operands.model[0].dtype),))


@partial(jax.jit, static_argnums=(0, 1, 2))
def run(
    functions: Functions,
    op: Operation,
    stage: Stage,
    operands: Operands,
    tokens: Tokens,
    numbers: Numbers | None = None,
    by: Numbers | None = None,
) -> Result:
    """The driver (`operation.Driver`), by the functions that entries go through."""
    rows, columns = operands.model[0].shape

    def body(block, fresh):
        del fresh  # nothing is summed over rows
        return _block(functions, op, stage, *block), None

    inputs = (operands, tokens, numbers, by)
    return tiling.for_row_blocks(body, inputs, rows, block_rows(columns))[0]
