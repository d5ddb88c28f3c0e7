"""Pallas TPU: a block of whole rows in VMEM, read from HBM once, its gradient written once.

A grid step has R rows of all V columns. `_whole_rows` is the algorithm, from top to bottom:

1. **Load.** Copies of what is to be changed or read again; the rows' maxima; the edits.
2. **First column loop.** The sums that need the maxima alone (`statistics.SUMS`).
3. **Second column loop**, where an objective asks for it: the sums that need the normalisers too.
4. **Statistics.** From sums to the loss's derivatives by them (`objectives`); they are stored.
5. **Gradient.** A last column loop, then the targets' own entries.

A column loop takes 128 columns of all rows at a time. Sums stay apart by lane (``[R, 128]``) until
it ends, so nothing crosses lanes inside one. Parts of a row that a later loop needs again
(``e^(z - m)``) stay in VMEM where the chip has room (`plan.py`), and share buffers.

* **Masked entries and NaN.** The loops first run as if a row had neither, but for its last group
  of 128 columns, where a padded vocabulary is masked. Where the sums show one elsewhere, the block
  runs once more with every entry checked: twice the time, for such blocks alone.
* **Blocks of kept tokens** leave out what only a pushed-down token's term reads.
* **Edits** change single entries of a private copy of the reference. The window of an operand is
  never written to: what happens to one that is not fetched again is nowhere promised.
* **The target's column of the gradient** is made by doing its group of 128 columns once more, for
  the eight rows that share its registers.
* **Ignored tokens**, where they are to be skipped, are by blocks: one of nothing else is not read,
  and zeros are written.
* **Long rows.** Where a row's parts do not fit, `_windows` holds the reference's row and goes over
  the model's in windows; where not even that fits, each column loop is a kernel of its own
  (`_in_phases`).

Exponentials and logarithms are to base 2, as the chip's are (`math.py`). On a CPU the kernels run
interpreted.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from t5patches_kernels.backends import tiling
from t5patches_kernels.backends.pallas_tpu import inputs
from t5patches_kernels.backends.pallas_tpu import plan as plans
from t5patches_kernels.backends.pallas_tpu.inputs import NONE
from t5patches_kernels.backends.pallas_tpu.math import FUNCTIONS
from t5patches_kernels.backends.pallas_tpu.plan import (
    FALLBACK_UNROLL,
    LANES,
    LATE,
    Call,
    Chip,
    Part,
)
from t5patches_kernels.core import objectives, statistics
from t5patches_kernels.core.operation import Driver, Operands, Operation, Result, Stage, Tokens
from t5patches_kernels.core.statistics import FLOOR, Array, Stats, Tile

# How kernels are interpreted. True has no side effects and so runs under every transformation;
# tests put `pltpu.InterpretParams` here for its memories, copies and races.
INTERPRET: Any = True

_SUBLANES = 8
_EDITS_A_STEP = 8
# Groups of one array that are stored together. Of several arrays each group is stored at once, as
# registers would be spilled. (v4's schedule, bfloat16: 5348 cycles of `tnff` with all of a step
# stored together, 5308 with 8; 8724 of `tnrf` with two groups of three arrays, 8463 with one.)
_STORED = 8
Group = dict[Any, Array]  # what a column loop reads or writes of 128 columns, by name or `Part`


# --- The algorithm --------------------------------------------------------------------------------


def _kernel(call: Call, *refs: Any) -> None:
    """One stage on one block of rows, or on one window of it."""
    whole = _windows if call.plan.streamed else _whole_rows
    if not call.op.skip_ignored:
        whole(_Block(call, dict(zip(call.refs, refs, strict=True))))
        return
    sources, *others = refs
    named = dict(zip(call.refs, others, strict=True))
    counts = sources[pl.program_id(0)] == pl.program_id(0)
    pl.when(counts)(lambda: whole(_Block(call, named)))

    @pl.when(~counts)
    def _skip() -> None:
        for name in ("stats", "dz"):
            if name in named:
                named[name][...] = jnp.zeros_like(named[name])


def _whole_rows(block: _Block) -> None:
    """One stage on a block of rows of which the window holds all (or all that the stage needs)."""
    call, stage = block.call, block.call.stage
    second_names = statistics.SECOND_PASS.keys()

    # Load. What comes in row by row crosses the lanes after the loop over the columns has begun.
    held: list[Part] = []  # of the row, in VMEM beside the windows
    own: Stats = {}
    known: Stats = {}
    if call.has_first_pass or call.plan.private:
        top, held = block.load("zr" if call.reference else "z")
        block.read_rows()
        if call.plan.private:
            top["rm"] = block.edited(top["rm"])
        # After that branch: the targets' logits are read while the maxima cross the lanes.
        known = block.spread(statistics.maxima(top["m"], top.get("rm")))
        own = block.target_logits() if call.has_first_pass else {}
    else:
        block.read_rows()
    known |= block.given

    def run(held: list[Part], unroll: int, *, masked: bool) -> Array:
        """Column loops, statistics, gradient; returns whether the sums stand, a scalar."""
        row = known
        add_up = partial(block.add_up, unroll=unroll, masked=masked)

        # First column loop.
        if call.has_first_pass:
            names = call.names & statistics.SUMS.keys()
            parts = tuple(p for p in call.plan.kept if p not in LATE and p not in held)
            sums, held = add_up(partial(statistics.terms, parts=parts), row, names, held, parts)
            sums = statistics.in_nats(statistics.row_sums(sums | own), FUNCTIONS)
            row = row | block.spread(sums)
            if stage is not Stage.FIRST_PASS:
                row = objectives.finish(row, block.of_tokens)

        def rest(needed: frozenset[str]) -> Array:
            # Second column loop.
            stats, there = row, held
            asked = needed & second_names if call.has_second_pass else frozenset()
            if asked:
                parts = tuple(part for part in call.plan.kept if part in LATE and "rkl" in asked)
                sums, there = add_up(statistics.second_terms, row, asked, held, parts)
                found = statistics.finish_second_pass(statistics.row_sums(sums), row, FUNCTIONS)
                stats = row | block.spread(found)
            if call.has_second_pass:  # what no row of the block reads is 0
                stats = dict.fromkeys(call.names & second_names, block.full(0.0)) | stats

            # Statistics.
            d_stats = block.d_stats
            if stage is Stage.VALUE_AND_GRAD:
                d_stats = objectives.derivatives(stats, call.op.settings, {"loss": block.full(1.0)})
                unread = second_names - needed
                d_stats = {name: x for name, x in d_stats.items() if name not in unread}
            if call.returned:
                block.store_statistics(stats)
            hold = jnp.min(jnp.where(statistics.hold_unmasked(stats), 1.0, 0.0)) > 0

            # Gradient.
            if call.makes_gradient:
                block.store_gradient(stats, d_stats, there, unroll=unroll, masked=masked)
            return hold

        if not call.branches or masked:
            return rest(call.names)
        ids = block.refs["ids"]
        any_pushed = ids[0, 0, ids.shape[2] - 1] > 0
        kept = objectives.needs_of(call.op.settings, pushed=False)
        return jax.lax.cond(any_pushed, partial(rest, call.names), partial(rest, kept))

    # Without sums that show them, masked entries have to be expected from the start.
    masked = not (call.has_first_pass and call.shows_masks)
    hold = run(held, call.unroll, masked=masked)
    if not masked:

        @pl.when(~hold)
        def _fallback() -> None:
            weights = tuple(part for part in call.plan.kept if part[0] == "weight")
            left = block.with_parts(held, weights)
            run(left, min(call.unroll, FALLBACK_UNROLL), masked=True)


def _windows(block: _Block) -> None:
    """A block of rows, a window at a time: of a row only the reference is held as a whole.

    Three phases go over the windows. In the first those of the reference come in, and their sums
    are taken; in the second those of the model come in, and with the reference's normaliser known
    all else is summed; in the third the gradient leaves. Of the model's logits the first
    `Plan.held` windows stay, and the others come in once more. Sums are relative to the maxima by
    lane that are known so far.
    """
    call, window = block.call, block.window
    last = window == call.tiles - 1
    state, settings = block.state, call.op.settings

    def add(of: str, top: Array, row: Stats, held: list[Part], parts: tuple[Part, ...]) -> None:
        """Adds the sums of a window to those of the windows before it."""
        before, m = state(of), statistics.MAXIMUM[of]
        now = {m: jnp.maximum(before[m], top)}
        sums = statistics.rebase(before, now, functions=FUNCTIONS)
        sums = {name: x for name, x in sums.items() if name not in now}
        terms = partial(statistics.terms, parts=parts)
        names = frozenset(sums)
        sums, _ = block.add_up(
            terms, row | now, names, held, parts, sums, unroll=call.unroll, masked=True
        )
        block.put(of, now | sums)

    def add_own(of: str) -> None:
        """Adds the targets' logits that are in a window."""
        block.put(f"own {of}", {name: x + block.own(of) for name, x in state(f"own {of}").items()})

    def whole_row(of: str) -> Stats:
        """The statistics of the rows, from those by lane."""
        lanes, m = state(of), statistics.MAXIMUM[of]
        row = {m: jnp.max(lanes[m], axis=-1, keepdims=True)}
        sums = statistics.rebase(lanes, row, functions=FUNCTIONS)
        sums = statistics.row_sums({name: x for name, x in sums.items() if name not in row})
        return row | statistics.in_nats(sums, FUNCTIONS)

    @pl.when(pl.program_id(1) == 0)
    def _reference() -> None:
        block.start("r")
        block.start("own r")
        top, held = block.load("r")
        if state("own r"):
            block.read_rows()
            add_own("r")
        add("r", block.edited(top["rm"]) if call.plan.private else top["rm"], {}, held, ())

        @pl.when(last)
        def _() -> None:
            found = whole_row("r")
            block.put("row", found | objectives.finish_reference(found))

    @pl.when(pl.program_id(1) == 1)
    def _model() -> None:
        block.start("z")
        block.start("own z")
        top, held = block.load("z")
        block.read_rows()
        add_own("z")
        reference = {k: x for k, x in state("row").items() if k in ("rm", "rs", "qr")}
        add("z", top["m"], reference, [("copy", "r"), *held], call.plan.kept)

        @pl.when(last)
        def _() -> None:
            row = whole_row("z") | statistics.row_sums(state("own z") | state("own r"))
            stats = objectives.finish(block.spread(row | reference), block.of_tokens)
            block.store_statistics(stats)
            if call.makes_gradient:
                d_stats = objectives.derivatives(stats, settings, {"loss": block.full(1.0)})
                block.put("row", {k: x for k, x in stats.items() if ("row", k) in block.refs})
                block.put("d_stats", d_stats)

    if not call.makes_gradient:
        return

    @pl.when(pl.program_id(1) == 2)
    def _gradient() -> None:
        @pl.when(window >= call.plan.held)
        def _() -> None:
            block.load("z")

        block.read_rows()
        held = [("copy", "z"), *(call.plan.kept or [("copy", "r")])]
        block.store_gradient(state("row"), state("d_stats"), held, unroll=call.unroll, masked=True)


