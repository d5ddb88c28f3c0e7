"""How a row is cut up for the GPU kernel, which rows it takes, and what is static about a call."""

from __future__ import annotations

import dataclasses

from jax.experimental import pallas as pl

from t5patches_kernels.core import objectives
from t5patches_kernels.core.operation import Operation, Stage

_SHARED_BYTES = 228 << 10  # of an SM
_OWN_BYTES = 4 << 10  # what a block takes of them beside its slots
THREADS = 128
_WIDE = 2 * THREADS  # lanes of a piece
_PIECES = 8
COPY_BYTES = 16  # a bulk copy moves multiples of this
OUT_SLOTS = 2
_MAX_COLUMNS = 262144


def why_not(columns: int, itemsizes: tuple[int, ...]) -> str | None:
    """The reason for which rows of this shape cannot go through the kernel."""
    for itemsize in itemsizes:
        if columns * itemsize % COPY_BYTES:
            return (
                f"its bulk copies move multiples of {COPY_BYTES} bytes, and a row of {columns} "
                f"entries has {columns * itemsize}: pad the vocabulary to a multiple of "
                f"{COPY_BYTES // itemsize} with logits of -inf"
            )
    if not THREADS <= columns <= _MAX_COLUMNS:
        return f"it takes rows of {THREADS} to {_MAX_COLUMNS} entries, not {columns}"
    return None


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a row is cut up."""

    lanes: int
    pieces: int
    chunks: int
    slots: int

    @property
    def chunk(self) -> int:
        """Entries of a chunk."""
        return self.lanes * self.pieces


def plan(columns: int, itemsizes: tuple[int, ...]) -> Plan:
    """Chunks as large as registers allow, and as many slots as shared memory does.

    Two blocks share an SM, so that one computes while the other waits; of rows of two float32
    logits one has an SM alone, as then it holds most of T5's row and two hold a third of theirs (on
    an H100 a quarter faster; what else was tried stands in bench/README.md).

    Args:
      columns: entries of a row.
      itemsizes: of the logits that are read; the first are the model's, and the gradient's are no
        larger.
    """
    lanes = _WIDE if columns >= _WIDE else THREADS
    pieces = min(_PIECES, columns // lanes)
    chunks = pl.cdiv(columns, lanes * pieces)
    blocks = 2 if sum(itemsizes) <= 4 else 1  # that share an SM
    room = _SHARED_BYTES // blocks - _OWN_BYTES
    budget = room // (lanes * pieces) - OUT_SLOTS * itemsizes[0]
    return Plan(lanes, pieces, chunks, min(chunks, max(2, budget // sum(itemsizes))))


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything static about one kernel."""

    op: Operation
    stage: Stage
    plan: Plan
    columns: int
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

    @property
    def returned(self) -> tuple[str, ...]:
        """The statistics that leave the kernel, in order."""
        pair = {"rm", "ry"} if self.reference else set()
        return tuple(sorted(self.names | {"m", "zy", "bad"} | pair))
