"""Pallas TPU: a block of whole rows in VMEM, looked at as often as the objective asks.

The logits are read from HBM once and the gradient written once, whatever the objective. A grid step
has R rows of all V columns; a *sweep* goes over them 128 columns at a time and hands each group to
the specification. What is written here is only how rows are brought, kept and put away:

* Sums are kept apart by lane (``[R, 128]``) until a sweep ends: nothing crosses lanes inside one.
* Parts of a row that a later look needs again (``e^(z - m)``) stay in VMEM where the budget of the
  chip allows (`block_sizes.py`).
* Edits are patches of single entries in a private copy of the reference: only those that are there
  cost anything. The window of an operand is never written to: what a kernel may do to one that is
  not fetched again is nowhere promised.
* The target's own column of the gradient is made by doing its group of 128 columns once more.

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

from t5patches_kernels import block_sizes, tiling
from t5patches_kernels.block_sizes import LANES, Chip, Part, Plan
from t5patches_kernels.operation import Operands, Operation, Result, Stage, Tokens
from t5patches_kernels.spec import objectives, statistics
from t5patches_kernels.spec.statistics import FLOOR, Array, Numbers

# How kernels are interpreted. True has no side effects and so runs under every transformation;
# tests put `pltpu.InterpretParams` here for its memories, copies and races.
INTERPRET: Any = True

_NO_VMA = (
    'implementation="pallas_tpu" on a machine without a TPU: JAX cannot interpret a kernel inside '
    'jax.shard_map with check_vma=True. Pass check_vma=False, or implementation="xla".'
)
_NONE = -(1 << 30)  # no column, however rows and groups are added to it
Group = dict[Any, Array]  # what a sweep reads or writes of 128 columns, by name or `Part`


@dataclasses.dataclass(frozen=True)
class _Call:
    """Everything static about a kernel."""

    op: Operation
    stage: Stage
    plan: Plan
    columns: int
    edits: int  # most edits a block can have, 0 without a changed reference
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
    def steps(self) -> int:
        """Steps of a sweep's loop.

        What is left for after it has the row's edge: the last of several windows reaches beyond the
        row by less than a group for each window.
        """
        return max(self.plan.columns // LANES - self.tiles, 0) // self.plan.unroll

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
    def makes_gradient(self) -> bool:
        return self.stage in (Stage.VISIT, Stage.GRADIENT)

    @property
    def refs(self) -> list[Any]:
        """What the kernel is given, in order: inputs, outputs, scratch."""
        inputs = ["ids", *["factors"] * bool(self.edits), "lanes", "z"]
        inputs += ["plain"] * (self.reference == "given")
        outputs = ["numbers"] * bool(self.returned) + ["dz"] * self.makes_gradient
        return [*inputs, *outputs, *self.scratch]

    @property
    def scratch(self) -> list[Any]:
        private = ["r"] * self.plan.private
        own = [p for p in self.plan.kept if not (self.plan.private and p == ("weight", "r"))]
        return private + own

    @property
    def returned(self) -> tuple[str, ...]:
        """The numbers that go out, by lane."""
        names = objectives.needs(self.op.settings)
        second = names & set(statistics.SECOND_LOOK)
        if self.stage is Stage.SECOND:
            return tuple(sorted(second))
        if self.stage is Stage.GRADIENT:
            return ()
        pair = {"m", "zy"} | ({"rm", "ry"} if self.reference else set())
        if self.stage is Stage.FIRST:
            return tuple(sorted(pair | (names - second)))
        return tuple(sorted(pair | names | {"w", "bad"}))


# --- The kernel -----------------------------------------------------------------------------------


class _Block:
    """The rows of a grid step."""

    def __init__(self, call: _Call, refs: dict[Any, Any]):
        self.call, self.refs = call, refs
        c = call.op.settings
        self.names = objectives.needs(c)
        self.smoothing, self.size = c.smoothing, c.vocab_size
        self.shape = (call.plan.rows, LANES)
        # Of the window; the last of several may reach beyond the row.
        self.columns: int | Array = call.columns
        if call.tiles > 1:
            self.columns = call.columns - pl.program_id(1) * call.plan.columns
        self.row = jax.lax.broadcasted_iota(jnp.int32, self.shape, 0)
        self.lane = jax.lax.broadcasted_iota(jnp.int32, self.shape, 1)
        self.entry = self.row * LANES + self.lane  # tells an entry of a group by one comparison
        if call.reference == "given" and not call.plan.private:
            refs["r"] = refs["plain"]
        if call.plan.private:
            refs["weight", "r"] = refs["r"]
        # What later looks read: the logits, as long as they are there, and the parts kept so far.
        self.later: list[Any] = ["z", "r"] if call.reference else ["z"]

    def full(self, x: float) -> Array:
        return jnp.full(self.shape, x, jnp.float32)

    def spread(self, numbers: Mapping[str, Array]) -> Numbers:
        """Numbers of rows over the lanes, once, for sweeps to use."""
        return {
            name: jnp.broadcast_to(x, self.shape) for name, x in numbers.items() if name != "bad"
        }

    def load(self, name: Any, start: Any, groups: int, edge: bool) -> Array:
        """Some columns in float32. At the `edge` of the row, those beyond it are masked."""
        x = self.refs[name][:, pl.ds(start, groups * LANES)].astype(jnp.float32)
        whole = self.call.tiles * self.call.plan.columns == self.call.columns
        if whole or not edge or name not in ("z", "r", "plain"):
            return x
        column = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) + start
        return jnp.where(column < self.columns, x, -jnp.inf)

    def sweep(self, reads: list[Any], body: Callable[[Group, Any], tuple[Any, Group]], carry: Any):
        """Calls ``body(read, carry) -> (carry, written)`` on every group of 128 columns in turn."""

        def step(start: Any, groups: int, edge: bool, carry: Any) -> Any:
            wide = {name: self.load(name, start, groups, edge) for name in reads}
            written: dict[Any, list[Array]] = {}
            for g in range(groups):
                columns = slice(g * LANES, (g + 1) * LANES)
                carry, out = body({name: x[:, columns] for name, x in wide.items()}, carry)
                for name, x in out.items():
                    written.setdefault(name, []).append(x)
            for name, parts in written.items():
                ref = self.refs[name]
                x = jnp.concatenate(parts, axis=1) if groups > 1 else parts[0]
                ref[:, pl.ds(start, groups * LANES)] = x.astype(ref.dtype)
            return carry

        groups, unroll = self.call.plan.columns // LANES, self.call.plan.unroll
        steps = self.call.steps

        def full_step(i: Array, carry: Any) -> Any:
            return step(pl.multiple_of(i * (unroll * LANES), unroll * LANES), unroll, False, carry)

        if steps:
            carry = jax.lax.fori_loop(0, steps, full_step, carry)
        return step(steps * unroll * LANES, groups - steps * unroll, True, carry)

    # Single entries

    def group_of(self, column: Array) -> Array:
        """Where the group of a column starts, a scalar; 0 for none."""
        return pl.multiple_of(jnp.maximum(column, 0) & -LANES, LANES)

    def target(self, i: int) -> Array:
        """The target of a row, a scalar; `_NONE` where it is not among the columns."""
        return self.refs["ids"][0, 0, i]

    def own_logits(self) -> Numbers:
        """The targets' logits ``[R, 1]``, 0 where there is none."""
        names = {"zy": "z"} | ({"ry": "plain"} if self.call.reference == "given" else {})
        out = dict.fromkeys(names, self.full(0.0))
        for i in range(self.call.plan.rows):
            start = self.group_of(self.target(i))
            here = self.entry == self.target(i) - start + i * LANES
            for name, source in names.items():
                x = self.load(source, start, 1, edge=True)
                out[name] = jnp.where(here, x, out[name])
        own = statistics.row_sums(out)
        return own | ({"ry": own["zy"]} if self.call.reference == "self" else {})

    def edit(self) -> Array:
        """Patches the private reference; returns how many entries it changed."""
        ids, r = self.refs["ids"], self.refs["r"]
        rows, edits = self.call.plan.rows, self.call.edits
        count = ids[0, 0, rows]

        def patch(k: Array, carry: None) -> None:
            row, column = ids[0, 0, rows + 1 + k], ids[0, 0, rows + 1 + edits + k]
            start = self.group_of(column)
            here = self.entry == column - start + row * LANES
            x = r[:, pl.ds(start, LANES)]
            r[:, pl.ds(start, LANES)] = jnp.where(here, x + self.refs["factors"][0, 0, k], x)
            return carry

        jax.lax.fori_loop(0, count, patch, None)
        return count

    # Looks

    def bring(self) -> Numbers:
        """Makes the private reference where there is one; returns the maxima ``[R, 1]``."""
        given = self.call.reference == "given"

        def body(x: Group, top: Numbers) -> tuple[Numbers, Group]:
            plain = x.get("plain", x["z"])
            top = {name: jnp.maximum(top[name], v) for name, v in (("m", x["z"]), ("rm", plain))}
            return top, {"r": plain} if self.call.plan.private else {}

        lowest = {name: self.full(FLOOR) for name in statistics.MAXIMA}
        top = self.sweep(["z", "plain"] if given else ["z"], body, lowest)
        if self.call.plan.private:
            changed = self.edit() > 0
            top["rm"] = jax.lax.cond(changed, self.maximum_of_private, lambda: top["rm"])
        return statistics.maxima(top["m"], top["rm"] if self.call.reference else None)

    def maximum_of_private(self) -> Array:
        """The maxima of the edited rows, by lane."""
        return self.sweep(["r"], lambda x, top: (jnp.maximum(top, x["r"]), {}), self.full(FLOOR))

    def look(self, terms: Callable[..., Numbers], row: Numbers, names: frozenset[str]) -> Numbers:
        """Adds up some terms of the rows, by lane, and keeps the parts that are worth it."""
        reads, wide, kept = list(self.later), self.spread(row), set[Part]()

        def body(x: Group, sums: Numbers) -> tuple[Numbers, Group]:
            known = {part: x[part] for part in reads if isinstance(part, tuple)}
            more = terms(x["z"], x.get("r"), wide, known)
            new = {p: known[p] for p in self.call.plan.kept if p in known and p not in reads}
            kept.update(new)
            return {name: sums[name] + more[name] for name in sums}, new

        sums = self.sweep(reads, body, {name: self.full(0.0) for name in sorted(names)})
        self.later += sorted(kept, key=str)
        if self.call.plan.private and ("weight", "r") in kept:  # it took the logits' place
            self.later.remove("r")
        return sums

    def first_look(self, maxima: Numbers) -> Numbers:
        """The sums of the rows and their targets' logits."""
        names = self.names & set(statistics.SUMS)

        def terms(z: Array, r: Array | None, row: Numbers, known: statistics.Parts) -> Numbers:
            return statistics.first_terms(z, r, row, names, known)

        return maxima | self.own_logits() | statistics.row_sums(self.look(terms, maxima, names))

    def second_look(self, row: Numbers) -> Numbers:
        """The sums that need the rows' normalisers."""
        names = self.names & set(statistics.SECOND_LOOK)

        def terms(z: Array, r: Array | None, row: Numbers, known: statistics.Parts) -> Numbers:
            return statistics.second_terms(z, r, row, names, self.smoothing, self.size, known)

        return statistics.second_sums(self.look(terms, row, names), row)

    def gradient(self, row: Numbers, by: Numbers) -> None:
        """Writes the gradient of the rows."""
        reads, row, by = list(self.later), self.spread(row), self.spread(by)

        def of(x: Group, is_target: Array | None) -> Array:
            known = {part: x[part] for part in reads if isinstance(part, tuple)}
            return statistics.gradient(
                x["z"], x.get("r"), row, by, is_target, self.smoothing, self.size, known
            )

        self.sweep(reads, lambda x, carry: (carry, {"dz": of(x, None)}), None)
        if "zy" not in by:
            return
        rows, dz = self.call.plan.rows, self.refs["dz"]
        targets = jnp.full(self.shape, _NONE, jnp.int32)
        for i in range(rows):
            targets = jnp.where(self.row == i, self.target(i), targets)
        for i in range(rows):
            start = self.group_of(self.target(i))
            x = {name: self.load(name, start, 1, edge=True) for name in reads}
            here = self.lane + start == targets
            dz[:, pl.ds(start, LANES)] = of(x, here).astype(dz.dtype)


