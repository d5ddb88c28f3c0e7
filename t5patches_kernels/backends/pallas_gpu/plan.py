"""How a row is cut up for the GPU kernel, which rows it takes, and what is static about a call."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from t5patches_kernels.core import objectives, statistics
from t5patches_kernels.core.operation import Operation, Stage

_SHARED_BYTES = 228 << 10  # of an SM
_OWN_BYTES = 4 << 10  # what a block takes of them beside its slots, at most
_RESERVED = 1 << 10  # of that, by CUDA
_ALIGNED = REDUCTIONS = 1 << 10  # each array, by Mosaic GPU; what it reduces over lanes in
THREADS = 128
_WIDE = 2 * THREADS  # lanes of a piece
_PIECES = 8
COPY_BYTES = 16  # a bulk copy moves multiples of this
OUT_SLOTS = 2
MERGES = 2  # of a row's sums by the blocks that share it, at most; each has a place of its own
_MOST_BLOCKS = 3  # that share an SM
_MOST_SLOTS = 32  # barriers of a kind
_MAX_COLUMNS = 262144
_MAX_SHARED_COLUMNS = 524288
# Blocks that a GPU starts together, on SMs that reach each other's shared memory.
_CLUSTERS = (1, 2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """The GPU kernel, with each row of logits spread over a cluster of thread blocks.

    Passed as ``implementation`` of any loss. Each block of the cluster holds its part of the row in
    its own shared memory, so that rows of up to 524,288 columns are read once where one block's
    shared memory would not hold them. **Not run on a GPU yet**: compiled for Hopper and Blackwell,
    and right under an interpreter that takes the parts of a row one after the other.

    Attributes:
      cluster: blocks a row: 1 (as ``"pallas_gpu"``), 2, 4, 8 or 16. None: the fewest with which as
        much of a row stays on chip as can, and as many blocks share an SM as need be. CUDA promises
        8 on every card; where 16 are refused the launch fails, and 8 are to be asked for.

    Raises:
      ValueError: another number of blocks.

    Example:
      >>> import jax.numpy as jnp
      >>> from t5patches_kernels import BlockSizes, cross_entropy_loss
      >>> z, y, w = jnp.zeros((1, 512)), jnp.array([3]), jnp.ones(1)
      >>> out = cross_entropy_loss(z, y, w, implementation=BlockSizes(cluster=2))  # interpreted
      >>> print(f"{out.loss[0]:.3f}")
      6.238
    """

    cluster: int | None = None

    def __post_init__(self) -> None:
        if self.cluster is not None and self.cluster not in _CLUSTERS:
            raise ValueError(
                f"BlockSizes: cluster must be one of {', '.join(map(str, _CLUSTERS))}, or None for "
                f"the best, got {self.cluster!r}."
            )


ONE_BLOCK = BlockSizes(cluster=1)


def why_not(columns: int, itemsizes: tuple[int, ...], sizes: BlockSizes = ONE_BLOCK) -> str | None:
    """The reason for which rows of this shape cannot go through the kernel."""
    for itemsize in itemsizes:
        if columns * itemsize % COPY_BYTES:
            return (
                f"its bulk copies move multiples of {COPY_BYTES} bytes, and a row of {columns} "
                f"entries has {columns * itemsize}: pad the vocabulary to a multiple of "
                f"{COPY_BYTES // itemsize} with logits of -inf"
            )
    least = THREADS * (sizes.cluster or 1)
    most = _MAX_COLUMNS if sizes.cluster == 1 else _MAX_SHARED_COLUMNS
    if not least <= columns <= most:
        larger = " (BlockSizes() takes more)" if most < columns <= _MAX_SHARED_COLUMNS else ""
        return f"it takes rows of {least} to {most} entries, not {columns}{larger}"
    return None


def gradient_dtype(op: Operation, columns: int) -> str | None:
    """The dtype that the gradient is written in; None: that of the logits.

    It is the one asked for, if rows of it can be copied: half as wide as the logits, they may be no
    multiple of a copy (32100 columns in bfloat16).
    """
    asked = op.gradient_dtype
    return asked if asked and columns * jnp.dtype(asked).itemsize % COPY_BYTES == 0 else None


def _ceil_div(x: int, parts: int) -> int:
    return -(-x // parts)


class Buffer(NamedTuple):
    """What a block has in shared memory."""

    name: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a row is cut up: into a segment for each block of a cluster, and these into chunks."""

    columns: int
    itemsizes: tuple[int, ...]  # of the logits that are read, the model's first
    gradient: int  # itemsize of the gradient
    cluster: int  # blocks
    lanes: int  # entries of a piece
    pieces: int  # of a chunk
    slots: int  # chunks of an array that a block holds
    keeps: bool = False  # log s(q) too, in float32, from the sums to the gradient

    @property
    def chunk(self) -> int:
        """Entries of a chunk."""
        return self.lanes * self.pieces

    @property
    def unit(self) -> int:
        """Entries by whose multiples segments begin: those of the smallest copy."""
        return COPY_BYTES // min(*self.itemsizes, self.gradient)

    @property
    def segments(self) -> tuple[int, int]:
        """Entries of the shortest and of the longest segment."""
        units = self.columns // self.unit
        return units // self.cluster * self.unit, _ceil_div(units, self.cluster) * self.unit

    @property
    def chunks(self) -> int:
        """Chunks of a segment. The last one ends with it, and overlaps the one before it."""
        return _ceil_div(self.segments[1], self.chunk)

    @property
    def overlaps(self) -> bool:
        """Whether the last chunk of some segment has entries of the one before it."""
        return any(entries % self.chunk for entries in self.segments)

    @property
    def held(self) -> float:
        """The share of a row that stays on chip between column loops."""
        return self.slots / self.chunks

    @property
    def keeps_in(self) -> str:
        """The array that log s(q) is kept in: where the reference's logits were, if as large."""
        return "r_ring" if self.itemsizes[1:] == (4,) else "log_s"

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """What a block of value and gradient has in shared memory: arrays, and their barriers."""
        chunk, of_logits = self.chunk, dict(zip("zr", self.itemsizes, strict=False))
        arrays = {f"{name}_ring": self.slots * chunk * size for name, size in of_logits.items()}
        if self.keeps:
            arrays[self.keeps_in] = self.slots * chunk * 4
        arrays["out"] = OUT_SLOTS * chunk * self.gradient
        if self.cluster > 1:
            arrays["sums"] = MERGES * THREADS * 4
        arrays["reductions"] = REDUCTIONS
        aligned = [Buffer(name, _ceil_div(n, _ALIGNED) * _ALIGNED) for name, n in arrays.items()]
        return (*aligned, *(Buffer(f"{name}_arrived", self.slots * 8) for name in of_logits))

    @property
    def blocks(self) -> int:
        """Blocks that share an SM: as many as its shared memory has room for, or are of use."""
        each = sum(buffer.bytes for buffer in self.buffers) + _RESERVED
        return min(_MOST_BLOCKS, _SHARED_BYTES // each)


def plan(
    columns: int,
    itemsizes: tuple[int, ...],
    sizes: BlockSizes = ONE_BLOCK,
    logarithms: bool = False,
    gradient: int | None = None,
) -> Plan:
    """Chunks as large as registers allow, and as many slots as shared memory does.

    Where a block has a row alone, two blocks share an SM, so that one computes while the other
    waits; of rows of two float32 logits one has an SM alone, as then it holds most of T5's row and
    two hold a third of theirs (on an H100 a quarter faster; what else was tried stands in
    bench/README.md). Of a cluster's, two share an SM while all of the row stays on chip, with its
    logarithms where there is room for these too, and the last chunks overlap as little as can be.

    Args:
      columns: entries of a row.
      itemsizes: of the logits that are read; the first are the model's.
      sizes: the cluster's.
      logarithms: whether the gradient needs those that the sums took.
      gradient: its itemsize; None: that of the model's logits.
    """
    gradient = gradient or itemsizes[0]
    if sizes.cluster is None:
        every = [BlockSizes(cluster) for cluster in _CLUSTERS]
        able = [x for x in every if not why_not(columns, itemsizes, x)]
        plans = [plan(columns, itemsizes, x, logarithms, gradient) for x in able]
        return max(plans, key=lambda x: (x.held, min(x.blocks, 2), x.keeps, -x.cluster))
    one = Plan(columns, itemsizes, gradient, sizes.cluster, THREADS, pieces=1, slots=1)
    if sizes.cluster == 1:
        return _cut(one, 2 if sum(itemsizes) <= 4 else 1, _PIECES)
    cuts = [
        _cut(one, blocks, pieces, keeps)
        for blocks in range(1, _MOST_BLOCKS + 1)
        for pieces in range(_PIECES, _PIECES // 2 - 1, -1)
        for keeps in ((False, True) if logarithms else (False,))
    ]
    cuts = [x for x in cuts if x.held == 1 or not x.keeps]
    order = lambda x: (x.held, min(x.blocks, 2), x.keeps, -x.chunks * x.chunk, x.pieces)  # noqa: E731
    return max(cuts, key=order)


def _cut(one: Plan, blocks: int, pieces: int, keeps: bool = False) -> Plan:
    """The plan of such rows, by how many blocks share an SM and the pieces of a chunk, at most.

    Args:
      one: the plan with chunks of one piece, and one slot.
      blocks: that share an SM.
      pieces: of a chunk.
      keeps: as of the plan.
    """
    least = one.segments[0]
    lanes = _WIDE if least >= _WIDE else THREADS
    one = dataclasses.replace(one, lanes=lanes, pieces=min(pieces, least // lanes))
    room = _SHARED_BYTES // blocks - _OWN_BYTES - (_ALIGNED if one.cluster > 1 else 0)
    each = sum(one.itemsizes) + (4 if keeps and one.keeps_in == "log_s" else 0)
    slots = (room // one.chunk - OUT_SLOTS * one.gradient) // each
    slots = min(one.chunks, _MOST_SLOTS, max(2, slots))
    return dataclasses.replace(one, slots=slots, keeps=keeps)


def takes_logarithms(op: Operation, stage: Stage, pushed: bool) -> bool:
    """Whether the gradient of such rows needs log s(q), and else nothing of the reference."""
    needed = objectives.needs_of(op.settings, pushed=pushed)
    reverse = needed & statistics.SECOND_PASS.keys() == {"rkl"} and op.settings.smoothing > 0
    beside = needed - statistics.SECOND_PASS.keys() - {*statistics.OF_REFERENCE}
    of_model = not any({"r", "s"} & {*statistics.SUMS[name]} for name in beside)
    return stage is Stage.VALUE_AND_GRAD and reverse and of_model


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything static about one kernel."""

    op: Operation
    stage: Stage
    plan: Plan
    edits: int  # ids a row

    @property
    def reference(self) -> str | None:
        """What the second row is, as `objectives.reference_of` has it."""
        return objectives.reference_of(self.op.settings)

    @property
    def numbers(self) -> tuple[str, ...]:
        """What tokens bring to the operation, in order."""
        return objectives.numbers(self.op.settings)

    @property
    def names(self) -> frozenset[str]:
        """The statistics that the operation needs."""
        return objectives.needs(self.op.settings)

    def needs(self, pushed: bool) -> frozenset[str]:
        """The statistics that rows of one kind need."""
        return objectives.needs_of(self.op.settings, pushed=pushed)

    @property
    def branches(self) -> bool:
        """Whether rows of pushed-down tokens are worked on in another way than those of others."""
        c = self.op.settings
        return bool(objectives.unread(c, pushed=True) | objectives.unread(c, pushed=False))

    def reads_reference_first(self, pushed: bool) -> bool:
        """Whether the first column loop is over the reference alone: the next takes logarithms."""
        return bool(self.needs(pushed) & {"rkl", "sqr"})

    def keeps(self, pushed: bool) -> bool:
        """Whether such rows' logarithms stay on chip: those of the reverse divergence."""
        return self.plan.keeps and takes_logarithms(self.op, self.stage, pushed)

    def passes(self, pushed: bool) -> float:
        """Arrays as large as the logits that value and gradient move, at most.

        One is written, each that is read is read once, and what does not stay on chip of it again
        by every later column loop.
        """
        again = 1.0 - self.plan.held
        later = [1, 1 + self.reads_reference_first(pushed)][: len(self.plan.itemsizes)]
        return 1.0 + sum(1.0 + loops * again for loops in later)

    @property
    def returned(self) -> tuple[str, ...]:
        """The statistics that leave the kernel, in order."""
        pair = {"rm", "ry"} if self.reference else set()
        return tuple(sorted(self.names | {"m", "zy", "bad"} | pair))


def call_of(
    op: Operation,
    stage: Stage,
    columns: int,
    itemsizes: tuple[int, ...],
    edits: int,
    sizes: BlockSizes = ONE_BLOCK,
) -> Call:
    """The call of a kernel, with the plan that it has."""
    logarithms = any(takes_logarithms(op, stage, pushed) for pushed in (False, True))
    dtype = gradient_dtype(op, columns)
    gradient = jnp.dtype(dtype).itemsize if dtype else None
    return Call(op, stage, plan(columns, itemsizes, sizes, logarithms, gradient), edits)
