"""Tokens and vocabulary split over the devices of a mesh: nothing of size V moves.

Inside `jax.shard_map`, a device holds ``V / n`` columns of every row. It sums its columns like a
tile; the sums are rebased to the row's global maxima and added: a handful of numbers a token.

With a mesh in the context, `over_mesh` makes that `jax.shard_map` by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from t5patches_kernels.backends import tiling
from t5patches_kernels.core import statistics
from t5patches_kernels.core.operation import Operands, Operation, columns_of
from t5patches_kernels.core.statistics import Array, Stats

# --- Inside a shard_map ---------------------------------------------------------------------------


def axis_size(vocab_axis: str | None) -> int:
    """Over how many devices a row is split."""
    return 1 if vocab_axis is None else jax.lax.axis_size(vocab_axis)


def merge(stats: Stats, vocab_axis: str | None) -> Stats:
    """The statistics of whole rows, from those of one shard's columns."""
    if vocab_axis is None:
        return stats
    maxima = {m: jax.lax.pmax(stats[m], vocab_axis) for m in statistics.MAXIMA if m in stats}
    rebased = statistics.rebase(stats, maxima)
    sums = {name: x for name, x in rebased.items() if name not in maxima}
    return maxima | add(sums, vocab_axis)


def add(stats: Stats, vocab_axis: str | None) -> Stats:
    """Sums over the shards."""
    return stats if vocab_axis is None else jax.lax.psum(stats, vocab_axis)


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


# --- The mesh in the context ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Names:
    """Which mesh axes split what; hashable: a part of what a traced program depends on."""

    batch: tuple[str, ...]
    vocab: str | None
    chosen: bool  # by the user: then one of them must be there


# T5X's names; "replica" is there with several slices only.
_names = jax.make_user_context(default_value=_Names(("replica", "data"), "model", chosen=False))


@contextlib.contextmanager
def mesh_axes(
    *, batch: str | Sequence[str] = ("replica", "data"), vocab: str | None = "model"
) -> Iterator[None]:
    """Says which axes of the mesh split the tokens and which one splits the vocabulary.

    With a mesh in the context (of `jax.set_mesh`, or `jax.experimental.pjit`, as in T5X) every loss
    runs its kernel on each device's part of the logits: the first dimension is split over `batch`,
    the vocabulary over `vocab`. The defaults are T5X's names; here is where to give others. Axes
    that the mesh does not have split nothing. Where JAX tells how the logits are split (axes of
    type ``Explicit``), they stay as they are and no name is needed.

    A vocabulary that the axis does not divide is left whole, and its axis splits the last
    dimension of the tokens instead. A number of tokens that an axis does not divide is filled up
    with ignored ones, which takes a copy of the logits. Where one axis of type ``Explicit`` splits
    both the tokens and the vocabulary of a head (FSDP), hidden states are gathered along it.

    Under `jax.vmap` a dimension that is mapped is not one of the tokens' here. One that an axis of
    type ``Explicit`` splits stays where it is, and others are moved: give a loss the whole batch.

    Args:
      batch: the axes over which tokens are split, outermost first.
      vocab: the axis over which the vocabulary is split, or None.

    Raises:
      ValueError: an axis is named twice; or, in a loss, the mesh has none of the axes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from t5patches_kernels import cross_entropy_loss, mesh_axes
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> with jax.set_mesh(mesh), mesh_axes(batch="fsdp", vocab=None):
      ...     print(jax.jit(cross_entropy_loss)(jnp.zeros((1, 8)), jnp.array([3])).loss.round(4))
      [2.0794]
    """
    batch = (batch,) if isinstance(batch, str) else tuple(batch)
    named = [*batch, *([] if vocab is None else [vocab])]
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise ValueError(
            f"the mesh axes {twice} are named twice, in batch={batch} and vocab={vocab!r}: an axis "
            "splits one thing. With all of it for the tokens, pass vocab=None."
        )
    with _names(_Names(batch, vocab, chosen=True)):
        yield


Axes = tuple[str, ...]


class _Layout(NamedTuple):
    """How the devices of a mesh share an operation."""

    mesh: Any  # jax.sharding.AbstractMesh
    lead: tuple[Axes, ...]  # what splits the tokens, by leading dimension
    vocab: str | None

    def spec(self, *rest: str | None) -> jax.P:
        """Of an array whose leading dimensions are the tokens'."""
        return jax.P(*(axes or None for axes in self.lead), *rest)

    def lacking(self, lead: Sequence[int]) -> tuple[int, ...]:
        """How many tokens each leading dimension lacks to be split evenly."""
        parts = (_size(self.mesh, axes) for axes in self.lead)
        return tuple(-n % k for n, k in zip(lead, parts, strict=True))


def _size(mesh: Any, axes: Iterable[str]) -> int:
    return math.prod(mesh.shape[name] for name in axes)


def _of_type(mesh: Any, wanted: AxisType) -> set[str]:
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, of_type in types if of_type == wanted}


def _told(x: Array, dimension: int) -> Axes:
    """The axes of type Explicit that split a dimension: JAX holds them in the array's type."""
    entry = jax.typeof(x).sharding.spec[dimension]
    return (entry,) if isinstance(entry, str) else entry if isinstance(entry, tuple) else ()


