"""How much of a row block fits in a TPU core's VMEM: the budget, with every buffer named.

A kernel holds R rows of the whole vocabulary. What it must hold are the windows of its operands and
results, two of each because one is copied while the other is worked on; what it may hold are parts
of the rows that one column loop computes and a later one needs again (`statistics.Parts`), and
copies of the logits: of a changed reference, and of bfloat16, which each loop else converts anew.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from t5patches_kernels.core import objectives, statistics
from t5patches_kernels.core.objectives import Settings
from t5patches_kernels.core.operation import WHOLE_ROWS, Operation, Stage, returned

LANES = 128
Part = tuple[str, str | None]  # a key of `statistics.Parts`, or ("copy", "z" or "r")
# The part whose buffer a part is written over, where that is held too.
_INSTEAD: Mapping[Part, Part] = {
    ("weight", "r"): ("copy", "r"),
    ("weight", "z"): ("copy", "z"),
    statistics.PRODUCT: ("value", "z"),
}
# The part that only the second column loop can compute.
LATE = (statistics.PRODUCT,)
_MIB = 1 << 20


class Chip(NamedTuple):
    """What the kernels need to know about a TPU core."""

    kind: str  # as `jax.Device.device_kind` has it
    vmem: int  # bytes a kernel can be given


# Found by compiling ever larger kernels (jax 0.10.2, libtpu 0.0.52).
_CHIPS = (
    Chip("TPU v4", 16 * _MIB),
    Chip("TPU v5 lite", 128 * _MIB),
    Chip("TPU v5", int(63.9 * _MIB)),
    Chip("TPU v6 lite", int(127.9 * _MIB)),
    Chip("TPU7x", int(63.9 * _MIB)),
)
# What every chip has: assumed where the chip is not known.
LEAST = _CHIPS[0]
# Left to the compiler: registers that it spills, its own scratch and the small windows' padding.
_RESERVED = 5 * _MIB // 4
# Groups in a step of the fallback, which takes its time to compile like any other loop.
FALLBACK_UNROLL = 8
# Groups of 128 columns in a step of a column loop, at most. v4's schedule of `tnfll` in bfloat16,
# V = 32128 (static): 5299 cycles in four steps of 64 or less, 5277 in three of 84 or less, 5406 in
# one of 251, in which more registers are spilled.
_UNROLL = 96
# Blocks of twice the rows are taken where there are at least so many of them. What crosses the
# lanes between two column loops is waited for once a block, which is a quarter of `tnrr`'s schedule
# in bfloat16 on v6e: 3710 cycles for 16 rows, 6284 for 32 (static). A block's own copies, which
# nothing hides where a call begins and ends, are then twice as long: 6% of 16 blocks.
_MANY_BLOCKS = 16
# Groups in a step where masked entries are expected in the first loop, which then spills more.
_FIRST_UNROLL_MASKED = 32
# Groups of a window of rows that do not fit: long copies, and few steps; and in a step of a tile of
# such rows, which leaves less for spills: where T = 1, steps of 82 spill 4.6 MiB on v4 (static).
_WINDOW = 64


def chip(kind: str | None) -> Chip:
    """The chip of a `jax.Device.device_kind`; the smallest where that is not known."""
    return next((chip for chip in _CHIPS if chip.kind == kind), LEAST)


class Buffer(NamedTuple):
    """One array in VMEM."""

    name: str
    rows: int
    columns: int
    itemsize: int
    copies: int = 1

    @property
    def bytes(self) -> int:
        """Its size, as it is padded."""
        return self.copies * self.rows * up(self.columns, LANES) * self.itemsize


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a kernel lays its rows out."""

    rows: int  # a block
    columns: int  # a window: all of a row, or a tile of it
    unroll: int  # groups of 128 columns in a step of a column loop
    parts: tuple[Part, ...]  # what is held between column loops
    private: bool  # the reference is changed
    buffers: tuple[Buffer, ...]
    memory: int  # bytes that the chip has
    # Of rows that go through in windows while the reference is held as a whole: how many windows of
    # the model's logits are held too, and what numbers are kept from window to window.
    held: int = 0
    windows: int = 1
    state: tuple[tuple[str, str], ...] = ()

    @property
    def streamed(self) -> bool:
        """Whether rows go through in windows while the reference is held as a whole."""
        return bool(self.state)

    @property
    def widths(self) -> list[int]:
        """Columns of the buffers of parts and of state."""
        windows = dict.fromkeys(self.places, 1)
        if self.streamed:
            windows |= {
                ("copy", "r"): self.windows,
                ("copy", "z"): min(self.held + 1, self.windows),
            }
        return [windows[part] * self.columns for part in self.places] + [LANES] * len(self.state)

    @property
    def kept(self) -> tuple[Part, ...]:
        """The parts that column loops compute."""
        return tuple(part for part in self.parts if part[0] != "copy")

    @property
    def places(self) -> tuple[Part, ...]:
        """Every buffer of parts, named after the first that is in it."""
        return tuple(part for part in self.parts if self.place(part) == part)

    def place(self, part: Part) -> Part:
        """The buffer that a part is in."""
        return _place(part, self.parts)

    @property
    def vmem(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.bytes for buffer in self.buffers)

    @property
    def limit(self) -> int:
        """Bytes to ask the compiler for: as spills vary, more than is planned with."""
        return min(max(self.vmem + 2 * _RESERVED, LEAST.vmem), self.memory)


