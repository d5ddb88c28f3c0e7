"""A vocabulary split over a mesh axis: what is merged across devices, and nothing of size V.

Inside `jax.shard_map`, a device holds ``V / n`` columns of every row. It sums its columns like a
tile; the sums are rebased to the row's global maxima and added: a handful of numbers a token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from t5patches_kernels import tiling
from t5patches_kernels.spec import statistics
from t5patches_kernels.spec.statistics import Array, Numbers


def axis_size(vocab_axis: str | None) -> int:
    """Over how many devices a row is split."""
    return 1 if vocab_axis is None else jax.lax.axis_size(vocab_axis)


def merge(numbers: Numbers, vocab_axis: str | None) -> Numbers:
    """The numbers of whole rows, from those of one shard's columns."""
    if vocab_axis is None:
        return numbers
    maxima = {m: jax.lax.pmax(numbers[m], vocab_axis) for m in statistics.MAXIMA if m in numbers}
    rebased = statistics.rebase(numbers, maxima)
    sums = {name: x for name, x in rebased.items() if name not in maxima}
    return maxima | add(sums, vocab_axis)


def add(numbers: Numbers, vocab_axis: str | None) -> Numbers:
    """Sums over the shards."""
    return numbers if vocab_axis is None else jax.lax.psum(numbers, vocab_axis)


def local_ids(ids: Array, columns: int, vocab_axis: str | None) -> Array:
    """Global ids as columns of this shard; those of other shards (and -1) become `columns`."""
    first = 0 if vocab_axis is None else jax.lax.axis_index(vocab_axis) * columns
    local = ids - first
    return jnp.where((ids >= 0) & (local >= 0) & (local < columns), local, columns)


def cotangent(x: Array, like: Array, vocab_axis: str | None) -> Array:
    """The whole cotangent of an output that every shard of `vocab_axis` holds.

    With `check_vma=True` JAX knows that the output is the same everywhere and hands each shard the
    whole of it. With `check_vma=False` the shards' cotangents are parts of one sum, as for the
    transpose of `jax.lax.psum`.
    """
    if vocab_axis is None or vocab_axis in tiling.varying_axes(like):
        return x
    return jax.lax.psum(x, vocab_axis)