def _kernel(call: _Call, *refs: Any) -> None:
    """One stage on one block of rows."""
    block = _Block(call, dict(zip(call.refs, refs, strict=True)))
    lanes = block.refs["lanes"][...]
    columns = [lanes[:, k : k + 1] for k in range(2 + len(call.given) + len(call.by))]
    w, bad, numbers = (
        columns[0],
        columns[1] != 0.0,
        dict(zip(call.given, columns[2:], strict=False)),
    )
    by = dict(zip(call.by, columns[2 + len(call.given) :], strict=True))

    if call.looks_first or call.plan.private:
        maxima = block.bring()
    if call.looks_first:
        numbers = block.first_look(maxima)
        if call.stage is not Stage.FIRST:
            numbers = objectives.finish(numbers, w, bad)
    if call.looks_again:
        numbers = numbers | block.second_look(numbers)
    if call.stage is Stage.VISIT:
        by = objectives.derivatives(numbers, call.op.settings, {"loss": jnp.ones_like(w)})
    if call.makes_gradient:
        block.gradient(numbers, by)
    if call.returned:
        out = block.full(0.0)
        for k, name in enumerate(call.returned):
            out = jnp.where(block.lane == k, numbers[name].astype(jnp.float32), out)
        block.refs["numbers"][0] = out


