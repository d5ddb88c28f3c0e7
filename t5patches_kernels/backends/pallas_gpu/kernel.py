"""Mosaic GPU, for Hopper and Blackwell: a row's logits stay in shared memory between column loops.

A thread block takes one row. Its chunks come by bulk copy into a ring of slots; a column loop works
on each chunk in turn, and when it is done with one fetches the next that shares its slot. The next
loop goes through the chunks in the other direction, so it begins with those that are still there: a
row that fits into the ring is read once, and of a longer one the ring's share is.

A chunk is worked on in pieces, one entry after the other in every lane. Each lane keeps sums of its
own, relative to its own maxima (`statistics.rebase`), and lanes are added up once a loop. What few
chunks have, edited entries, the target, an overlap, the others branch around.

No barrier is automatic. The threads of a block share two things: a slot of the ring, into which a
copy is only sent after `commit_smem` behind the last read, and which is only read after waiting for
that copy; and a slot of the gradient, written after waiting for the copy out of it two chunks ago
and copied after `commit_smem`.

The kernel runs the stages that read a row more than once; a stage of one pass is the XLA form's,
which already makes no more passes than it must.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import core

from t5patches_kernels.backends import tiling
from t5patches_kernels.backends.pallas_gpu import plan as plans
from t5patches_kernels.backends.pallas_gpu.plan import COPY_BYTES, OUT_SLOTS, THREADS, Call
from t5patches_kernels.backends.xla import gpu_form
from t5patches_kernels.core import objectives, statistics
from t5patches_kernels.core.operation import Operands, Operation, Result, Stage, Tokens
from t5patches_kernels.core.statistics import FLOOR, Array, Stats, Tile


class _Row:
    """A row, its chunks in shared memory, and the loop over them."""

    def __init__(self, call: Call, interpret: bool, refs: dict[str, Any]):
        self.call, self.plan, self.refs = call, call.plan, refs
        self.interpret = interpret
        self.index = jax.lax.axis_index("row")
        ids, scalars = refs["ids"], refs["scalars"]
        self.target = ids[self.index, 0]
        first = 4 + len(call.numbers)  # of the edits' factors
        w, bad, self.zy, self.ry, *numbers = (scalars[self.index, k] for k in range(first))
        self.of_token: Stats = {"w": w, "bad": bad != 0.0}
        self.of_token |= dict(zip(call.numbers, numbers, strict=True))
        self.edits = [
            (ids[self.index, 1 + k], scalars[self.index, first + k]) for k in range(call.edits)
        ]
        self.loops_done = 0
        self.rings = [name for name in ("z", "r") if name in refs]
        for chunk in range(self.plan.slots):
            self.load(jnp.int32(chunk), jnp.int32(chunk))

    # --- Chunks ------------------------------------------------------------------------------

    def start(self, chunk: Array) -> Array:
        """The first column of a chunk; the last chunk ends with the row and overlaps the others."""
        first = jnp.minimum(chunk * self.plan.chunk, self.call.columns - self.plan.chunk)
        return pl.multiple_of(first, COPY_BYTES // 4)

    def load(self, chunk: Array, slot: Array) -> None:
        columns = pl.ds(self.start(chunk), self.plan.chunk)
        for name in self.rings:
            plgpu.copy_gmem_to_smem(
                self.refs[name].at[self.index, columns],
                self.refs[f"{name}_ring"].at[slot],
                self.refs["arrived"].at[slot],
                oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
            )

    def reload(self, chunk: Array, slot: Array) -> None:
        plgpu.commit_smem()  # what was read here was read before the copy writes
        self.load(chunk, slot)

    def column_loop(self, body: Callable[[Array, Array, Array, Any], Any], carry: Any) -> Any:
        """Calls ``body(step, chunk, slot, carry)`` on every chunk."""
        chunks, slots = self.plan.chunks, self.plan.slots
        forward = self.forward = self.loops_done % 2 == 0
        here = 0 if self.loops_done == 0 else slots  # what the loop before has left
        self.loops_done += 1

        def step(i: Array, carry: Any, *, wait: bool) -> Any:
            chunk = i if forward else chunks - 1 - i
            slot = jax.lax.rem(chunk, jnp.int32(slots))
            if wait:
                plgpu.barrier_wait(self.refs["arrived"].at[slot])
            carry = body(i, chunk, slot, carry)
            if slots < chunks:
                following = chunk + slots if forward else chunk - slots
                within = following < chunks if forward else following >= 0
                pl.when(within)(lambda: self.reload(following, slot))
            return carry

        for first, last in ((0, here), (here, chunks)):
            if first < last:
                carry = jax.lax.fori_loop(first, last, partial(step, wait=first >= here), carry)
        return carry

    def pieces(self, chunk: Array, slot: Array, *, once: bool) -> list[tuple[Array, Array]]:
        """The pieces of a chunk, edited, in float32: ``(z, r)``, or twice ``z`` without reference.

        With `once`, entries that the chunk before has had are masked.
        """
        every = range(self.plan.pieces)
        z = [self.read("z", slot, k) for k in every]
        r = [self.read("r", slot, k) for k in every] if "r" in self.rings else z
        read = list(zip(z, r, strict=True))
        overlaps = once and self.call.columns % self.plan.chunk != 0
        changes = [chunk == self.plan.chunks - 1] if overlaps else []
        changes += [self.holds(chunk, column) for column, _ in self.edits]

        def changed(pieces: list[tuple[Array, Array]]) -> list[tuple[Array, Array]]:
            return [self.change(chunk, k, *piece, overlaps) for k, piece in enumerate(pieces)]

        if not changes:
            return read
        return jax.lax.cond(functools.reduce(jnp.logical_or, changes), changed, lambda x: x, read)

    def change(
        self, chunk: Array, k: int, z: Array, r: Array, overlaps: bool
    ) -> tuple[Array, Array]:
        """A piece as `pieces` has it, from what was read."""
        for edited, log_factor in self.edits:
            r = r + jnp.where(self.columns(chunk, k) == edited, log_factor, jnp.float32(0))
        if overlaps:
            fresh = self.columns(chunk, k) >= chunk * self.plan.chunk
            z, r = (jnp.where(fresh, x, -jnp.inf) for x in (z, r))
        return z, r

    def holds(self, chunk: Array, column: Array) -> Array:
        """Whether a column is among those of a chunk."""
        first = self.start(chunk)
        return (column >= first) & (column < first + self.plan.chunk)

    def columns(self, chunk: Array, k: int) -> Array:
        """The columns of a piece."""
        lane = self.across(jax.lax.broadcasted_iota(jnp.int32, (self.plan.lanes,), 0))
        return lane + (self.start(chunk) + k * self.plan.lanes)

    def read(self, name: str, slot: Array, piece: int) -> Array:
        entries = pl.ds(piece * self.plan.lanes, self.plan.lanes)
        ring = self.refs[f"{name}_ring"]
        return self.across(ring[slot, entries]).astype(jnp.float32)

    def across(self, x: Array) -> Array:
        """Spreads a piece over the threads as all pieces are; the interpreter has no threads."""
        if self.interpret:
            return x
        layout = plgpu.Layout.WG_STRIDED((self.plan.lanes,), self.plan.lanes // THREADS)
        return plgpu.layout_cast(x, layout)

    def each_lane(self, x: float) -> Array:
        return self.across(jnp.full((self.plan.lanes,), x, jnp.float32))

    # --- Column loops ------------------------------------------------------------------------

    def first_pass(self) -> Stats:
        """The maxima and sums of the row."""
        names = self.call.names - statistics.SECOND_PASS.keys()
        tops = {"m": FLOOR} | ({"rm": FLOOR} if self.call.reference else {})

        def body(_, chunk: Array, slot: Array, stats: Stats) -> Stats:
            pieces = self.pieces(chunk, slot, once=True)
            maxima = {
                m: functools.reduce(jnp.maximum, (p[of] for p in pieces), stats[m])
                for of, m in enumerate(tops)
            }
            stats = statistics.rebase(stats, maxima)
            for z, r in pieces:
                for name, x in statistics.terms(Tile(z, r, maxima), names).items():
                    stats[name] = stats[name] + x
            return stats

        start = tops | dict.fromkeys(sorted(names), 0.0)
        lanes = self.column_loop(body, {name: self.each_lane(x) for name, x in start.items()})
        row = {m: jnp.max(lanes[m]) for m in tops}
        lanes = statistics.rebase(lanes, row)
        return row | {name: jnp.sum(lanes[name]) for name in sorted(names)}

    def second_pass(self, row: Stats) -> Stats:
        """The sums that need the row's normalisers."""
        c = self.call.op.settings
        names = self.call.names & statistics.SECOND_PASS.keys()

        def body(_, chunk: Array, slot: Array, sums: Stats) -> Stats:
            for z, r in self.pieces(chunk, slot, once=True):
                terms = statistics.second_terms(Tile(z, r, row, c.smoothing), names)
                sums = {name: sums[name] + x for name, x in terms.items()}
            return sums

        sums = self.column_loop(body, {name: self.each_lane(0.0) for name in sorted(names)})
        return statistics.finish_second_pass({k: jnp.sum(x) for k, x in sums.items()}, row)

    def gradient(self, row: Stats) -> None:
        """Writes the gradient of the loss."""
        c = self.call.op.settings
        derivatives = partial(objectives.derivatives, c=c, cotangents={"loss": jnp.float32(1)})
        d_stats = _lowerable(derivatives, row)
        table = statistics.coefficients(row, d_stats)
        own = table.pop("zy", None)
        out = self.refs["out"]

        def add_own(chunk: Array, own: Array, dz: list[Array]) -> list[Array]:
            at = (self.columns(chunk, k) == self.target for k in range(self.plan.pieces))
            return [x + jnp.where(y, own, jnp.float32(0)) for x, y in zip(dz, at, strict=True)]

        def body(i: Array, chunk: Array, slot: Array, carry: Array) -> Array:
            part = jax.lax.rem(i, jnp.int32(OUT_SLOTS))
            plgpu.wait_smem_to_gmem(OUT_SLOTS - 1, wait_read_only=True)
            pieces = self.pieces(chunk, slot, once=False)
            tiles = (Tile(z, r, row, c.smoothing) for z, r in pieces)
            dz = [statistics.gradient(tile, table, None) for tile in tiles]
            if own is not None:
                here = self.holds(chunk, self.target)
                dz = jax.lax.cond(here, partial(add_own, chunk, own), lambda x: x, dz)
            for k, x in enumerate(dz):
                out[part, pl.ds(k * self.plan.lanes, self.plan.lanes)] = x.astype(out.dtype)
            plgpu.commit_smem()
            if self.call.columns % self.plan.chunk:
                # The last chunk and the one before it share entries: one copy after the other.
                second = self.plan.chunks - 1 if self.forward else 1
                pl.when(i == second)(lambda: plgpu.wait_smem_to_gmem(0))
            columns = pl.ds(self.start(chunk), self.plan.chunk)
            plgpu.copy_smem_to_gmem(out.at[part], self.refs["dz"].at[self.index, columns])
            return carry

        self.column_loop(body, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def _power(x: Array, y: int) -> Array:
    product = functools.reduce(jnp.multiply, [x] * abs(y))
    return product if y > 0 else 1 / product


_REPLACED: dict[str, Callable[..., Array]] = {
    "add_any": jnp.add,
    "integer_pow": _power,
    "stop_gradient": lambda x: x,
}


def _lowerable(f: Callable[[Any], Any], x: Any) -> Any:
    """``f(x)`` by primitives that Mosaic GPU lowers; others are replaced (`_REPLACED`)."""
    jaxpr, shape = jax.make_jaxpr(f, return_shape=True)(x)

    def evaluate(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
        read = lambda v: v.val if isinstance(v, core.Literal) else values[v]  # noqa: E731
        for eqn in jaxpr.eqns:
            inputs = [read(v) for v in eqn.invars]
            if eqn.primitive.name in _REPLACED:
                found = [_REPLACED[eqn.primitive.name](*inputs, **eqn.params)]
            elif eqn.primitive.name in ("jit", "pjit"):
                inner = eqn.params["jaxpr"]
                found = evaluate(inner.jaxpr, inner.consts, inputs)
            else:
                found = eqn.primitive.bind(*inputs, **eqn.params)
                found = found if eqn.primitive.multiple_results else [found]
            values.update(zip(eqn.outvars, found, strict=True))
        return [read(v) for v in jaxpr.outvars]

    found = evaluate(jaxpr.jaxpr, jaxpr.consts, jax.tree.leaves(x))
    return jax.tree.unflatten(jax.tree.structure(shape), found)


def _kernel(call: Call, interpret: bool, names: tuple[str, ...], *refs: Any) -> None:
    """One stage on one row."""
    named = dict(zip(names, refs, strict=True))
    if not call.op.skip_ignored:
        _whole_row(_Row(call, interpret, named))
        return
    counts = named["scalars"][jax.lax.axis_index("row"), 0] != 0
    pl.when(counts)(lambda: _whole_row(_Row(call, interpret, named)))
    pl.when(~counts)(lambda: _skip(call, named))


def _skip(call: Call, refs: dict[str, Any]) -> None:
    """Writes the zeros of an ignored token, of which nothing is read."""
    index = jax.lax.axis_index("row")
    for k in range(len(call.returned)):
        refs["stats"][k, index] = jnp.float32(0)
    if call.stage is not Stage.VALUE_AND_GRAD:
        return
    out, chunk = refs["out"], call.plan.chunk
    out[0, :] = jnp.zeros((chunk,), out.dtype)
    plgpu.commit_smem()

    def copy(i: Array, _: None) -> None:
        first = pl.multiple_of(jnp.minimum(i * chunk, call.columns - chunk), COPY_BYTES // 4)
        plgpu.copy_smem_to_gmem(out.at[0], refs["dz"].at[index, pl.ds(first, chunk)])

    jax.lax.fori_loop(0, call.plan.chunks, copy, None)
    plgpu.wait_smem_to_gmem(0)


def _whole_row(row: _Row) -> None:
    call = row.call
    stats = row.first_pass() | {"zy": row.zy}
    if call.reference:
        stats["ry"] = row.ry
    stats = objectives.finish(stats, row.of_token)
    if objectives.needs_second_pass(call.op.settings):
        stats = stats | row.second_pass(stats)
    if call.stage is Stage.VALUE_AND_GRAD:
        row.gradient(stats)
    stats["bad"] = jnp.where(stats["bad"], 1.0, 0.0)
    for k, name in enumerate(call.returned):
        row.refs["stats"][k, row.index] = stats[name]


# The interpreter's options (`jax.experimental.pallas.mosaic_gpu.InterpretGPUParams`), by name.
Options = tuple[tuple[str, Any], ...]
INTERPRET: Options = ()
_NO_VMA = (
    'implementation="pallas_gpu" on a CPU: JAX cannot interpret a kernel inside '
    'jax.shard_map with check_vma=True. Pass check_vma=False, or implementation="xla".'
)


def _interpreter(options: Options) -> Any:
    if hasattr(plgpu, "InterpretGPUParams"):  # from jax 0.11
        return plgpu.InterpretGPUParams(**dict(options))
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(**dict(options))


def _inputs(call: Call, operands: Operands, tokens: Tokens) -> dict[str, Array]:
    """What the kernel reads, by name: per row, then the logits."""
    (z,) = operands.model
    plain = (operands.reference or operands.model)[0]
    own = [gpu_form.target_logit(x, tokens.targets) for x in (z, plain)]
    of_rows = tokens.of_rows()
    scalars = [of_rows["w"], of_rows["bad"].astype(jnp.float32), *own]
    scalars += [of_rows[name] for name in call.numbers]
    ids = [tokens.targets[:, None]]
    if tokens.edit_ids is not None and tokens.log_factors is not None:
        ids.append(tokens.edit_ids)
        scalars.append(tokens.log_factors)
    rows = {"ids": jnp.concatenate(ids, 1), "scalars": jnp.concatenate(scalars, 1), "z": z}
    return rows | ({"r": plain} if call.reference == "given" else {})


@partial(jax.jit, static_argnums=(0, 1))
def _run(call: Call, interpret: Options | None, operands: Operands, tokens: Tokens) -> Result:
    inputs = _inputs(call, operands, tokens)
    (z,) = operands.model
    rows, chunk = z.shape[0], call.plan.chunk
    axes = tiling.all_axes(inputs)
    if interpret is not None and axes:
        raise NotImplementedError(_NO_VMA)
    varying = jax.sharding.ManualAxisType(varying=axes)
    returned: dict[str, Any] = {"stats": ((len(call.returned), rows), jnp.float32)}
    logits = [name for name in ("z", "r") if name in inputs]
    rings = {f"{name}_ring": inputs[name].dtype for name in logits}
    scratch: dict[str, Any] = {
        k: plgpu.SMEM((call.plan.slots, chunk), dtype) for k, dtype in rings.items()
    }
    scratch["arrived"] = plgpu.Barrier(num_arrivals=len(logits), num_barriers=call.plan.slots)
    if call.stage is Stage.VALUE_AND_GRAD:
        dtype = jnp.dtype(call.op.gradient_dtype or z.dtype)
        returned["dz"] = (z.shape, dtype)
        scratch["out"] = plgpu.SMEM((OUT_SLOTS, chunk), dtype)
    kernel = plgpu.kernel(
        partial(_kernel, call, interpret is not None, (*inputs, *returned, *scratch)),
        out_type=tuple(
            jax.ShapeDtypeStruct(*x, manual_axis_type=varying) for x in returned.values()
        ),
        scratch_types=tuple(scratch.values()),
        grid=(rows,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=None if interpret is None else _interpreter(interpret),
    )
    found, *dz = kernel(*tiling.vary_over(tuple(inputs.values()), axes))
    stats = {name: found[k][:, None] for k, name in enumerate(call.returned)}
    stats = tokens.of_rows() | stats | {"bad": stats["bad"] != 0.0}
    return Result(stats, tuple(dz) or None)


def run(
    interpret: Options | None,
    op: Operation,
    stage: Stage,
    operands: Operands,
    tokens: Tokens,
    stats: Stats | None = None,
    d_stats: Stats | None = None,
) -> Result:
    """The driver (`operation.Driver`) of rows that `plan.why_not` has no objection to."""
    if stage not in (Stage.STATISTICS, Stage.VALUE_AND_GRAD) or operands.model[0].shape[0] == 0:
        return gpu_form.run(op, stage, operands, tokens, stats, d_stats)
    logits = (*operands.model, *operands.reference)
    columns, itemsizes = logits[0].shape[1], tuple(x.dtype.itemsize for x in logits)
    edits = 0 if tokens.edit_ids is None else tokens.edit_ids.shape[1]
    op = dataclasses.replace(op, head=None, donate=False)  # neither changes the kernel
    call = Call(op, stage, plans.plan(columns, itemsizes), columns, edits)
    return _run(call, interpret, operands, tokens)
