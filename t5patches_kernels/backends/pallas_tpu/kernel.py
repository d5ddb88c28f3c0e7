"""Pallas TPU: a block of whole rows in VMEM, looked at as often as the objective asks.

The logits are read from HBM once and the gradient written once, whatever the objective. A grid step
has R rows of all V columns; a *sweep* goes over them 128 columns at a time and hands each group to
the specification. What is written here is only how rows are brought, kept and put away:

* Sums are kept apart by lane (``[R, 128]``) until a sweep ends: nothing crosses lanes inside one.
* Parts of a row that a later look needs again (``e^(z - m)``) stay in VMEM where the budget of the
  chip allows (`plan.py`), and take each other's place.
* Rows too long for that go through in windows, three times over. Where both fit by themselves, the
  windows are a ring: the gradient leaves from the place of the model's logits, and the next rows
  come in behind it. Else the reference's row alone is held as a whole; what does not even leave
  room for that is read once more for every look.
* A block is done as if it had no masked entry and no NaN, but for the last group of a row, where a
  padded vocabulary is masked. Where its sums show one elsewhere, it is done again with care: that
  takes about twice as long, and only such blocks pay for it.
* Exponentials and logarithms are to base 2, as the chip's are (`tpu_functions.py`).
* Edits are patches of single entries in a private copy of the reference: only those that are there
  cost anything. The window of an operand is never written to: what a kernel may do to one that is
  not fetched again is nowhere promised.
* The target's own column of the gradient is made by doing its group of 128 columns once more, for
  the eight rows that share its registers; in a ring it is added.
* What belongs to rows crosses the lanes beside a sweep, which otherwise would wait for it.

On a machine without a TPU the kernels run interpreted.
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
from t5patches_kernels.backends.pallas_tpu import plan as plans
from t5patches_kernels.backends.pallas_tpu.math import FUNCTIONS
from t5patches_kernels.backends.pallas_tpu.plan import LANES, LATE, Chip, Part, Plan
from t5patches_kernels.core import objectives, statistics
from t5patches_kernels.core.operation import Operands, Operation, Result, Stage, Tokens
from t5patches_kernels.core.statistics import FLOOR, Array, Either, Numbers, Tile

# How kernels are interpreted. True has no side effects and so runs under every transformation;
# tests put `pltpu.InterpretParams` here for its memories, copies and races.
INTERPRET: Any = True

_NO_VMA = (
    'implementation="pallas_tpu" on a machine without a TPU: JAX cannot interpret a kernel inside '
    'jax.shard_map with check_vma=True. Pass check_vma=False, or implementation="xla".'
)
_SUBLANES = 8
_CORES = 2  # of a chip, at most
_NONE = 1 << 30  # no column: its group is the first, its lane in none
# Groups in a step of the careful way, which takes its time to compile like any other.
_CAREFUL_UNROLL = 8
_FIRST_WITH_CARE = 32
_EDITS_A_STEP = 8
# Groups of one array that are stored together. Of several arrays each group is stored at once, as
# registers would be spilled. (v4's schedule, bfloat16: 5348 cycles of `tnff` with all of a step
# stored together, 5308 with 8; 8724 of `tnrf` with two groups of three arrays, 8463 with one.)
_STORED = 8
Group = dict[Any, Array]  # what a sweep reads or writes of 128 columns, by name or `Part`


@dataclasses.dataclass(frozen=True)
class _Call:
    """Everything static about a kernel."""

    op: Operation
    stage: Stage
    plan: Plan
    columns: int
    edits: int  # places for edits a block has, the same for each row; 0 without a changed reference
    given: tuple[str, ...]  # the numbers that come in, by lane
    by: tuple[str, ...]  # the derivatives that come in, by lane after those

    @property
    def reference(self) -> str | None:
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
        """Groups at the end of a window that are always done with care.

        In the last window those are the row's last group, where a padded vocabulary is masked, and
        all beyond the row.
        """
        return min(self.tiles * self.groups - (self.columns - 1) // LANES, self.groups)

    @property
    def steps(self) -> int:
        """Steps of a sweep's loop."""
        return (self.groups - self.edge) // self.unroll

    @property
    def unroll(self) -> int:
        """Groups of 128 columns in a step of a sweep: a first look with care spills more."""
        with_care = self.looks_first and not self.shows_masks
        return min(self.plan.unroll, _FIRST_WITH_CARE) if with_care else self.plan.unroll

    @property
    def shows_masks(self) -> bool:
        """Whether a masked entry shows in the sums (`statistics.stand`), or makes no difference."""
        names = objectives.needs(self.op.settings)
        if self.stage is Stage.FIRST:
            names = names & statistics.SUMS.keys()
        return "n" not in names or any(statistics.reads_logits(name) for name in names)

    @property
    def lists(self) -> int:
        """Into how many lists, each with a length, a block's edits are split."""
        return self.plan.rows if self.edits > self.plan.rows else 1

    @property
    def phases(self) -> int:
        """How often the windows of a block are gone over, where that is not once a look."""
        return 2 + self.makes_gradient if self.plan.streamed else 1

    @property
    def again(self) -> float:
        """The share of the model's logits that comes in once more."""
        held = self.plan.held if self.plan.streamed else self.tiles
        return max(0.0, 1 - held * self.plan.columns / self.columns) * self.makes_gradient

    @property
    def looks_first(self) -> bool:
        return self.stage in (Stage.FIRST, Stage.NUMBERS, Stage.VISIT)

    @property
    def looks_again(self) -> bool:
        return objectives.looks_twice(self.op.settings) and self.stage in (
            Stage.SECOND,
            Stage.NUMBERS,
            Stage.VISIT,
        )

    @property
    def either(self) -> Either | None:
        """Numbers that share a sum, and columns of the gradient that share a place."""
        whole = self.stage in (Stage.NUMBERS, Stage.VISIT) and not self.plan.streamed
        return objectives.either(self.op.settings) if whole else None

    @property
    def makes_gradient(self) -> bool:
        return self.stage in (Stage.VISIT, Stage.GRADIENT)

    @property
    def refs(self) -> list[Any]:
        """What the kernel is given, in order: inputs, outputs, scratch."""
        window = "all" if self.plan.ring else "window"
        inputs = ["ids", *["factors"] * bool(self.edits), "lanes", (window, "z")]
        inputs += [(window, "r")] * (self.reference == "given")
        dz = ("all", "dz") if self.plan.ring else "dz"
        outputs = ["numbers"] * bool(self.returned) + [dz] * self.makes_gradient
        copied = [("copied", of) for of in ("z", "r", "dz")] * self.plan.ring
        return [*inputs, *outputs, *self.plan.places, *self.plan.state, *copied]

    @property
    def axis(self) -> int:
        """Of the grid, the one of phases; the next is that of windows."""
        return 2 if self.plan.ring else 1

    @property
    def own(self) -> tuple[str, ...]:
        """The numbers that are the target's logits."""
        return tuple(sorted({"zy", "ry"} & objectives.reads(self.op.settings)))

    @property
    def returned(self) -> tuple[str, ...]:
        """The numbers that go out, by lane."""
        names = objectives.needs(self.op.settings)
        second = names & statistics.SECOND_LOOK.keys()
        if self.stage is Stage.SECOND:
            return tuple(sorted(second))
        if self.stage is Stage.GRADIENT:
            return ()
        pair = {"m", *self.own} | ({"rm"} if self.reference else set())
        if self.stage is Stage.FIRST:
            return tuple(sorted(pair | (names - second)))
        return tuple(sorted(pair | names | {"w", "bad"}))