# --- What goes in and comes out -------------------------------------------------------------------


def _within(call: _Call, ids: Array) -> Array:
    """Ids ``[n, R]`` as columns of each window ``[n, tiles, R]``, `_NONE` where they are not in."""
    first = jnp.arange(call.tiles, dtype=jnp.int32)[None, :, None] * call.plan.columns
    local = ids[:, None, :] - first
    here = (local >= 0) & (local < call.plan.columns) & (ids < call.columns)[:, None, :]
    return jnp.where(here, local, _NONE)


def _edit_list(call: _Call, ids: Array, log_factors: Array) -> tuple[Array, Array]:
    """The edits there are first, by window: their count, rows and columns; and their factors.

    Args:
      call: the kernel.
      ids: columns ``[n, R * K]``; those that are out of the row stand for none.
      log_factors: ``[n, R * K]``.
    """
    local = _within(call, ids)
    log_factors = jnp.broadcast_to(log_factors[:, None, :], local.shape)
    absent = (local < 0) | (log_factors == 0.0)
    per_row = local.shape[-1] // call.plan.rows
    row = jax.lax.broadcasted_iota(jnp.int32, local.shape, 2) // per_row
    sort = partial(jax.lax.sort, dimension=2, num_keys=1, is_stable=True)
    _, row, local, log_factors = sort((absent, row, local, log_factors))
    count = jnp.sum(~absent, axis=2, keepdims=True, dtype=jnp.int32)
    return jnp.concatenate([count, row, local], axis=2), log_factors


