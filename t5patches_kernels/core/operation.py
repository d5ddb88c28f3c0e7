"""What every driver is given: one operation on rows, and the stages in which it can be run."""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import NamedTuple, Protocol

import jax

from t5patches_kernels.core import objectives, statistics
from t5patches_kernels.core.objectives import Settings
from t5patches_kernels.core.statistics import Stats

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Head:
    """How logits come from hidden states: ``scale * hidden @ kernel``, and what bounds them."""

    scale: float
    transposed: bool  # the kernel is [V, D], an embedding table
    softcap: float | None = None  # c: z becomes c * tanh(z / c)
    chunk_bytes: int | None = None  # of float32 logits at a time; None: the device's own


@dataclasses.dataclass(frozen=True)
class Operation:
    """Everything static about a call; hashable."""

    settings: Settings
    vocab_axis: str | None = None
    head: Head | None = None  # None: the operands are logits
    donate: bool = False  # the gradient may be written over the model's logits
    skip_ignored: bool = False  # statistics and gradient of a row of weight 0 may be all 0
    gradient_dtype: str | None = None  # of the gradient to logits; None: theirs


class Tokens(NamedTuple):
    """What belongs to each of the T tokens. Ids are columns of this shard, or V for none."""

    targets: Array  # [T] int32
    weights: Array  # [T] float32
    bad: Array  # [T] bool: an id is out of range, or a number is none
    edit_ids: Array | None = None  # [T, K] int32
    log_factors: Array | None = None  # [T, K] float32
    numbers: dict[str, Array] | None = None  # [T] float32 each: `objectives.numbers`, by name

    def of_rows(self) -> Stats:
        """What lines read of them besides row statistics ``[T, 1]``."""
        found = {"w": self.weights, "bad": self.bad} | (self.numbers or {})
        return {name: x[:, None] for name, x in found.items()}


class Operands(NamedTuple):
    """The arrays that rows are made of.

    Logits ``[T, V]``, or hidden states ``[T, D]`` and a head's kernel; the same for the reference,
    where the operation has one.
    """

    model: tuple[Array, ...]
    reference: tuple[Array, ...]


class Stage(enum.Enum):
    """How far a driver takes the rows."""

    FIRST_PASS = "first_pass"  # the sums of the first pass, of this shard's columns
    SECOND_PASS = "second_pass"  # those of the second pass, given finished statistics
    STATISTICS = "statistics"  # both, and finished
    VALUE_AND_GRAD = "value_and_grad"  # STATISTICS, and the gradient of the loss in one kernel
    GRADIENT = "gradient"  # the gradient, given finished statistics and the derivatives by them


# Those that read all of a row at once, and so may hold it on chip.
WHOLE_ROWS = (Stage.STATISTICS, Stage.VALUE_AND_GRAD)


class Result(NamedTuple):
    """What a stage returns."""

    stats: Stats  # [T, 1] each
    # One per model operand, in its dtype or, of logits, the one asked for; for a head's kernel the
    # sum in float32.
    gradient: tuple[Array, ...] | None = None


class Driver(Protocol):
    """One way to bring rows to the specification."""

    def __call__(
        self,
        op: Operation,
        stage: Stage,
        operands: Operands,
        tokens: Tokens,
        stats: Stats | None = None,
        d_stats: Stats | None = None,
    ) -> Result:
        """Runs one stage over all rows."""


@functools.lru_cache(maxsize=1024)
def returned(op: Operation, stage: Stage) -> tuple[str, ...]:
    """The names of the statistics that are asked of a stage, sorted; a driver may return more."""
    names = objectives.needs(op.settings)
    second = names & statistics.SECOND_PASS.keys()
    if stage is Stage.GRADIENT:
        return ()
    if stage is Stage.SECOND_PASS:
        return tuple(sorted(second))
    of_row = {"m", "zy"} | ({"ry"} & objectives.reads(op.settings))
    of_row |= {"rm"} if objectives.reference_of(op.settings) else set()
    if stage is Stage.FIRST_PASS:
        return tuple(sorted(of_row | (names - second)))
    return tuple(sorted(of_row | names | {"w", "bad", *objectives.numbers(op.settings)}))


def columns_of(head: Head | None, model: tuple[Array, ...]) -> int:
    """How many vocabulary entries a model's operands hold (of this shard)."""
    return model[-1].shape[0 if head and head.transposed else -1]