def _place(part: Part, parts: Collection[Part]) -> Part:
    before = _INSTEAD.get(part)
    return part if before is None or before not in parts else before


def up(x: int, to: int) -> int:
    """`x` rounded up to a multiple."""
    return -(-x // to) * to


def plan(
    op: Operation,
    stage: Stage,
    columns: int,
    itemsizes: tuple[int, ...],
    private: bool,
    vmem: int,
    tokens: int = 1,
) -> Plan | None:
    """The best layout that fits.

    Args:
      op: the operation.
      stage: the stage.
      columns: entries in a row (of this shard).
      itemsizes: bytes an entry of the model's logits, and of the reference's where it is given.
      private: whether the reference is changed and so held as a copy.
      vmem: bytes to stay within.
      tokens: rows of the call.

    Returns:
      The layout; None where the stage needs whole rows and they do not fit.
    """
    wanted = _wanted(op, stage, itemsizes, private)
    if tokens >= _MANY_BLOCKS * 2 * _least_rows(itemsizes):
        parts = tuple(itertools.chain(*wanted))
        size = (stage, up(columns, LANES), itemsizes, private, vmem, parts)
        out = _layout(*size, _UNROLL // 2, rows=2 * _least_rows(itemsizes))
        if out.vmem + _RESERVED <= vmem:
            return out
    for keep in range(len(wanted), -1, -1):
        parts = tuple(itertools.chain(*wanted[:keep]))
        out = _layout(stage, up(columns, LANES), itemsizes, private, vmem, parts, _UNROLL)
        if out.vmem + _RESERVED <= vmem:
            return out
    if stage in WHOLE_ROWS:
        return None
    tiles = 2
    while True:
        width = up(-(-columns // tiles), LANES)
        out = _layout(stage, width, itemsizes, private, vmem, (), _WINDOW)
        if out.vmem + _RESERVED <= vmem:
            return out
        tiles += 1


def streamed(
    op: Operation, stage: Stage, columns: int, itemsizes: tuple[int, ...], private: bool, vmem: int
) -> Plan | None:
    """The layout of rows that go through in windows while the reference is held as a whole.

    Takes what `plan` takes; None where it does not fit, or where there is no such kernel.
    """
    whole = stage in WHOLE_ROWS
    if not whole or objectives.reference_of(op.settings) != "given":
        return None
    parts = _streamed_parts(op.settings, stage)
    state = _state(op.settings, stage)
    for most in (_WINDOW >> k for k in range(7)):
        width = _width(columns, most)
        out = _layout(stage, width, itemsizes, private, vmem, (), _WINDOW)
        rows, windows = out.rows, -(-columns // width)
        fixed = [buffer for buffer in out.buffers if not buffer.name.startswith("copy")]
        fixed.append(Buffer("copy r, later weight r", rows, windows * width, 4))
        fixed.append(Buffer("numbers kept from window to window", rows, len(state) * LANES, 4))
        room = vmem - _RESERVED - sum(buffer.bytes for buffer in fixed)
        slots = min(room // (4 * rows * width), windows)
        if slots > 0:
            held = windows if slots == windows else slots - 1
            fixed.append(Buffer("copy z", rows, slots * width, 4))
            return dataclasses.replace(
                out, parts=parts, buffers=tuple(fixed), held=held, windows=windows, state=state
            )
    return None


def _streamed_parts(c: Settings, stage: Stage) -> tuple[Part, ...]:
    """What is held of rows that go through in windows."""
    weight: list[Part] = [] if _of_reference(objectives.needs(c)) else [("weight", "r")]
    model: list[Part] = [("copy", "z")] if stage is Stage.VALUE_AND_GRAD else []
    return (("copy", "r"), *weight, *model)


def _width(columns: int, most: int) -> int:
    """Columns of a window: of about a number of groups, those that reach least beyond the row."""
    groups = up(columns, LANES) // LANES
    return LANES * min(range(most, most * 3 // 4, -1), key=lambda n: up(groups, n))


def _state(c: Settings, stage: Stage) -> tuple[tuple[str, str], ...]:
    """The numbers that are kept from window to window, by what they are of."""
    names = objectives.needs(c)
    alone = names & set(statistics.OF_REFERENCE)
    beside = statistics.with_normalisers(
        frozenset(statistics.SECOND_PASS.get(name, name) for name in names - alone)
    )
    found = {"r": {"rm", *alone}, "z": {"m", *beside}, "row": {"rm", *alone}}
    found |= {"own r": {"ry"} & objectives.reads(c), "own z": {"zy"}}
    if stage is Stage.VALUE_AND_GRAD:
        found["row"] |= {"m", *names}
        found["d_stats"] = set(objectives.differentiable(c, ("loss",)))
    return tuple((of, name) for of, some in found.items() for name in sorted(some))


def _layout(
    stage: Stage,
    columns: int,
    itemsizes: tuple[int, ...],
    private: bool,
    vmem: int,
    parts: tuple[Part, ...],
    most: int,
    rows: int | None = None,
) -> Plan:
    rows = _least_rows(itemsizes) if rows is None else rows
    buffers = [
        Buffer(f"window of {name}", rows, columns, size, copies=2)
        for name, size in zip(("z", "r"), itemsizes, strict=False)
    ]
    if stage in (Stage.VALUE_AND_GRAD, Stage.GRADIENT):
        buffers.append(Buffer("window of dz", rows, columns, itemsizes[0], copies=2))
    buffers.append(Buffer("per-row statistics, in and out", rows, 2 * LANES, 4, copies=2))
    if private and ("copy", "r") not in parts:
        parts = (("copy", "r"), *parts)
    held: dict[Part, list[str]] = {}
    for part in parts:
        held.setdefault(_place(part, parts), []).append(f"{part[0]} {part[1]}")
    buffers += [Buffer(", later ".join(names), rows, columns, 4) for names in held.values()]
    unroll = _unroll(columns // LANES, most)
    return Plan(rows, columns, unroll, parts, private, tuple(buffers), vmem)


def _least_rows(itemsizes: tuple[int, ...]) -> int:
    """A register holds 8 rows of 32 bits; two bfloat16 rows share one."""
    return 16 if min(itemsizes) == 2 else 8


def _unroll(groups: int, most: int) -> int:
    """Groups of a step of a column loop: in as many steps, all as long."""
    return -(-groups // -(-groups // most))


class _Touched(dict):
    """Parts of a tile that note which of them are read."""

    def __init__(self, known: statistics.Parts):
        super().__init__(known)
        self.read: set[Part] = set()

    def __getitem__(self, part: Part) -> jax.Array:
        self.read.add(part)
        return super().__getitem__(part)


def _read_later(op: Operation, stage: Stage) -> set[Part]:
    """The parts of a row that are read again after the column loop that first computes them."""
    c = op.settings
    one = jnp.ones((1, 1), jnp.float32)
    names = objectives.needs(c)
    row = dict.fromkeys((*statistics.MAXIMA, *names, "w"), one)
    r = one if objectives.reference_of(c) else None
    second, third = _Touched({}), _Touched(dict.fromkeys(LATE, one))

    def tile(known: statistics.Parts) -> statistics.Tile:
        return statistics.Tile(one, r, row, c.smoothing, known=known)

    def later_loops() -> None:
        if objectives.needs_second_pass(c):
            statistics.second_terms(tile(second), names)
        if stage is Stage.VALUE_AND_GRAD:
            d_stats = dict.fromkeys(objectives.differentiable(c, ("loss",)), one)
            statistics.gradient(tile(third), statistics.coefficients(row, d_stats), None)

    jax.eval_shape(later_loops)
    return (second.read - set(LATE)) | third.read


def _wanted(
    op: Operation, stage: Stage, itemsizes: tuple[int, ...], private: bool
) -> list[tuple[Part, ...]]:
    """The parts worth holding from one column loop to a later one, the most worthwhile first."""
    if stage not in WHOLE_ROWS:
        return []
    read = _read_later(op, stage)
    of_reference = _of_reference(objectives.needs(op.settings))
    out: list[tuple[Part, ...]] = []
    worth: tuple[Part, ...] = (
        ("weight", "r"), ("weight", "z"), *LATE, ("value", "z")
    )  # fmt: skip
    for part in worth:
        before = _INSTEAD.get(part)
        if part not in read or any(part in parts for parts in out):
            continue
        if part == ("weight", "r") and private and of_reference:
            continue  # the copy must stay what it is
        take = before is not None and (
            before in read or (before[0] == "copy" and _size(before, itemsizes) == 2)
        )
        out.append((before, part) if before is not None and take else (part,))
    return out


def _of_reference(names: Collection[str]) -> bool:
    """Whether a sum reads the reference's logits besides what they weigh."""
    return any(n in statistics.SUMS and statistics.SUMS[n].value == "r" for n in names)


def _size(copy: Part, itemsizes: tuple[int, ...]) -> int:
    return itemsizes[-1 if copy[1] == "r" else 0]


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything static about a kernel."""

    op: Operation
    stage: Stage
    plan: Plan
    columns: int
    edits: int  # places for edits a block has, the same for each row; 0 without a changed reference
    given: tuple[str, ...]  # the numbers that come in, by lane
    d_stats: tuple[str, ...]  # the derivatives that come in, by lane after those

    @property
    def names(self) -> frozenset[str]:
        """The statistics that the operation needs."""
        return objectives.needs(self.op.settings)

    @property
    def numbers(self) -> tuple[str, ...]:
        """What tokens bring to the operation, by lane."""
        return objectives.numbers(self.op.settings)

    @property
    def reference(self) -> str | None:
        """What the second row is, as `objectives.reference_of` has it."""
        return objectives.reference_of(self.op.settings)

    @property
    def tiles(self) -> int:
        """Windows in a row."""
        return pl.cdiv(self.columns, self.plan.columns)

    @property
    def groups(self) -> int:
        """Groups of 128 columns in a window."""
        return self.plan.columns // LANES

    @property
    def edge(self) -> int:
        """Groups at the end of a window whose entries are always checked for masks.

        In the last window those are the row's last group, where a padded vocabulary is masked, and
        all beyond the row.
        """
        return min(self.tiles * self.groups - (self.columns - 1) // LANES, self.groups)

    @property
    def steps(self) -> int:
        """Steps of a column loop."""
        return (self.groups - self.edge) // self.unroll

    @property
    def unroll(self) -> int:
        """Groups of 128 columns in a step of a column loop; fewer where the first checks masks."""
        checks_masks = self.has_first_pass and not self.shows_masks
        return min(self.plan.unroll, _FIRST_UNROLL_MASKED) if checks_masks else self.plan.unroll

    @property
    def shows_masks(self) -> bool:
        """Whether masked entries show in sums (`statistics.hold_unmasked`), or do not matter."""
        names = objectives.needs(self.op.settings)
        if self.stage is Stage.FIRST_PASS:
            names = names & statistics.SUMS.keys()
        return "n" not in names or any(statistics.reads_logits(name) for name in names)

    @property
    def lists(self) -> int:
        """Into how many lists, each with a length, a block's edits are split."""
        return self.plan.rows if self.edits > self.plan.rows else 1

    @property
    def phases(self) -> int:
        """How often the kernel goes over the windows of a block; 1 where each holds whole rows."""
        return 2 + self.makes_gradient if self.plan.streamed else 1

    @property
    def again(self) -> float:
        """The share of the model's logits that comes in once more."""
        held = self.plan.held if self.plan.streamed else self.tiles
        return max(0.0, 1 - held * self.plan.columns / self.columns) * self.makes_gradient

    @property
    def has_first_pass(self) -> bool:
        """Whether the first column loop is among the stage's."""
        return self.stage in (Stage.FIRST_PASS, Stage.STATISTICS, Stage.VALUE_AND_GRAD)

    @property
    def has_second_pass(self) -> bool:
        """Whether the second column loop is among the stage's."""
        return objectives.needs_second_pass(self.op.settings) and self.stage in (
            Stage.SECOND_PASS,
            Stage.STATISTICS,
            Stage.VALUE_AND_GRAD,
        )

    @property
    def branches(self) -> bool:
        """Whether the second loop over a block of kept tokens alone is less than over others."""
        c = self.op.settings
        whole = self.stage in WHOLE_ROWS and not self.plan.streamed
        less = objectives.needs(c) - objectives.needs_of(c, pushed=False)
        return whole and bool(less & statistics.SECOND_PASS.keys())

    @property
    def makes_gradient(self) -> bool:
        """Whether the stage writes a gradient."""
        return self.stage in (Stage.VALUE_AND_GRAD, Stage.GRADIENT)

    @property
    def refs(self) -> list[Any]:
        """What the kernel is given, in order: inputs, outputs, scratch."""
        inputs = ["ids", *["factors"] * bool(self.edits), "lanes", ("window", "z")]
        inputs += [("window", "r")] * (self.reference == "given")
        outputs = ["stats"] * bool(self.returned) + ["dz"] * self.makes_gradient
        return [*inputs, *outputs, *self.plan.places, *self.plan.state]

    @property
    def own(self) -> tuple[str, ...]:
        """The numbers that are the target's logits."""
        return tuple(sorted({"zy", "ry"} & objectives.reads(self.op.settings)))

    @property
    def returned(self) -> tuple[str, ...]:
        """The numbers that go out, by lane."""
        return returned(self.op, self.stage)