def _scalars(call: _Call, tokens: Tokens, blocks: int) -> list[Array]:
    """What the kernel reads entry by entry: targets and edits, ``[windows, 1, n]`` each."""

    def by_block(x: Array, fill: float) -> Array:
        pad = ((0, blocks * call.plan.rows - x.shape[0]),) + ((0, 0),) * (x.ndim - 1)
        return jnp.pad(x, pad, constant_values=fill).reshape(blocks, -1)

    ids = [_within(call, by_block(tokens.targets, call.columns))]
    factors = []
    if call.edits and tokens.edit_ids is not None and tokens.log_factors is not None:
        found = by_block(tokens.edit_ids, call.columns), by_block(tokens.log_factors, 0.0)
        edits, log_factors = _edit_list(call, *found)
        ids.append(edits)
        factors.append(log_factors)
    elif call.edits:  # a private copy without a change
        ids.append(jnp.zeros((blocks, call.tiles, 1 + 2 * call.edits), jnp.int32))
        factors.append(jnp.zeros((blocks, call.tiles, call.edits), jnp.float32))
    arrays = [jnp.concatenate(ids, axis=2), *factors]
    return [x.reshape(blocks * call.tiles, 1, -1) for x in arrays]


def _lanes(call: _Call, tokens: Tokens, numbers: Numbers | None, by: Numbers | None) -> Array:
    """What the kernel reads row by row ``[T, 128]``: a narrower array would be padded to that."""
    columns = [tokens.weights[:, None], tokens.bad[:, None]]
    columns += [(numbers or {})[name] for name in call.given]
    columns += [(by or {})[name] for name in call.by]
    lanes = jnp.concatenate([x.astype(jnp.float32) for x in columns], axis=1)
    return jnp.pad(lanes, ((0, 0), (0, LANES - lanes.shape[1])))