# --- The kernel -----------------------------------------------------------------------------------


class _Block:
    """The rows of a grid step."""

    def __init__(self, call: _Call, refs: dict[Any, Any]):
        self.call, self.refs = call, refs
        self.names = objectives.needs(call.op.settings)
        self.shape = (call.plan.rows, LANES)
        # Of the window; the last of several may reach beyond the row.
        self.columns: int | Array = call.columns
        if call.tiles > 1:
            self.columns = call.columns - pl.program_id(call.axis + 1) * call.plan.columns
        self.row = jax.lax.broadcasted_iota(jnp.int32, self.shape, 0)
        self.lane = jax.lax.broadcasted_iota(jnp.int32, self.shape, 1)
        self.entry = self.row * LANES + self.lane  # tells an entry of a group by one comparison
        refs |= {part: refs[call.plan.place(part)] for part in call.plan.parts}
        self.there: list[Part] = []  # the parts that are in their place
        self.targets_logits: Numbers = {}  # by lane: they cross the lanes with the first sums
        # Without sums that show them, masked entries have to be expected.
        self.careful = not (call.looks_first and call.shows_masks)
        self.pushed = True  # a row's token may be pushed down
        self.unroll = call.unroll

    def full(self, x: float) -> Array:
        return jnp.full(self.shape, x, jnp.float32)

    def read_rows(self) -> None:
        """Reads what comes in row by row; after a sweep, during which it crosses the lanes."""
        call, lanes = self.call, self.refs["lanes"][...]
        columns = range(4 + len(call.given) + len(call.by))
        self.w, bad, group, lane, *rest = (
            jnp.broadcast_to(lanes[:, k : k + 1], self.shape) for k in columns
        )
        self.bad = bad != 0.0
        self.numbers = dict(zip(call.given, rest, strict=False))
        self.by = dict(zip(call.by, rest[len(call.given) :], strict=True))
        group, lane = (x.astype(jnp.int32) for x in (group, lane))
        target = group * LANES + lane - (call.columns - self.columns)
        inside = (target >= 0) & (target < call.plan.columns)
        self.targets = jnp.where(inside, target, _NONE)

    def spread(self, numbers: Mapping[str, Array]) -> Numbers:
        """Numbers of rows over the lanes."""
        return {name: jnp.broadcast_to(x, self.shape) for name, x in numbers.items()}

    def at(self, name: Any, start: Any, groups: int) -> Any:
        """Where some columns of the window are in an array."""
        return pl.ds(start, groups * LANES)

    def load(
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

    def logits(self, of: str) -> Part | None:
        """Where the model's or the reference's logits are to be read."""
        if ("copy", of) in self.there:
            return ("copy", of)
        changed = of == "r" and self.call.plan.private
        return None if changed or ("window", of) not in self.refs else ("window", of)

    def sweep(
        self,
        reads: list[Any],
        body: Callable[[Group, bool], tuple[Numbers, Group]],
        total: Numbers,
        join: Callable[[Array, Array], Array] = jnp.add,
        short_rest: bool = False,
    ) -> Numbers:
        """Calls ``body(read, edge) -> (terms, written)`` on each group of 128 columns.

        At the `edge` there may be columns beyond the row among them, masked. Returns `total` with
        all terms joined to it, those of a step first: shorter sums round less. With `short_rest`
        the steps of the loop are longer, and leave less to the one after it.
        """

        def joined(a: Numbers, b: Numbers) -> Numbers:
            return a | {name: join(a[name], x) if name in a else x for name, x in b.items()}

        def step(start: Any, groups: int, edge: int, total: Numbers) -> Numbers:
            terms: Numbers = {}
            wide = {name: self.load(name, start, groups, edge) for name in reads}
            written: dict[Any, list[Array]] = {}

            def place(name: Any, first: int, end: int) -> tuple[Any, slice]:
                ref = self.refs[name].at[:, self.at(name, start, groups)]
                return ref, slice(first * LANES, end * LANES)

            def store(end: int) -> None:
                for name, parts in written.items():
                    ref, columns = place(name, end - len(parts), end)
                    x = jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
                    ref[:, columns] = x.astype(ref.dtype)
                written.clear()

            def choose(name: Any, g: int, x: statistics.Choice) -> None:
                # A store under a mask is no arithmetic, of which a second look has the most.
                ref, columns = place(name, g, g + 1)
                ref[:, columns] = x.kept
                there = ref.at[:, columns]
                if plans.target() is None:
                    # The interpreter loses its way to a slice of a slice; on v4 one slice of the
                    # whole takes this look 13% more cycles.
                    there = self.refs[name].at[:, self.at(name, start + g * LANES, 1)]
                pltpu.store(there, x.pushed, mask=x.is_pushed)

            for g in range(groups):
                here = {name: x[g] for name, x in wide.items()}
                more, out = body(here, g >= groups - edge)
                terms = joined(terms, more)
                for name, x in out.items():
                    if isinstance(x, statistics.Choice):
                        choose(name, g, x)
                    else:
                        written.setdefault(name, []).append(x)
                if len(out) > 1 or (g + 1) % _STORED == 0:
                    store(g + 1)
            store(groups)
            return joined(total, terms)

        edge = self.call.edge
        steps = (self.call.groups - edge) // self.unroll
        width = (self.call.groups - edge) // steps if steps and short_rest else self.unroll
        rest = self.call.groups - steps * width  # in one step with the edge: alone it would wait

        def full_step(i: Array, total: Numbers) -> Numbers:
            return step(pl.multiple_of(i * (width * LANES), width * LANES), width, 0, total)

        if steps:
            total = jax.lax.fori_loop(0, steps, full_step, total)
        return step(steps * width * LANES, rest, edge, total)

    # Single entries

    def target(self, i: int) -> Array:
        """Where the group of a row's target starts; of the first where it is in none."""
        return pl.multiple_of(self.refs["ids"][0, 0, i], LANES)

    def own_logits(self) -> Numbers:
        """The targets' logits, each in its lane, and 0 in the others."""
        source = {"zy": "z", "ry": "z" if self.call.reference == "self" else "r"}
        return {name: self.own(source[name]) for name in self.call.own}

    def own(self, of: str) -> Array:
        """The targets' entries of some logits, each in its lane, and 0 in the others."""
        ref = self.refs["window", of]
        at = partial(self.at, ("window", of), groups=1)
        out = [jnp.zeros((_SUBLANES, LANES), jnp.float32)] * (self.call.plan.rows // _SUBLANES)
        for i in range(self.call.plan.rows):
            part, row = divmod(i, _SUBLANES)
            x = ref[:, at(self.target(i))].astype(jnp.float32)
            here = self.row[:_SUBLANES] == row
            out[part] = jnp.where(here, x[part * _SUBLANES :][:_SUBLANES], out[part])
        here = self.lane == self.targets - _group(self.targets)
        return jnp.where(here, jnp.concatenate(out, axis=0), 0.0)

    def edit(self, first: Array) -> None:
        """Patches the copy of the reference, by the lists from the first that has an edit."""
        ids, r, call = self.refs["ids"], self.refs["copy", "r"], self.call
        after = call.plan.rows + 1
        lengths = after + call.lists
        columns = lengths + call.lists
        entry = self.entry[:_SUBLANES]

        def patch(row: Array, k: Array) -> None:
            column = ids[0, 0, columns + k]
            start = _group(column)
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

    # Looks

    def bring(self) -> None:
        """Makes the copies, and reads what comes in row by row; takes maxima, targets' logits."""
        top = self.copy("zr" if self.call.reference else "z")
        self.read_rows()
        if self.call.plan.private:
            top["rm"] = self.changed(top["rm"])
        # Behind that branch: the targets' logits are read while the maxima cross the lanes.
        self.numbers = self.spread(statistics.maxima(top["m"], top.get("rm"))) | self.numbers
        if self.call.looks_first:
            self.targets_logits = self.own_logits()

    def copy(self, rows: str) -> Numbers:
        """Makes the copies there are to be of some windows; returns the maxima by lane."""
        of_self = self.call.reference == "self"
        windows = {of: ("window", "z" if of_self else of) for of in rows}
        copies = [of for of in rows if ("copy", of) in self.call.plan.parts]

        def body(x: Group, edge: bool) -> tuple[Numbers, Group]:
            found = {statistics.MAXIMUM[of]: x[windows[of]] for of in rows}
            # What has come to its place stays as it is, but for what is beyond the row.
            stored = copies if edge or not self.call.plan.ring else []
            return found, {("copy", of): x[windows[of]] for of in stored}

        least = {statistics.MAXIMUM[of]: self.full(FLOOR) for of in rows}
        self.there += [("copy", of) for of in copies]
        return self.sweep(sorted(set(windows.values())), body, least, jnp.maximum)

    def changed(self, top: Array) -> Array:
        """Edits the copy of the reference; returns its maxima by lane, from those it had."""
        first = self.refs["ids"][0, 0, self.call.plan.rows]
        copy = ("copy", "r")

        def edited() -> Array:
            self.edit(first)
            least = {"rm": self.full(FLOOR)}
            found = self.sweep([copy], lambda x, edge: ({"rm": x[copy]}, {}), least, jnp.maximum)
            return found["rm"]

        return jax.lax.cond(first < self.call.lists, edited, lambda: top)

    def reading(self) -> tuple[list[Any], Callable[[Group], tuple[Array, Array | None, dict]]]:
        """What a later look reads, and how that becomes ``(z, r, parts)``."""
        kept = [part for part in self.there if part[0] != "copy"]
        z, r = self.logits("z"), self.logits("r")

        def split(x: Group) -> tuple[Array, Array | None, dict]:
            return x[z], None if r is None else x[r], {part: x[part] for part in kept}

        return [*kept, *(x for x in (z, r) if x is not None)], split

    def tile(
        self, z: Array, r: Array | None, row: Numbers, known: statistics.Parts, unmasked: bool
    ) -> Tile:
        c = self.call.op.settings
        return Tile(
            z, r, row, c.smoothing,
            known=known, unmasked=unmasked, pushed=self.pushed, functions=FUNCTIONS,
        )  # fmt: skip

    def look(
        self,
        terms: Callable[[Tile, frozenset[str]], Numbers],
        row: Numbers,
        names: frozenset[str],
        parts: tuple[Part, ...],
        sums: Numbers | None = None,
        short_rest: bool = False,
    ) -> Numbers:
        """Adds up some terms of the rows, by lane, and keeps the parts that are worth it."""
        reads, split = self.reading()

        def body(x: Group, edge: bool) -> tuple[Numbers, Group]:
            z, r, known = split(x)
            unmasked = not (self.careful or edge)
            asked = names - {"n"} if unmasked else names
            more = terms(self.tile(z, r, row, known, unmasked), asked)
            return more, {part: known[part] for part in parts}

        start = {name: self.full(0.0) for name in sorted(names)} if sums is None else sums
        sums = self.sweep(reads, body, start, short_rest=short_rest)
        if "n" in names and not self.careful:
            sums["n"] += self.call.groups - self.call.edge
        place = self.call.plan.place
        taken = {place(part) for part in parts}
        self.there = [part for part in self.there if place(part) not in taken] + list(parts)
        return sums

    def first_look(self, row: Numbers) -> Numbers:
        """The sums of the rows."""
        names = self.names & statistics.SUMS.keys() - set(self.call.either or ())
        parts = tuple(p for p in self.call.plan.kept if p not in LATE and p not in self.there)
        terms = partial(statistics.terms, parts=parts)
        lanes = self.look(terms, row, names, parts) | self.targets_logits
        return self.spread(statistics.in_nats(statistics.row_sums(lanes), FUNCTIONS))

    def second_look(self, row: Numbers) -> Numbers:
        """The sums that need the rows' normalisers."""
        either = self.call.either
        names = self.names & statistics.SECOND_LOOK.keys() - set(either or ())
        summed = names | ({either.kept} if either else set())
        parts = tuple(p for p in self.call.plan.kept if p in LATE)
        there = self.there

        # Behind the loop v4's compiler takes a third more bundles to store choices, and spills.
        chooses = either is not None and bool(either.weight)

        def look(pushed: bool) -> Numbers:
            self.there, self.pushed = there, pushed
            terms = lambda tile, _: statistics.second_terms(tile, names, either)  # noqa: E731
            found = self.look(terms, row, summed, parts, short_rest=chooses and pushed)
            self.pushed = True
            return found

        if either is None or self.careful:
            found = look(True)
        else:  # most tokens are kept, and their sum takes half as long
            ids = self.refs["ids"]
            any_pushed = ids[0, 0, ids.shape[2] - 1] > 0
            found = jax.lax.cond(any_pushed, partial(look, True), partial(look, False))
        sums = statistics.row_sums(found)
        return self.spread(statistics.finish_second(sums, row, either, FUNCTIONS))

    def gradient(self, row: Numbers, by: Numbers) -> None:
        """Writes the gradient of the rows."""
        reads, split = self.reading()
        row = {name: x for name, x in row.items() if x.dtype == jnp.float32}
        table = statistics.coefficients(row, by, self.call.either, FUNCTIONS)

        def at(x: Group, rows: slice, is_target: Array | None, edge: bool) -> Array:
            z, r, known = split(x)
            here = {name: x[rows] for name, x in row.items()}
            factors = {key: factor[rows] for key, factor in table.items()}
            tile = self.tile(z, r, here, known, not (self.careful or edge))
            return statistics.gradient(tile, factors, is_target, finite=not self.careful)

        self.sweep(reads, lambda x, edge: ({}, {"dz": at(x, slice(None), None, edge)}), {})
        if "zy" in by:
            self.patch_targets(reads, at, table["zy"])

    def patch_targets(
        self, reads: list[Any], at: Callable[[Group, slice, Array, bool], Array], own: Array
    ) -> None:
        """Puts the targets into the gradient of their groups."""
        dz = self.refs["dz"]
        for i in range(self.call.plan.rows):
            rows, start = slice(i & -_SUBLANES, (i & -_SUBLANES) + _SUBLANES), self.target(i)
            group = rows, self.at("dz", start, 1)
            here = self.lane[rows] + start == self.targets[rows]
            if self.call.plan.ring:  # it is where what it was made of has been
                here &= self.row[rows] == i  # what the other rows' targets add, they add themselves
                dz[group] += jnp.where(here, own[rows], 0.0)
            else:
                x = {name: self.load(name, start, 1, 1, rows)[0] for name in reads}
                dz[group] = at(x, rows, here, True).astype(dz.dtype)

    def work(self) -> Array:
        """The stage, once the copies are there; returns whether its sums stand, a scalar."""
        call, numbers, by = self.call, self.numbers, self.by
        if call.either:
            numbers = numbers | call.either.first(numbers | {"w": self.w})
        if call.looks_first:
            numbers = numbers | self.first_look(numbers)
            if call.stage is not Stage.FIRST:
                numbers = objectives.finish(numbers, self.w, self.bad)
        if call.either:
            numbers = numbers | call.either.second(numbers, call.op.settings.smoothing)
        if call.looks_again:
            numbers = numbers | self.second_look(numbers)
        if call.stage is Stage.VISIT:
            by = self.derivatives(numbers)
        if call.returned:
            self.give(numbers)
        stands = jnp.min(jnp.where(statistics.stand(numbers), 1.0, 0.0)) > 0
        if call.makes_gradient:
            self.gradient(numbers, by)
        return stands

    def derivatives(self, numbers: Numbers) -> Numbers:
        """The derivatives of the loss by the numbers of the rows."""
        return objectives.derivatives(numbers, self.call.op.settings, {"loss": self.full(1.0)})

    def give(self, numbers: Numbers) -> None:
        """Writes the numbers that go out."""
        out = self.full(0.0)
        for k, name in enumerate(self.call.returned):
            out = jnp.where(self.lane == k, numbers[name].astype(jnp.float32), out)
        self.refs["numbers"][0] = out


class _Streamed(_Block):
    """The rows of a block, a window at a time: of a row only the reference is held as a whole.

    Three phases go over the windows of a block. In the first those of the reference come in, and
    their sums are taken; in the second those of the model come in, and with the reference's
    normaliser known all else can be summed; in the third the gradient leaves. Of the model's
    logits the first `Plan.held` windows stay, and the others come in once more.
    """

    def __init__(self, call: _Call, refs: dict[Any, Any]):
        super().__init__(call, refs)
        self.careful = True
        self.exists: bool | Array = True  # a block at this step
        self.window = pl.program_id(call.axis + 1)
        self.columns = call.columns - self.window * call.plan.columns

    def at(self, name: Any, start: Any, groups: int) -> Any:
        place = self.call.plan.place(name)
        if place == ("copy", "r"):
            start = start + self.window * self.call.plan.columns
        elif place == ("copy", "z"):  # the last place is for all that do not stay
            start = start + jnp.minimum(self.window, self.call.plan.held) * self.call.plan.columns
        return pl.ds(pl.multiple_of(start, LANES), groups * LANES)

    def get(self, of: str) -> Numbers:
        """Numbers that are kept from window to window."""
        return {key[1]: self.refs[key][...] for key in self.call.plan.state if key[0] == of}

    def put(self, of: str, numbers: Numbers) -> None:
        for name, x in numbers.items():
            self.refs[of, name][...] = jnp.broadcast_to(x, self.shape).astype(jnp.float32)

    def start(self, of: str) -> None:
        """Nothing summed yet."""
        names = self.get(of)
        empty = {name: self.full(FLOOR if name in statistics.MAXIMA else 0.0) for name in names}
        pl.when(self.window == 0)(lambda: self.put(of, empty))

    def add(self, of: str, top: Array, row: Numbers, parts: tuple[Part, ...]) -> None:
        """Adds what is summed of a window, relative to the maxima by lane that are then known."""
        before = self.get(of)
        m = statistics.MAXIMUM[of]
        now = {m: jnp.maximum(before[m], top)}
        sums = statistics.rebase(before, now, functions=FUNCTIONS)
        sums = {k: x for k, x in sums.items() if k not in now}
        terms = partial(statistics.terms, parts=parts)
        self.put(of, now | self.look(terms, row | now, frozenset(sums), parts, sums))

    def whole(self, of: str) -> Numbers:
        """The numbers of the rows, from what was kept by lane."""
        numbers, m = self.get(of), statistics.MAXIMUM[of]
        row = {m: jnp.max(numbers[m], axis=-1, keepdims=True)}
        sums = statistics.rebase(numbers, row, functions=FUNCTIONS)
        sums = statistics.row_sums({k: x for k, x in sums.items() if k not in row})
        return row | statistics.in_nats(sums, FUNCTIONS)

    def reference_phase(self) -> None:
        """The sums of the reference alone."""
        self.start("r")
        top = self.copy("r")["rm"]
        top = self.changed(top) if self.call.plan.private else top
        self.add("r", top, {}, ())

        @pl.when(self.window == self.call.tiles - 1)
        def _() -> None:
            found = self.whole("r")
            self.put("row", found | objectives.finish_reference(found))

    def model_phase(self) -> None:
        """All other sums, and what follows from them."""
        self.start("z")
        self.start("own")
        self.there = [("copy", "r")]
        top = self.copy("z")["m"]
        self.read_rows()
        self.put("own", {name: x + self.own("z") for name, x in self.get("own").items()})
        of_reference = {k: x for k, x in self.get("row").items() if k in ("rm", "rs", "qr")}
        self.add("z", top, of_reference, self.call.plan.kept)

        @pl.when(self.window == self.call.tiles - 1)
        def _() -> None:
            numbers = self.whole("z") | statistics.row_sums(self.get("own"))
            numbers = objectives.finish(self.spread(numbers | of_reference), self.w, self.bad)
            self.give(numbers)
            if self.call.makes_gradient:
                self.put("row", {k: x for k, x in numbers.items() if ("row", k) in self.refs})
                self.put("by", self.derivatives(numbers))

    def gradient_phase(self) -> None:
        """The gradient of a window."""

        @pl.when(self.window >= self.call.plan.held)
        def _() -> None:
            self.copy("z")

        self.read_rows()
        self.there = [("copy", "z"), *(self.call.plan.kept or [("copy", "r")])]
        self.gradient(self.get("row"), self.get("by"))


class _Ring(_Streamed):
    """Windows that come to the place where they are held, and leave from it.

    The gradient is written over the model's logits. Once a window of it is written, the reference's
    logits of the next block take the place of this one's; once it has left, the model's take its
    own. So all copies but the first block's have most of a block's time, in the order in which
    they are needed, and no array passes through twice.
    """

    def __init__(self, call: _Call, refs: dict[Any, Any]):
        super().__init__(call, refs)
        refs |= {("window", of): refs["copy", of] for of in "zr"} | {"dz": refs["copy", "z"]}
        blocks, each = refs["all", "z"].shape[0] // call.plan.rows, pl.num_programs(1)
        self.block = pl.program_id(0) * each + pl.program_id(1)
        self.exists = self.block < blocks
        self.is_first = pl.program_id(1) == 0  # of its core
        self.is_last = (pl.program_id(1) == each - 1) | (self.block == blocks - 1)

    def at(self, name: Any, start: Any, groups: int) -> Any:
        start = start + self.window * self.call.plan.columns
        return pl.ds(pl.multiple_of(start, LANES), groups * LANES)

    def transfer(
        self, of: str, window: Array, do: Callable[[Any], None], block: Array | int = 0
    ) -> None:
        """Does something with the copy of a window: the last one is shorter."""
        width, last = self.call.plan.columns, self.call.tiles - 1
        first = jnp.asarray(block * self.call.plan.rows, jnp.int32)
        rows = pl.ds(pl.multiple_of(first, _SUBLANES), self.call.plan.rows)

        def some(columns: int) -> None:
            at = pl.ds(pl.multiple_of(window * width, LANES), columns)
            there = self.refs["all", of].at[rows, at]
            here = self.refs["copy", "r" if of == "r" else "z"].at[:, at]
            pair = (here, there) if of == "dz" else (there, here)
            do(pltpu.make_async_copy(*pair, self.refs["copied", of].at[window]))

        pl.when(window < last)(lambda: some(width))
        pl.when(window == last)(lambda: some(self.call.columns - last * width))

    def begin(self, of: str, window: Array, block: Array) -> None:
        """Starts a copy."""
        self.transfer(of, window, lambda copy: copy.start(), block)

    def wait(self, of: str, window: Array) -> None:
        """Waits for a copy."""
        self.transfer(of, window, lambda copy: copy.wait())

    def all_windows(self, do: Callable[[Array], None]) -> None:
        """Does something for each window."""
        jax.lax.fori_loop(0, self.call.tiles, lambda i, _: do(i), None)

    def reference_phase(self) -> None:
        @pl.when(self.is_first & (self.window == 0))
        def _() -> None:
            for of in "rz":
                self.all_windows(partial(self.begin, of, block=self.block))

        self.wait("r", self.window)
        super().reference_phase()

        @pl.when(~self.is_first)
        def _() -> None:
            self.wait("dz", self.window)
            self.begin("z", self.window, self.block)

    def model_phase(self) -> None:
        self.wait("z", self.window)
        super().model_phase()

    def gradient_phase(self) -> None:
        super().gradient_phase()
        self.begin("dz", self.window, self.block)
        pl.when(~self.is_last)(lambda: self.begin("r", self.window, self.block + 1))

        @pl.when(self.is_last & (self.window == self.call.tiles - 1))
        def _() -> None:
            self.all_windows(partial(self.wait, "dz"))


def _kernel(call: _Call, *refs: Any) -> None:
    """One stage on one block of rows, or on one window of it."""
    of = _Ring if call.plan.ring else _Streamed if call.plan.streamed else _Block
    block = of(call, dict(zip(call.refs, refs, strict=True)))
    if isinstance(block, _Streamed):
        phases = (block.reference_phase, block.model_phase, block.gradient_phase)
        for k, phase in enumerate(phases[: call.phases]):
            pl.when((pl.program_id(call.axis) == k) & block.exists)(phase)
        return

    if call.looks_first or call.plan.private:
        block.bring()
    else:
        block.read_rows()
    stands = block.work()
    if block.careful:
        return

    @pl.when(~stands)
    def _again() -> None:
        block.careful, block.unroll = True, min(block.unroll, _CAREFUL_UNROLL)
        block.there = [part for part in block.there if part[0] in ("copy", "weight")]
        block.work()


# --- What goes in and comes out -------------------------------------------------------------------


def _within(call: _Call, ids: Array) -> Array:
    """Ids ``[n, R]`` as columns of each window ``[n, tiles, R]``, `_NONE` where they are not in."""
    first = jnp.arange(call.tiles, dtype=jnp.int32)[None, :, None] * call.plan.columns
    local = ids[:, None, :] - first
    here = (local >= 0) & (local < call.plan.columns) & (ids < call.columns)[:, None, :]
    return jnp.where(here, local, _NONE)


def _group(column: Array) -> Array:
    """Where the group of a column starts."""
    return column & (_NONE - LANES)


def _edit_list(call: _Call, ids: Array, log_factors: Array) -> tuple[Array, Array]:
    """The edits by window: which lists have any, their lengths, and columns; and their factors.

    The first of these is the first list that has an edit, and one after each list the next, so that
    the others take no time. A list is as long as to its last edit. It is not sorted: that would
    take XLA longer than the kernel takes to pass over places without one.

    Args:
      call: the kernel.
      ids: columns ``[n, R * K]``; those that are out of the row stand for none.
      log_factors: ``[n, R * K]``.
    """
    blocks, rows = ids.shape[0], call.plan.rows

    def padded(x: Array, fill: float) -> Array:
        x = x.reshape(blocks, rows, -1)
        pad = ((0, 0), (0, 0), (0, call.edits // rows - x.shape[2]))
        return jnp.pad(x, pad, constant_values=fill).reshape(blocks, -1)

    local = _within(call, padded(ids, call.columns))
    log_factors = jnp.broadcast_to(padded(log_factors, 0.0)[:, None, :], local.shape)
    there = ((local < _NONE) & (log_factors != 0.0)).reshape(blocks, call.tiles, call.lists, -1)
    place = jax.lax.broadcasted_iota(jnp.int32, there.shape, 3)
    length = jnp.max(jnp.where(there, place + 1, 0), axis=3)
    n = jax.lax.broadcasted_iota(jnp.int32, length.shape, 2)
    after = jax.lax.cummin(jnp.where(length > 0, n, call.lists), axis=2, reverse=True)
    none = jnp.full_like(after[..., :1], call.lists)
    return jnp.concatenate([after, none, length, local], axis=2), log_factors


def _scalars(call: _Call, tokens: Tokens, blocks: int) -> list[Array]:
    """What the kernel reads entry by entry ``[windows, 1, n]``: targets' groups, edits, a flag."""

    def by_block(x: Array, fill: float) -> Array:
        pad = ((0, blocks * call.plan.rows - x.shape[0]),) + ((0, 0),) * (x.ndim - 1)
        return jnp.pad(x, pad, constant_values=fill).reshape(blocks, -1)

    ids = [_group(_within(call, by_block(tokens.targets, call.columns)))]
    factors = []
    if call.edits and tokens.edit_ids is not None and tokens.log_factors is not None:
        found = by_block(tokens.edit_ids, call.columns), by_block(tokens.log_factors, 0.0)
        edits, log_factors = _edit_list(call, *found)
        ids.append(edits)
        factors.append(log_factors)
    elif call.edits:  # a private copy without a change
        places = 1 + 2 * call.lists + call.edits
        ids.append(jnp.full((blocks, call.tiles, places), call.lists, jnp.int32))
        factors.append(jnp.zeros((blocks, call.tiles, call.edits), jnp.float32))
    if call.either:  # whether a block has any token pushed down
        pushed = jnp.any(by_block(tokens.weights, 0.0) < 0, axis=1).astype(jnp.int32)
        ids.append(jnp.broadcast_to(pushed[:, None, None], (blocks, call.tiles, 1)))
    arrays = [jnp.concatenate(ids, axis=2), *factors]
    return [x.reshape(blocks * call.tiles, 1, -1) for x in arrays]


def _lanes(call: _Call, tokens: Tokens, numbers: Numbers | None, by: Numbers | None) -> Array:
    """What the kernel reads row by row ``[T, 128]``: a narrower array would be padded to that."""
    inside = (tokens.targets >= 0) & (tokens.targets < call.columns)
    target = jnp.where(inside, tokens.targets, -1)
    parts = divmod(target, LANES)  # float32 has not every whole number beyond 2^24
    columns = [x[:, None] for x in (tokens.weights, tokens.bad, *parts)]
    columns += [(numbers or {})[name] for name in call.given]
    columns += [(by or {})[name] for name in call.by]
    lanes = jnp.concatenate([x.astype(jnp.float32) for x in columns], axis=1)
    return jnp.pad(lanes, ((0, 0), (0, LANES - lanes.shape[1])))


def _grid(call: _Call, blocks: int) -> tuple[tuple[int, ...], Callable[..., tuple[Any, Any, Any]]]:
    """The grid, and which block, phase and window a step of it is of."""
    if not call.plan.ring:
        return (blocks, call.phases, call.tiles), lambda i, p, j: (i, p, j)
    # A core has to know its first and last block.
    cores = min(blocks, _CORES)
    each = pl.cdiv(blocks, cores)
    of = lambda c, i, p, j: (jnp.minimum(c * each + i, blocks - 1), p, j)  # noqa: E731
    return (cores, each, call.phases, call.tiles), of


def _specs(
    call: _Call, scalars: list[Array], of: Callable[..., tuple[Any, Any, Any]]
) -> tuple[list[pl.BlockSpec], list[pl.BlockSpec]]:
    """The windows of inputs and outputs."""
    rows, tiles, held = call.plan.rows, call.tiles, call.plan.held

    def spec(shape: tuple[int, ...], at: Callable[..., Any], **where: Any) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *step: at(*of(*step)), **where)

    if call.plan.ring:
        window = reference = out = pl.BlockSpec(memory_space=pltpu.HBM)
    elif not call.plan.streamed:
        window = reference = out = spec((rows, call.plan.columns), lambda i, p, j: (i, j))
    else:  # where a phase has no use for a window, the one before or after stays

        def over(at: Callable[..., Array]) -> pl.BlockSpec:
            return spec((rows, call.plan.columns), lambda i, p, j: (i, at(p, j)))

        last = tiles - 1
        again = lambda j: last if held >= tiles else jnp.where(j < held, last, j)  # noqa: E731
        window = over(lambda p, j: jnp.where(p == 0, 0, jnp.where(p == 1, j, again(j))))
        reference = over(lambda p, j: jnp.where(p == 0, j, last))
        out = over(lambda p, j: jnp.where(p == 2, j, 0))
    lanes = spec((rows, LANES), lambda i, p, j: (i, 0))
    numbers = spec((1, rows, LANES), lambda i, p, j: (0 if call.phases > 1 else j, i, 0))

    def entries(x: Array) -> pl.BlockSpec:
        at = lambda i, p, j: (i * tiles + j, 0, 0)  # noqa: E731
        return spec((1, *x.shape[1:]), at, memory_space=pltpu.SMEM)

    logits = [window] + [reference] * (call.reference == "given")
    outputs = [numbers] * bool(call.returned) + [out] * call.makes_gradient
    return [*map(entries, scalars), lanes, *logits], outputs


def _cost(call: _Call, operands: list[Array], rows: int) -> pl.CostEstimate:
    """What XLA's scheduler and profiles are told."""
    entries = rows * call.columns
    pair = 2 if call.reference else 1
    passes = call.looks_first + call.looks_again + call.makes_gradient
    moved = sum(x.size * x.dtype.itemsize for x in operands)
    moved += entries * operands[-1].dtype.itemsize * call.makes_gradient
    moved += round(entries * call.again) * operands[-1].dtype.itemsize
    return pl.CostEstimate(
        flops=entries * 6 * pair * passes,
        transcendentals=entries * (pair + call.looks_again),
        bytes_accessed=moved,
    )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    call: _Call,
    in_place: bool,
    interpret: Any,
    operands: Operands,
    tokens: Tokens,
    numbers: Numbers | None,
    by: Numbers | None,
) -> Result:
    """Runs a kernel over all rows."""
    (z,) = operands.model
    rows = z.shape[0]
    blocks = pl.cdiv(rows, call.plan.rows)
    scalars = _scalars(call, tokens, blocks)
    inputs = [*scalars, _lanes(call, tokens, numbers, by), z, *operands.reference]
    grid, of = _grid(call, blocks)
    in_specs, out_specs = _specs(call, scalars, of)
    axes = frozenset().union(*(tiling.varying_axes(x) for x in inputs))
    if interpret and axes:
        raise NotImplementedError(_NO_VMA)
    varying = jax.sharding.ManualAxisType(varying=axes)
    parts = 1 if call.plan.streamed else call.tiles  # by which numbers go out
    shapes: list[Any] = [((parts, rows, LANES), jnp.float32)] * bool(call.returned)
    shapes += [(z.shape, z.dtype)] * call.makes_gradient
    order: Any = "arbitrary" if call.plan.streamed else "parallel"
    semaphores = [pltpu.SemaphoreType.DMA((call.tiles,))] * (3 * call.plan.ring)
    out = pl.pallas_call(
        partial(_kernel, call),
        out_shape=[jax.ShapeDtypeStruct(*x, manual_axis_type=varying) for x in shapes],
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=[
            *(pltpu.VMEM((call.plan.rows, width), jnp.float32) for width in call.plan.widths),
            *semaphores,
        ],
        input_output_aliases={len(scalars) + 1: len(shapes) - 1} if in_place else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", *[order] * (len(grid) - 1)),
            vmem_limit_bytes=call.plan.limit,
            # Of the windows' copies, which are Pallas's own: they take 100 cycles of a block.
            disable_bounds_checks=True,
        ),
        cost_estimate=_cost(call, inputs, rows),
        name=f"t5patches_{call.op.settings.objective}_{call.stage.value}",
        interpret=interpret,
    )(*[tiling.vary_over(x, axes) for x in inputs])
    tiles = [
        {name: out[0][j, :, k : k + 1] for k, name in enumerate(call.returned)}
        for j in range(parts)
    ]
    return Result(_together(call, tiles), (out[-1],) if call.makes_gradient else None)


def _together(call: _Call, tiles: list[Numbers]) -> Numbers:
    """The numbers of rows, from those of their windows."""
    if call.stage is Stage.SECOND:
        return jax.tree.map(lambda *x: sum(x[1:], x[0]), *tiles)
    found = functools.reduce(statistics.merge, tiles)
    return found | ({"bad": found["bad"] != 0.0} if "bad" in found else {})


@functools.lru_cache(maxsize=1024)
def _folding(call: _Call, in_place: bool, interpret: Any) -> Callable[..., Result]:
    """A kernel that under `jax.vmap` takes the batch as more rows."""
    return tiling.folding(partial(_run, call, in_place, interpret))


def call_of(
    op: Operation,
    stage: Stage,
    chip: Chip,
    operands: Operands,
    tokens: Tokens,
    given: tuple[str, ...] = (),
    by: tuple[str, ...] = (),
) -> _Call | None:
    """The kernel of a stage on a chip, or None where it would need rows that do not fit."""
    columns = operands.model[0].shape[1]
    sizes = tuple(x.dtype.itemsize for x in (*operands.model, *operands.reference))
    private = tokens.edit_ids is not None or objectives.reference_of(op.settings) == "self"
    size = (op, stage, columns, sizes, private, chip.vmem)
    plan = (
        plans.plan(*size) or plans.ring(*size, operands.model[0].shape[0]) or plans.streamed(*size)
    )
    if plan is None:
        return None
    per_row = 1 if tokens.edit_ids is None else tokens.edit_ids.shape[1]
    op = dataclasses.replace(op, head=None, spare=False)  # neither changes the kernel
    if per_row > 1:
        per_row = plans.up(per_row, _EDITS_A_STEP)
    edits = plan.rows * per_row if plan.private else 0
    return _Call(op, stage, plan, columns, edits, given, by)


def run(
    op: Operation,
    stage: Stage,
    operands: Operands,
    tokens: Tokens,
    numbers: Numbers | None = None,
    by: Numbers | None = None,
) -> Result:
    """The driver (`operation.Driver`)."""
    chip = plans.target()
    names = tuple(sorted(numbers or ())), tuple(sorted(by or ()))
    call = call_of(op, stage, chip or plans.LEAST, operands, tokens, *names)
    if call is None:
        return _in_phases(op, stage, operands, tokens)
    # Those of a head are made for this. Where logits live on after all, XLA copies them first.
    in_place = call.makes_gradient and (op.spare or op.head is not None)
    interpret = False if chip else INTERPRET
    return _folding(call, in_place, interpret)(operands, tokens, numbers, by)


def _in_phases(op: Operation, stage: Stage, operands: Operands, tokens: Tokens) -> Result:
    """NUMBERS or VISIT of rows that do not fit: the rows are read once more for every look."""
    c = op.settings
    numbers = run(op, Stage.FIRST, operands, tokens).numbers
    numbers = objectives.finish(numbers, tokens.weights[:, None], tokens.bad[:, None])
    if objectives.looks_twice(c):
        numbers = numbers | run(op, Stage.SECOND, operands, tokens, numbers).numbers
    if stage is Stage.NUMBERS:
        return Result(numbers)
    by = objectives.derivatives(numbers, c, {"loss": jnp.ones_like(numbers["m"])})
    return Result(numbers, run(op, Stage.GRADIENT, operands, tokens, numbers, by).gradient)
