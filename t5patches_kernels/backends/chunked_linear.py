"""Fused linear: logits are made a chunk of tokens at a time and never all at once.

The chunk's matrix products are the compiler's own; what happens to its logits is whatever driver
the caller chose. The gradient makes the chunk's logits again, weighs each row by its own cotangent
and multiplies straight on into ``hidden`` and ``kernel``: right for any per-token cotangent.

Not all in one kernel, on a TPU either: a gradient needs whole rows, so a kernel that keeps no
logits makes them again, for ``hidden`` and for ``kernel``: six to eight products where chunks take
four. `python -m bench.tpu_static --linear` prints what that comes to, and bench/README.md says
what follows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from t5patches_kernels.backends import tiling
from t5patches_kernels.core.operation import (
    Driver,
    Head,
    Operands,
    Operation,
    Result,
    Stage,
    Tokens,
    columns_of,
)
from t5patches_kernels.core.statistics import Array, Stats, any_asked

# A float32 chunk of one logits array where the caller names no size, by platform, see `own_bytes`:
# small enough for a CPU's caches; on a GPU large enough for its matrix units, and for the kernel's
# float32 gradient to be read and written seldom; on a TPU, by its compiler's figures (`python -m
# bench.tpu_static --linear`), as much as keeps T = 4096, D = 1024, V = 250112 within a twentieth of
# what dense logits hold.
CHUNK_BYTES = {"cpu": 16 << 20, "gpu": 512 << 20, "tpu": 237 << 20}
LEAST_ROWS = 8
# At least so many chunks where ignored tokens are skipped, as all but one token of the last may be
# ignored; not more, as each chunk adds its gradient of the kernel to that of the others.
_CHUNKS_TO_SKIP = 4
_MATRIX_ROWS = 128
# Of the kernel's gradient, what is added at a time, at most, where XLA would else hold a whole
# product beside the sum: on CPUs, whose products cannot add.
_COLUMNS_ADDED = 4096


def own_bytes(platform: str, columns: int) -> int:
    """A chunk where the caller names no size: no fewer tokens than products are quick with."""
    return max(CHUNK_BYTES[platform], 4 * columns * _MATRIX_ROWS)


def chunk_rows(rows: int, columns: int, chunk_bytes: int, *, skip_ignored: bool = False) -> int:
    """Tokens a chunk: about as many in each, as the last one is moved back over the one before it.

    In whole tiles of a matrix unit where there is room for some.
    """
    most = max(LEAST_ROWS, chunk_bytes // (4 * columns))
    tile = _MATRIX_ROWS if most >= 4 * _MATRIX_ROWS else LEAST_ROWS
    chunks = -(-rows // (most // tile * tile))
    block = -(-rows // (chunks * tile)) * tile
    return min(block, max(_MATRIX_ROWS, -(-rows // _CHUNKS_TO_SKIP))) if skip_ignored else block


def product_of(hidden: Array, kernel: Array, head: Head) -> Array:
    """``scale * hidden @ kernel`` in float32; the product runs in the dtype of `hidden`."""
    dims = (((1,), (1 if head.transposed else 0,)), ((), ()))
    product = jax.lax.dot_general(
        hidden, kernel.astype(hidden.dtype), dims, preferred_element_type=jnp.float32
    )
    return product * head.scale


def capped(z: Array, head: Head) -> Array:
    """The logits: z, or ``c tanh(z / c)``, whose magnitude no z takes above c."""
    return z if head.softcap is None else head.softcap * jnp.tanh(z / head.softcap)


def _uncapped(d_logits: Array, z: Array, head: Head) -> Array:
    """The gradient to z, from that to the logits."""
    if head.softcap is None:
        return d_logits
    # 1 - tanh(x)^2 = 4 e / (1 + e)^2 with e = exp(-2 |x|). From the rounded tanh, 1 - tanh^2 has
    # lost all digits at |x| = 9.
    e = jnp.exp(-2 * jnp.abs(z / head.softcap))
    # An ignored token's z may be NaN, and 0 times NaN is NaN.
    return jnp.where(d_logits == 0, 0.0, d_logits * (4 * e / jnp.square(1 + e)))


def _to_hidden(dz: Array, kernel: Array, head: Head) -> Array:
    """The gradient to a chunk's hidden states, float32."""
    over_v = (((1,), (0 if head.transposed else 1,)), ((), ()))
    kernel = kernel.astype(dz.dtype)
    return head.scale * jax.lax.dot_general(dz, kernel, over_v, preferred_element_type=jnp.float32)