def _layout(op: Operation, operands: Operands) -> _Layout | None:
    """How the mesh in the context shares an operation; None where there is nothing to share."""
    mesh = jax.sharding.get_abstract_mesh()
    explicit = _of_type(mesh, AxisType.Explicit)
    # Inside a shard_map of the caller's own it is he who splits, and says `vocab_axis`.
    if AxisType.Manual in mesh.axis_types:
        split = {a for x in operands.model for i in range(x.ndim) for a in _told(x, i)}
        if split:
            raise NotImplementedError(
                f"the mesh axes {sorted(split)}, of type Explicit, split what the loss is given "
                "inside a jax.shard_map that is not over them: name them in its axis_names too "
                "(and the vocabulary's as vocab_axis), or make them axes of type Auto."
            )
        return None
    if mesh.empty or (mesh.size == 1 and not explicit):
        return None
    like, names = operands.model[0], _names.value
    vocab = _told(operands.model[-1], 0 if op.head and op.head.transposed else -1)
    if len(vocab) > 1:
        raise ValueError(
            f"the vocabulary is split over the mesh axes {vocab}: the losses take one axis. "
            "Reshard the logits (the head's kernel) with jax.sharding.reshard first."
        )
    # Of an axis that splits both, the tokens' part is gathered: the head is the larger one.
    lead = [tuple(a for a in _told(like, i) if a not in vocab) for i in range(like.ndim - 1)]
    auto = _of_type(mesh, AxisType.Auto)
    if names.vocab in auto and not vocab:
        if columns_of(op.head, operands.model) % mesh.shape[names.vocab] == 0:
            vocab = (names.vocab,)
        elif lead:
            lead[-1] = (*lead[-1], names.vocab)
    if lead:
        lead[0] = (*(a for a in names.batch if a in auto), *lead[0])
    if auto and not any((*lead, vocab)):
        _none_known(mesh, names)
    return _Layout(mesh, tuple(lead), vocab[0] if vocab else None)


def _none_known(mesh: Any, names: _Names) -> None:
    what = (
        f"none of the mesh's axes {mesh.axis_names} splits the logits (batch={names.batch}, "
        f"vocab={names.vocab!r})"
    )
    if names.chosen:
        raise ValueError(
            f"{what}: name axes that it has: t5patches_kernels.mesh_axes(batch=..., vocab=...)."
        )
    warnings.warn(
        f"{what}: every device computes all of the loss. Say which axes split it with "
        "t5patches_kernels.mesh_axes(batch=..., vocab=...).",
        stacklevel=6,
    )


def _place(mesh: Any, x: Array, spec: jax.P) -> Array:
    """Moves an array to where `jax.shard_map` asks it to be, along axes of type Explicit.

    Along the others XLA does it.
    """
    explicit = _of_type(mesh, AxisType.Explicit)
    if not explicit:
        return x
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    told = jax.P(*(tuple(a for a in axes if a in explicit) or None for axes in entries))
    return jax.sharding.reshard(x, told)


def placed_as(x: Array, like: Array) -> Array:
    """An array split by axes of type Explicit as the same dimensions of another one are."""
    spec = jax.typeof(like).sharding.spec[: x.ndim]
    return _place(jax.sharding.get_abstract_mesh(), x, jax.P(*spec))


def gathered(x: Array) -> Array:
    """An array as each device holds it whole, as far as axes of type Explicit split it."""
    return _place(jax.sharding.get_abstract_mesh(), x, jax.P())


def over_mesh(
    run: Callable[[Operation, Operands, Any], Any],
    op: Operation,
    operands: Operands,
    tokens: Any,
    *,
    check_vma: bool,
) -> Any:
    """Runs an operation on each device's part of the tokens and of the vocabulary.

    Args:
      run: what runs it on one part: ``(op, operands, tokens) -> outputs``, all outputs with the
        leading dimensions of the tokens and no others.
      op: the operation.
      operands: whole; leading dimensions free.
      tokens: arrays with the tokens' leading dimensions. Zeros stand for an ignored token.
      check_vma: of `jax.shard_map`; False where the driver cannot run under it.

    Returns:
      What `run` returns, for all tokens. Without a mesh in the context it is called as it is.
    """
    layout = _layout(op, operands)
    if layout is None:
        return run(op, operands, tokens)
    lead = operands.model[0].shape[:-1]
    lacking = layout.lacking(lead)

    def filled(x: Array) -> Array:
        if not any(lacking):
            return x
        return jnp.pad(x, [(0, n) for n in (*lacking, *[0] * (x.ndim - len(lead)))])

    v = layout.vocab
    by_token = layout.spec(None if op.head else v)
    kernel = jax.P(v, None) if op.head and op.head.transposed else jax.P(None, v)
    of_operands: Any = ((by_token, kernel)[: len(arrays)] for arrays in operands)
    specs = (
        Operands(*of_operands),
        jax.tree.map(lambda x: layout.spec(*[None] * (x.ndim - len(lead))), tokens),
    )
    whole = (
        Operands(*(tuple(map(filled, arrays[:1])) + arrays[1:] for arrays in operands)),
        jax.tree.map(filled, tokens),
    )
    out = jax.shard_map(
        functools.partial(run, dataclasses.replace(op, vocab_axis=v)),
        in_specs=specs,
        out_specs=layout.spec(),
        check_vma=check_vma,
    )(*jax.tree.map(functools.partial(_place, layout.mesh), whole, specs))
    if any(lacking):
        out = jax.tree.map(lambda x: x[tuple(map(slice, lead))], out)
    return jax.tree.map(lambda x: placed_as(x, operands.model[0]), out)