def _specs(call: _Call, scalars: list[Array]) -> tuple[list[pl.BlockSpec], list[pl.BlockSpec]]:
    """The windows of inputs and outputs."""
    rows, tiles = call.plan.rows, call.tiles
    window = pl.BlockSpec((rows, call.plan.columns), lambda i, j: (i, j))
    lanes = pl.BlockSpec((rows, LANES), lambda i, j: (i, 0))
    numbers = pl.BlockSpec((1, rows, LANES), lambda i, j: (j, i, 0))

    def entries(x: Array) -> pl.BlockSpec:
        at = lambda i, j: (i * tiles + j, 0, 0)  # noqa: E731
        return pl.BlockSpec((1, *x.shape[1:]), at, memory_space=pltpu.SMEM)

    logits = [window] * (2 if call.reference == "given" else 1)
    outputs = [numbers] * bool(call.returned) + [window] * call.makes_gradient
    return [*map(entries, scalars), lanes, *logits], outputs


def _cost(call: _Call, operands: list[Array], rows: int) -> pl.CostEstimate:
    """What XLA's scheduler and profiles are told."""
    entries = rows * call.columns
    pair = 2 if call.reference else 1
    passes = call.looks_first + call.looks_again + call.makes_gradient
    moved = sum(x.size * x.dtype.itemsize for x in operands)
    moved += entries * operands[-1].dtype.itemsize * call.makes_gradient
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
    in_specs, out_specs = _specs(call, scalars)
    axes = frozenset().union(*(tiling.varying_axes(x) for x in inputs))
    if interpret and axes:
        raise NotImplementedError(_NO_VMA)
    varying = jax.sharding.ManualAxisType(varying=axes)
    shapes: list[Any] = [((call.tiles, rows, LANES), jnp.float32)] * bool(call.returned)
    shapes += [(z.shape, z.dtype)] * call.makes_gradient
    out = pl.pallas_call(
        partial(_kernel, call),
        out_shape=[jax.ShapeDtypeStruct(*x, manual_axis_type=varying) for x in shapes],
        grid=(blocks, call.tiles),
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=[
            pltpu.VMEM((call.plan.rows, call.plan.columns), jnp.float32) for _ in call.scratch
        ],
        input_output_aliases={len(scalars) + 1: len(shapes) - 1} if in_place else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=call.plan.limit
        ),
        cost_estimate=_cost(call, inputs, rows),
        name=f"t5patches_{call.op.settings.objective}_{call.stage.value}",
        interpret=interpret,
    )(*[tiling.vary_over(x, axes) for x in inputs])
    tiles = [
        {name: out[0][j, :, k : k + 1] for k, name in enumerate(call.returned)}
        for j in range(call.tiles)
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
    plan = block_sizes.plan(op, stage, columns, sizes, private, chip.vmem)
    if plan is None:
        return None
    per_row = 1 if tokens.edit_ids is None else tokens.edit_ids.shape[1]
    op = dataclasses.replace(op, head=None, spare=False)  # neither changes the kernel
    return _Call(op, stage, plan, columns, plan.rows * per_row * private, given, by)


def run(
    op: Operation,
    stage: Stage,
    operands: Operands,
    tokens: Tokens,
    numbers: Numbers | None = None,
    by: Numbers | None = None,
) -> Result:
    """The driver (`operation.Driver`)."""
    chip = block_sizes.target()
    names = tuple(sorted(numbers or ())), tuple(sorted(by or ()))
    call = call_of(op, stage, chip or block_sizes.LEAST, operands, tokens, *names)
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