def _to_kernel(dz: Array, hidden: Array, head: Head) -> Array:
    """The gradient to the kernel, or to those columns of it that `dz` has, float32."""
    over_t = (((0,), (0,)), ((), ()))
    pair = (dz, hidden) if head.transposed else (hidden, dz)
    return head.scale * jax.lax.dot_general(*pair, over_t, preferred_element_type=jnp.float32)


Add = Callable[[Array | None, Array, Array, Head], Array]
"""Of the kernel's gradient so far, None before the first chunk: with this chunk's."""


def _add(total: Array | None, dz: Array, hidden: Array, head: Head) -> Array:
    """See `Add`: one product, to which a GPU's and a TPU's add as they go."""
    own = _to_kernel(dz, hidden, head)
    return own if total is None else total + own


def _add_by_columns(total: Array | None, dz: Array, hidden: Array, head: Head) -> Array:
    """See `Add`: some columns at a time, so that no second array as large as the kernel is held."""
    columns, axis = dz.shape[1], 0 if head.transposed else 1
    steps = -(-columns // _COLUMNS_ADDED)
    if total is None or steps == 1:
        return _add(total, dz, hidden, head)
    size = -(-columns // steps)

    def add(i: Array, total: Array) -> Array:
        # The last ones are moved back to end with the kernel's; what they had is not added again.
        start = jnp.minimum(i * size, columns - size)
        fresh = start + jnp.arange(size, dtype=jnp.int32) >= i * size
        some = jnp.where(fresh, jax.lax.dynamic_slice_in_dim(dz, start, size, axis=1), 0)
        old = jax.lax.dynamic_slice_in_dim(total, start, size, axis)
        new = old + _to_kernel(some, hidden, head)
        return jax.lax.dynamic_update_slice_in_dim(total, new, start, axis)

    return jax.lax.fori_loop(0, steps, add, total)


@partial(jax.jit, static_argnums=(0, 1, 2))
def run(
    driver: Driver,
    op: Operation,
    stage: Stage,
    operands: Operands,
    tokens: Tokens,
    stats: Stats | None = None,
    d_stats: Stats | None = None,
) -> Result:
    """The driver (`operation.Driver`) of operands that are hidden states and kernels."""
    assert op.head is not None
    chunked = partial(_chunked, driver, stage)
    inputs = (operands, tokens, stats, d_stats)
    # A GPU's products read their operands as they lie in memory: without a softcap, whose
    # derivative comes between, the gradient to logits is stored as the products take it.
    stored = None if op.head.softcap else operands.model[0].dtype.name
    return tiling.by_platform(
        inputs,
        gpu=partial(chunked, dataclasses.replace(op, gradient_dtype=stored), "gpu", _add),
        tpu=partial(chunked, op, "tpu", _add),
        default=partial(chunked, op, "cpu", _add_by_columns),
    )


def _chunked(
    driver: Driver,
    stage: Stage,
    op: Operation,
    platform: str,
    add: Add,
    operands: Operands,
    tokens: Tokens,
    stats: Stats | None,
    d_stats: Stats | None,
) -> Result:
    hidden, kernel = operands.model
    assert op.head is not None
    head = op.head
    of_chunk = dataclasses.replace(op, skip_ignored=False)

    def body(block, donated, fresh, total):
        hidden, ref_hidden, tokens, stats, d_stats = block
        z = product_of(hidden, kernel, head)
        reference: tuple[Array, ...] = ()
        if operands.reference:
            reference = (capped(product_of(ref_hidden, operands.reference[1], head), head),)
        logits = Operands((capped(z, head),), reference)
        out = driver(of_chunk, stage, logits, tokens, stats, d_stats)
        if out.gradient is None:
            return out, donated, total
        # Elsewhere the gradient to logits is 0, but hidden states may be NaN, and 0 * NaN is NaN.
        asked = tokens.weights[:, None] != 0 if d_stats is None else any_asked(d_stats)
        once = jnp.where(fresh[:, None] & asked, hidden, jnp.zeros_like(hidden))
        dz = _uncapped(out.gradient[0], z, head).astype(hidden.dtype)
        dh = _to_hidden(dz, kernel, head)
        return Result(out.stats, (dh,)), donated, add(total, dz, once, head)

    ref_hidden = operands.reference[0] if operands.reference else None
    rows, columns = hidden.shape[0], columns_of(head, operands.model)
    inputs = (hidden, ref_hidden, tokens, stats, d_stats)
    chunk_bytes = head.chunk_bytes or own_bytes(platform, columns)
    block = chunk_rows(rows, columns, chunk_bytes, skip_ignored=op.skip_ignored)
    counts = tokens.weights != 0 if op.skip_ignored else None
    out, _, dw = tiling.for_row_blocks(body, inputs, rows, block, counts=counts)
    if out.gradient is None:
        return out
    return Result(out.stats, (out.gradient[0].astype(hidden.dtype), dw))