# --- A block --------------------------------------------------------------------------------------


class _Block:
    """The rows of a grid step: where their columns are, and the loop over them."""

    def __init__(self, call: Call, refs: dict[Any, Any]):
        self.call, self.refs = call, refs
        self.shape = (call.plan.rows, LANES)
        self.window = pl.program_id(2) if call.tiles > 1 else 0
        # Of the window; the last of several may reach beyond the row.
        self.columns = call.columns - self.window * call.plan.columns
        self.row = jax.lax.broadcasted_iota(jnp.int32, self.shape, 0)
        self.lane = jax.lax.broadcasted_iota(jnp.int32, self.shape, 1)
        self.entry = self.row * LANES + self.lane  # tells an entry of a group by one comparison
        refs |= {part: refs[call.plan.place(part)] for part in call.plan.parts}

    def full(self, x: float) -> Array:
        return jnp.full(self.shape, x, jnp.float32)

    def spread(self, stats: Mapping[str, Array]) -> Stats:
        """Numbers of rows over the lanes."""
        return {name: jnp.broadcast_to(x, self.shape) for name, x in stats.items()}

    def read_rows(self) -> None:
        """Reads what comes in row by row; beside a column loop, as it crosses the lanes."""
        call, lanes = self.call, self.refs["lanes"][...]
        names = (*call.numbers, *call.given, *call.d_stats)
        w, bad, group, lane, *rest = (
            jnp.broadcast_to(lanes[:, k : k + 1], self.shape) for k in range(4 + len(names))
        )
        found = iter(rest)
        numbers, self.given, self.d_stats = (
            {name: next(found) for name in part}
            for part in (call.numbers, call.given, call.d_stats)
        )
        self.of_tokens: Stats = {"w": w, "bad": bad != 0.0} | numbers
        group, lane = (x.astype(jnp.int32) for x in (group, lane))
        target = group * LANES + lane - (call.columns - self.columns)
        inside = (target >= 0) & (target < call.plan.columns)
        self.targets = jnp.where(inside, target, NONE)

    # Columns

    def at(self, name: Any, start: Any, groups: int) -> Any:
        """Where some columns of the window are in an array."""
        if self.call.plan.streamed:
            place, width = self.call.plan.place(name), self.call.plan.columns
            if place == ("copy", "r"):
                start = start + self.window * width
            elif place == ("copy", "z"):  # the last place is for all windows that do not stay
                start = start + jnp.minimum(self.window, self.call.plan.held) * width
            start = pl.multiple_of(start, LANES)
        return pl.ds(start, groups * LANES)

    def read(
        self, name: Any, start: Any, groups: int, edge: int, rows: slice = slice(None)
    ) -> list[Array]:
        """Groups of 128 columns in float32. Beyond the row, in the last `edge`, they are masked."""
        x = self.refs[name][rows, self.at(name, start, groups)]
        inner = groups - edge
        wide = x[:, : inner * LANES].astype(jnp.float32) if inner else x  # faster than by group
        out = [wide[:, g * LANES : (g + 1) * LANES] for g in range(inner)]
        for g in range(inner, groups):
            group = x[:, g * LANES : (g + 1) * LANES].astype(jnp.float32)
            inside = self.lane[rows] + (start + g * LANES) < self.columns
            out.append(jnp.where(inside, group, -jnp.inf) if name[0] == "window" else group)
        return out

    def column_loop(
        self,
        reads: list[Any],
        body: Callable[[Group, bool], tuple[Stats, Group]],
        total: Stats,
        join: Callable[[Array, Array], Array] = jnp.add,
        *,
        unroll: int,
    ) -> Stats:
        """Calls ``body(read, edge) -> (terms, written)`` on each group of 128 columns.

        At the `edge` there may be columns beyond the row among them, masked. Returns `total` with
        all terms joined to it, those of a step first: shorter sums round less.
        """

        def joined(a: Stats, b: Stats) -> Stats:
            return a | {name: join(a[name], x) if name in a else x for name, x in b.items()}

        def step(start: Any, groups: int, edge: int, total: Stats) -> Stats:
            terms: Stats = {}
            wide = {name: self.read(name, start, groups, edge) for name in reads}
            written: dict[Any, list[Array]] = {}

            def store(end: int) -> None:
                for name, parts in written.items():
                    ref = self.refs[name].at[:, self.at(name, start, groups)]
                    x = jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
                    ref[:, (end - len(parts)) * LANES : end * LANES] = x.astype(ref.dtype)
                written.clear()

            for g in range(groups):
                here = {name: x[g] for name, x in wide.items()}
                more, out = body(here, g >= groups - edge)
                terms = joined(terms, more)
                for name, x in out.items():
                    written.setdefault(name, []).append(x)
                if len(out) > 1 or (g + 1) % _STORED == 0:
                    store(g + 1)
            store(groups)
            return joined(total, terms)

        edge = self.call.edge
        steps = (self.call.groups - edge) // unroll
        rest = self.call.groups - steps * unroll  # in one step with the edge: alone it would wait

        def full_step(i: Array, total: Stats) -> Stats:
            start = pl.multiple_of(i * (unroll * LANES), unroll * LANES)
            return step(start, unroll, 0, total)

        if steps:
            total = jax.lax.fori_loop(0, steps, full_step, total)
        return step(steps * unroll * LANES, rest, edge, total)

    def load(self, rows: str) -> tuple[Stats, list[Part]]:
        """Makes the copies there are to be of some windows.

        Returns the maxima by lane, and the copies.
        """
        of_self = self.call.reference == "self"
        windows = {of: ("window", "z" if of_self else of) for of in rows}
        copied = [of for of in rows if ("copy", of) in self.call.plan.parts]

        def body(x: Group, edge: bool) -> tuple[Stats, Group]:
            found = {statistics.MAXIMUM[of]: x[windows[of]] for of in rows}
            return found, {("copy", of): x[windows[of]] for of in copied}

        least = {statistics.MAXIMUM[of]: self.full(FLOOR) for of in rows}
        reads = sorted(set(windows.values()))
        top = self.column_loop(reads, body, least, jnp.maximum, unroll=self.call.unroll)
        return top, [("copy", of) for of in copied]

    def reading(
        self, held: list[Part]
    ) -> tuple[list[Any], Callable[[Group], tuple[Array, Array | None, statistics.Parts]]]:
        """What a loop reads where some parts are held, and how that becomes ``(z, r, parts)``."""

        def logits(of: str) -> Part | None:
            if ("copy", of) in held:
                return ("copy", of)
            changed = of == "r" and self.call.plan.private
            return None if changed or ("window", of) not in self.refs else ("window", of)

        kept = [part for part in held if part[0] != "copy"]
        z, r = logits("z"), logits("r")

        def split(x: Group) -> tuple[Array, Array | None, statistics.Parts]:
            return x[z], None if r is None else x[r], {part: x[part] for part in kept}

        return [*kept, *(x for x in (z, r) if x is not None)], split

    def with_parts(self, held: list[Part], parts: tuple[Part, ...]) -> list[Part]:
        """What is held once some parts are written: they may share a buffer with others."""
        taken = {self.call.plan.place(part) for part in parts}
        return [part for part in held if self.call.plan.place(part) not in taken] + list(parts)

    def add_up(
        self,
        terms: Callable[[Tile, frozenset[str]], Stats],
        row: Stats,
        names: frozenset[str],
        held: list[Part],
        parts: tuple[Part, ...],
        sums: Stats | None = None,
        *,
        unroll: int,
        masked: bool,
    ) -> tuple[Stats, list[Part]]:
        """Adds up some terms of the rows by lane, and keeps the parts that later loops read.

        Args:
          terms: of a tile, the terms of some sums.
          row: what is known of the rows.
          names: the sums.
          held: the parts that are in VMEM.
          parts: those to be held then.
          sums: what to add to; 0 without.
          unroll: groups of a step.
          masked: whether entries may be masked elsewhere than in the last group.

        Returns:
          The sums, and what is held.
        """
        reads, split = self.reading(held)

        def body(x: Group, edge: bool) -> tuple[Stats, Group]:
            z, r, known = split(x)
            unmasked = not (masked or edge)
            tile = self.tile(z, r, row, known, unmasked)
            more = terms(tile, names - {"n"} if unmasked else names)
            return more, {part: known[part] for part in parts}

        start = {name: self.full(0.0) for name in sorted(names)} if sums is None else sums
        sums = self.column_loop(reads, body, start, unroll=unroll)
        if "n" in names and not masked:
            sums["n"] += self.call.groups - self.call.edge
        return sums, self.with_parts(held, parts)

    def tile(
        self, z: Array, r: Array | None, row: Stats, known: statistics.Parts, unmasked: bool
    ) -> Tile:
        smoothing = self.call.op.settings.smoothing
        return Tile(z, r, row, smoothing, known=known, unmasked=unmasked, functions=FUNCTIONS)

    # Single entries

    def target(self, i: int) -> Array:
        """Where the group of a row's target starts; of the first where it is in none."""
        return pl.multiple_of(self.refs["ids"][0, 0, i], LANES)

    def target_logits(self) -> Stats:
        """The targets' logits, each in its lane, and 0 in the others."""
        source = {"zy": "z", "ry": "z" if self.call.reference == "self" else "r"}
        return {name: self.own(source[name]) for name in self.call.own}

    def own(self, of: str) -> Array:
        """The targets' entries of some logits, each in its lane, and 0 in the others."""
        ref = self.refs["window", of]
        out = [jnp.zeros((_SUBLANES, LANES), jnp.float32)] * (self.call.plan.rows // _SUBLANES)
        for i in range(self.call.plan.rows):
            part, row = divmod(i, _SUBLANES)
            x = ref[:, self.at(("window", of), self.target(i), 1)].astype(jnp.float32)
            here = self.row[:_SUBLANES] == row
            out[part] = jnp.where(here, x[part * _SUBLANES :][:_SUBLANES], out[part])
        here = self.lane == self.targets - inputs.group(self.targets)
        return jnp.where(here, jnp.concatenate(out, axis=0), 0.0)

    def edited(self, top: Array) -> Array:
        """Edits the copy of the reference; returns its maxima by lane, from those it had."""
        first = self.refs["ids"][0, 0, self.call.plan.rows]
        copy = ("copy", "r")

        def edited() -> Array:
            self.edit(first)
            least = {"rm": self.full(FLOOR)}

            def body(x: Group, edge: bool) -> tuple[Stats, Group]:
                return {"rm": x[copy]}, {}

            found = self.column_loop([copy], body, least, jnp.maximum, unroll=self.call.unroll)
            return found["rm"]

        return jax.lax.cond(first < self.call.lists, edited, lambda: top)

    def edit(self, first: Array) -> None:
        """Changes single entries of the copy, by the lists from the first that has an edit."""
        ids, r, call = self.refs["ids"], self.refs["copy", "r"], self.call
        after = call.plan.rows + 1
        lengths = after + call.lists
        columns = lengths + call.lists
        entry = self.entry[:_SUBLANES]

        def patch(row: Array, k: Array) -> None:
            column = ids[0, 0, columns + k]
            start = inputs.group(column)
            at = (
                pl.ds(pl.multiple_of(row & -_SUBLANES, _SUBLANES), _SUBLANES),
                self.at(("copy", "r"), pl.multiple_of(start, LANES), 1),
            )
            here = entry == (row & (_SUBLANES - 1)) * LANES + (column - start)
            x = r[at]
            r[at] = jnp.where(here, x + self.refs["factors"][0, 0, k], x)

        def a_list(n: Array) -> Array:
            def step(i: Array, carry: None) -> None:
                for j in range(_EDITS_A_STEP):
                    k = i * _EDITS_A_STEP + j
                    patch(*((k, k) if call.lists == 1 else (n, n * (call.edits // call.lists) + k)))
                return carry

            jax.lax.fori_loop(0, pl.cdiv(ids[0, 0, lengths + n], _EDITS_A_STEP), step, None)
            return ids[0, 0, after + n]

        jax.lax.while_loop(lambda n: n < call.lists, a_list, first)

    # What goes out

    def store_statistics(self, stats: Stats) -> None:
        """Writes the row statistics, one a lane."""
        out = self.full(0.0)
        for k, name in enumerate(self.call.returned):
            out = jnp.where(self.lane == k, stats[name].astype(jnp.float32), out)
        self.refs["stats"][0] = out

    def store_gradient(
        self, stats: Stats, d_stats: Stats, held: list[Part], *, unroll: int, masked: bool
    ) -> None:
        """Writes the gradient of the rows."""
        reads, split = self.reading(held)
        stats = {name: x for name, x in stats.items() if x.dtype == jnp.float32}
        table = statistics.coefficients(stats, d_stats, FUNCTIONS)

        def at(x: Group, rows: slice, is_target: Array | None, edge: bool) -> Array:
            z, r, known = split(x)
            here = {name: x[rows] for name, x in stats.items()}
            factors = {key: factor[rows] for key, factor in table.items()}
            tile = self.tile(z, r, here, known, not (masked or edge))
            return statistics.gradient(tile, factors, is_target, finite=not masked)

        def body(x: Group, edge: bool) -> tuple[Stats, Group]:
            return {}, {"dz": at(x, slice(None), None, edge)}

        self.column_loop(reads, body, {}, unroll=unroll)
        if "zy" not in d_stats:
            return
        dz = self.refs["dz"]
        for i in range(self.call.plan.rows):  # the targets' groups once more
            rows, start = slice(i & -_SUBLANES, (i & -_SUBLANES) + _SUBLANES), self.target(i)
            here = self.lane[rows] + start == self.targets[rows]
            x = {name: self.read(name, start, 1, 1, rows)[0] for name in reads}
            dz[rows, self.at("dz", start, 1)] = at(x, rows, here, True).astype(dz.dtype)

    # What is kept from window to window

    def state(self, of: str) -> Stats:
        return {key[1]: self.refs[key][...] for key in self.call.plan.state if key[0] == of}

    def put(self, of: str, stats: Stats) -> None:
        for name, x in stats.items():
            self.refs[of, name][...] = jnp.broadcast_to(x, self.shape).astype(jnp.float32)

    def start(self, of: str) -> None:
        """Nothing summed yet."""
        names = self.state(of)
        empty = {name: self.full(FLOOR if name in statistics.MAXIMA else 0.0) for name in names}
        pl.when(self.window == 0)(lambda: self.put(of, empty))


# --- The call -------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    call: Call,
    in_place: bool,
    interpret: Any,
    operands: Operands,
    tokens: Tokens,
    stats: Stats | None,
    d_stats: Stats | None,
) -> Result:
    """Runs a kernel over all rows."""
    (z,) = operands.model
    rows = z.shape[0]
    blocks = pl.cdiv(rows, call.plan.rows)
    scalars = inputs.scalars_of(call, tokens, blocks)
    logits = (z, *operands.reference)
    given = [*scalars, inputs.lanes_of(call, tokens, stats, d_stats), *logits]
    in_specs, out_specs = inputs.specs(call, scalars)
    sources = [inputs.sources_of(call, tokens, blocks)] if call.op.skip_ignored else []
    given = [*sources, *given]
    axes = tiling.axes_of_kernel("pallas_tpu", given, interpreted=bool(interpret))
    varying = jax.sharding.ManualAxisType(varying=axes)
    parts = 1 if call.plan.streamed else call.tiles  # by which numbers go out
    shapes: list[Any] = [((parts, rows, LANES), jnp.float32)] * bool(call.returned)
    shapes += [(z.shape, z.dtype)] * call.makes_gradient
    order: Any = "arbitrary" if call.plan.streamed else "parallel"
    out = pl.pallas_call(
        partial(_kernel, call),
        out_shape=[jax.ShapeDtypeStruct(*x, manual_axis_type=varying) for x in shapes],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(sources),
            grid=(blocks, call.phases, call.tiles),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((call.plan.rows, width), jnp.float32) for width in call.plan.widths
            ],
        ),
        input_output_aliases={len(given) - len(logits): len(shapes) - 1} if in_place else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", order, order),
            vmem_limit_bytes=call.plan.limit,
            # Of the windows' copies, which are Pallas's own: they take 100 cycles of a block.
            disable_bounds_checks=True,
        ),
        cost_estimate=inputs.cost(call, given, rows),
        name=f"t5patches_{call.op.settings.objective}_{call.stage.value}",
        interpret=interpret or False,
    )(*[tiling.vary_over(x, axes) for x in given])
    tiles = [
        {name: out[0][j, :, k : k + 1] for k, name in enumerate(call.returned)}
        for j in range(parts)
    ]
    return Result(_together(call, tiles), (out[-1],) if call.makes_gradient else None)


def _together(call: Call, tiles: list[Stats]) -> Stats:
    """The statistics of rows, from those of their windows."""
    if call.stage is Stage.SECOND_PASS:
        return jax.tree.map(lambda *x: sum(x[1:], x[0]), *tiles)
    found = functools.reduce(statistics.merge, tiles)
    return found | ({"bad": found["bad"] != 0.0} if "bad" in found else {})


def call_of(
    op: Operation,
    stage: Stage,
    chip: Chip,
    operands: Operands,
    tokens: Tokens,
    given: tuple[str, ...] = (),
    d_stats: tuple[str, ...] = (),
) -> Call | None:
    """The kernel of a stage on a chip, or None where it would need rows that do not fit."""
    rows, columns = operands.model[0].shape
    sizes = tuple(x.dtype.itemsize for x in (*operands.model, *operands.reference))
    second_row = objectives.reference_of(op.settings)
    edited = second_row == "given" and tokens.edit_ids is not None
    private = edited or second_row == "self"
    size = (op, stage, columns, sizes, private, chip.vmem)
    plan = plans.plan(*size, tokens=rows) or plans.streamed(*size)
    if plan is None:
        return None
    per_row = 1 if tokens.edit_ids is None else tokens.edit_ids.shape[1]
    op = dataclasses.replace(op, head=None, donate=False)  # neither changes the kernel
    if per_row > 1:
        per_row = plans.up(per_row, _EDITS_A_STEP)
    edits = plan.rows * per_row if plan.private else 0
    return Call(op, stage, plan, columns, edits, given, d_stats)


def run(
    chip: Chip,
    interpret: Any,
    op: Operation,
    stage: Stage,
    operands: Operands,
    tokens: Tokens,
    stats: Stats | None = None,
    d_stats: Stats | None = None,
) -> Result:
    """The driver (`operation.Driver`) for a chip; compiled where `interpret` is None."""
    names = tuple(sorted(stats or ())), tuple(sorted(d_stats or ()))
    call = call_of(op, stage, chip, operands, tokens, *names)
    if call is None:
        return _in_phases(partial(run, chip, interpret), op, stage, operands, tokens)
    # Those of a head are made for this. Where logits live on after all, XLA copies them first.
    in_place = call.makes_gradient and (op.donate or op.head is not None)
    return _run(call, in_place, interpret, operands, tokens, stats, d_stats)


def _in_phases(
    run: Driver, op: Operation, stage: Stage, operands: Operands, tokens: Tokens
) -> Result:
    """STATISTICS or VALUE_AND_GRAD of rows that do not fit: every column loop reads them anew."""
    c = op.settings
    stats = run(op, Stage.FIRST_PASS, operands, tokens).stats
    stats = objectives.finish(stats, tokens.of_rows())
    if objectives.needs_second_pass(c):
        stats = stats | run(op, Stage.SECOND_PASS, operands, tokens, stats).stats
    if stage is Stage.STATISTICS:
        return Result(stats)
    d_stats = objectives.derivatives(stats, c, {"loss": jnp.ones_like(stats["m"])})
    return Result(stats, run(op, Stage.GRADIENT, operands, tokens, stats, d_stats).gradient)
