"""Mosaic GPU, for Hopper and Blackwell: a row's logits stay in shared memory between column loops.

A thread block takes one row, or a cluster of blocks does, each a segment of it. The chunks of each
array come by bulk copy into a ring of slots of its own; a column loop works on each chunk in turn,
and when it is done with one fetches the next that shares its slot. The next loop goes through the
chunks in the other direction, so it begins with those that are still there: a row that fits into
the ring is read once, and of a longer one the ring's share is. Where sums take the logarithm of the
smoothed reference, the first loop is over the reference alone, while the model's chunks arrive that
the second begins with. Where a plan has room for that logarithm, it is kept for the gradient, which
then reads the model alone.

The blocks of a cluster put their segments' sums into their own shared memory, meet, and each reads
those of all and merges them in the same order: from there on all know the same row. An interpreter,
which knows no clusters, takes the segments one after the other.

A row branches by its own token's weight: that of a kept token leaves out what only the term of a
pushed-down one reads, and its block knows no logarithm then.

A chunk is worked on in pieces, one entry after the other in every lane. Each lane keeps sums of its
own, relative to maxima that its own have passed by no more than `SLACK` (`_Segment.follow`), and
lanes are added up once a loop. What few chunks have, edited entries, the target, an overlap, a
maximum that is passed by more, the others branch around.

No barrier is automatic. The threads of a block share two things: a slot of the ring, into which a
copy is only sent after `commit_smem` behind the last read, and which is only read after waiting for
that copy; and a slot of the gradient, written after waiting for the copy out of it two chunks ago
and copied after `commit_smem`. The blocks of a cluster share their sums: each merge has a place of
its own, which is read after all have met, and no block leaves before they have met once more.

The kernel runs the stages that read a row more than once; a stage of one pass is the XLA form's,
which already makes no more passes than it must.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import core

from t5patches_kernels.backends import tiling
from t5patches_kernels.backends.pallas_gpu import plan as plans
from t5patches_kernels.backends.pallas_gpu.plan import (
    COPY_BYTES,
    MERGES,
    OUT_SLOTS,
    REDUCTIONS,
    THREADS,
    BlockSizes,
    Call,
)
from t5patches_kernels.backends.xla import gpu_form
from t5patches_kernels.core import objectives, statistics
from t5patches_kernels.core.operation import (
    WHOLE_ROWS,
    Operands,
    Operation,
    Result,
    Stage,
    Tokens,
)
from t5patches_kernels.core.statistics import FLOOR, Array, Functions, Parts, Stats, Tile

# Nats by which a lane's maximum may have passed the one that its sums are relative to. Most rows
# pass none by more after their first chunk. Exponentials are e^8 at most, a sum as exact as before.
SLACK = 8.0


def _layout(lanes: int) -> Any:
    """How a piece is spread over the threads."""
    return plgpu.Layout.WG_STRIDED((lanes,), lanes // THREADS)


def _functions(lanes: int, interpret: bool) -> Functions:
    """Exponential and logarithm of pieces: the card's own, which are to base 2.

    JAX has a primitive for ``2^x`` and none for ``log2``. That ``(z - m) / ln 2`` takes two
    instructions is meant: one, fused, would round ``m / ln 2``, which may be large where z - m is
    small.
    """
    layout = _layout(lanes)
    like = plgpu.ShapeDtypeStruct((lanes,), jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=like)
    def log2(_: Any, x: Any) -> Any:
        return x.log2(approx=True)

    return Functions(jnp.exp2, jnp.log2 if interpret else log2, 1 / math.log(2))


def _any_of_thread(lanes: int, interpret: bool) -> Callable[[Array], Array]:
    """Whether any of a thread's entries of a piece is true; of an interpreter's, any of all.

    Mosaic takes it for one number of all threads. Each has its own, and may branch by it while no
    branch needs the others.
    """
    layout = _layout(lanes)
    scalar = plgpu.ShapeDtypeStruct((), jnp.bool_, layout=plgpu.Layout.WG_SPLAT(()))

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=scalar)
    def any_of_thread(_: Any, x: Any) -> Any:
        from jaxlib.mlir.dialects import arith, vector

        (entries,) = x.registers.flat
        each = (vector.extract(entries, [], [k]) for k in range(lanes // THREADS))
        return type(x).splat(functools.reduce(arith.ori, each), (), is_signed=False)

    return jnp.any if interpret else any_of_thread


class _Segment:
    """A block's segment of a row, its chunks in shared memory, and the loops over them."""

    def __init__(self, row: _Row, number: Array | int, place: int):
        """One segment.

        Args:
          row: whose segment it is.
          number: which of the row's.
          place: which of the block's: an interpreter's one block has all.
        """
        self.row, self.call, self.plan, self.refs = row, row.call, row.call.plan, row.refs
        units, blocks = self.plan.columns // self.plan.unit, self.plan.cluster
        first, end = (
            jax.lax.div((number + k) * jnp.int32(units), jnp.int32(blocks)) * self.plan.unit
            for k in (0, 1)
        )
        self.first, self.end = first, end  # columns
        self.first_slot = place * self.plan.slots
        self.functions = _functions(self.plan.lanes, row.interpret)
        self.loops_done = 0
        self.read_before: set[str] = set()  # rings
        self.kept = False  # log s(q)

    # --- Chunks ------------------------------------------------------------------------------

    def rings(self, of: str) -> set[str]:
        """The rings that some logits are read from."""
        return {"z" if self.call.reference == "self" else name for name in of}

    def start(self, chunk: Array) -> Array:
        """The first column of a chunk; the last one ends with the segment and overlaps others."""
        first = jnp.minimum(self.own_start(chunk), self.end - self.plan.chunk)
        return pl.multiple_of(first, COPY_BYTES // 4)

    def own_start(self, chunk: Array) -> Array:
        """The first column of a chunk that no chunk before it has."""
        return self.first + chunk * self.plan.chunk

    def slot(self, chunk: Array) -> Array:
        return self.first_slot + jax.lax.rem(chunk, jnp.int32(self.plan.slots))

    def load_first(self, pushed: bool) -> None:
        """Fetches the first chunks of each ring's first loop."""
        for name in sorted(self.rings("zr" if self.call.reference else "z")):
            late = self.call.reads_reference_first(pushed) and name == "z"
            for k in range(self.plan.slots):
                self.load([name], jnp.int32(self.plan.chunks - 1 - k if late else k))

    def load(self, rings: Iterable[str], chunk: Array) -> None:
        columns = pl.ds(self.start(chunk), self.plan.chunk)
        for name in rings:
            plgpu.copy_gmem_to_smem(
                self.refs[name].at[self.row.index, columns],
                self.refs[f"{name}_ring"].at[self.slot(chunk)],
                self.refs[f"{name}_arrived"].at[self.slot(chunk)],
                oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
            )

    def column_loop(self, of: str, body: Callable[[Array, Array, Any], Any], carry: Any) -> Any:
        """Calls ``body(step, chunk, carry)`` on every chunk of the logits `of`."""
        chunks, slots = self.plan.chunks, self.plan.slots
        forward = self.forward = self.loops_done % 2 == 0
        rings = sorted(self.rings(of))
        coming = [name for name in rings if name not in self.read_before]  # others are there
        self.loops_done += 1
        self.read_before |= {*rings}

        def step(i: Array, carry: Any, *, waits: list[str]) -> Any:
            chunk = i if forward else chunks - 1 - i
            for name in waits:
                plgpu.barrier_wait(self.refs[f"{name}_arrived"].at[self.slot(chunk)])
            carry = body(i, chunk, carry)
            if slots < chunks:
                following = chunk + slots if forward else chunk - slots

                @pl.when(following < chunks if forward else following >= 0)
                def _() -> None:
                    plgpu.commit_smem()  # what was read here was read before the copy writes
                    self.load(rings, following)

            return carry

        ranges = [(0, slots, coming), (slots, chunks, rings)]
        if coming == rings:
            ranges = [(0, chunks, rings)]
        for first, last, waits in ranges:
            if first < last:
                carry = jax.lax.fori_loop(first, last, partial(step, waits=waits), carry)
        return carry

    def pieces(self, of: str, chunk: Array, *, once: str = "") -> list[Stats]:
        """The pieces of a chunk, edited, in float32, each as the logits `of` by name.

        Of the logits `once`, entries that the chunk before has had are masked.
        """
        read = [{name: self.read(name, chunk, k) for name in of} for k in range(self.plan.pieces)]
        overlaps = once if self.plan.overlaps else ""
        changes = [chunk == self.plan.chunks - 1] if overlaps else []
        changes += [self.holds(chunk, column) for column, _ in self.row.edits if "r" in of]

        def changed(pieces: list[Stats]) -> list[Stats]:
            return [self.change(chunk, k, piece, overlaps) for k, piece in enumerate(pieces)]

        if not changes:
            return read
        return jax.lax.cond(functools.reduce(jnp.logical_or, changes), changed, lambda x: x, read)

    def change(self, chunk: Array, k: int, piece: Stats, overlaps: str) -> Stats:
        """A piece as `pieces` has it, from what was read."""
        piece = dict(piece)
        for edited, log_factor in self.row.edits if "r" in piece else ():
            at = self.columns(chunk, k) == edited
            piece["r"] = piece["r"] + jnp.where(at, log_factor, jnp.float32(0))
        if overlaps:
            fresh = self.columns(chunk, k) >= self.own_start(chunk)
            piece |= {name: jnp.where(fresh, piece[name], -jnp.inf) for name in overlaps}
        return piece

    def holds(self, chunk: Array, column: Array) -> Array:
        """Whether a column is among those of a chunk."""
        first = self.start(chunk)
        return (column >= first) & (column < first + self.plan.chunk)

    def columns(self, chunk: Array, k: int) -> Array:
        """The columns of a piece."""
        lane = self.across(jax.lax.broadcasted_iota(jnp.int32, (self.plan.lanes,), 0))
        return lane + (self.start(chunk) + k * self.plan.lanes)

    def read(self, name: str, chunk: Array, piece: int) -> Array:
        entries = pl.ds(piece * self.plan.lanes, self.plan.lanes)
        (ring,) = self.rings(name)
        return self.across(self.refs[f"{ring}_ring"][self.slot(chunk), entries]).astype(jnp.float32)

    def across(self, x: Array) -> Array:
        """Spreads a piece over the threads as all pieces are; the interpreter has no threads."""
        return x if self.row.interpret else plgpu.layout_cast(x, _layout(self.plan.lanes))

    def each_lane(self, x: float) -> Array:
        return self.across(jnp.full((self.plan.lanes,), x, jnp.float32))

    def tile(self, piece: Stats, row: Stats, known: Parts | None = None) -> Tile:
        z, r, smoothing = piece.get("z"), piece.get("r"), self.call.op.settings.smoothing
        return Tile(z, r, row, smoothing, known=known, functions=self.functions)

    def kept_at(self, chunk: Array, piece: int) -> Any:
        """Where log s(q) of a piece is kept: written and read by the threads of its entries."""
        entries = pl.ds(piece * self.plan.lanes, self.plan.lanes)
        return self.refs[self.plan.keeps_in].at[self.slot(chunk), entries]

    # --- Column loops ------------------------------------------------------------------------

    def sums(self, of: str, names: frozenset[str], known: Stats, keep: bool = False) -> Stats:
        """The sums `names` of the segment, and the maxima of the logits `of` not yet `known`.

        In the unit of the functions. With `keep`, log s(q) is kept for the gradient.
        """
        self.kept = keep
        once = "z" if keep else of  # sums are weighted by z's, and what is kept is of all entries
        tops = {statistics.MAXIMUM[x]: x for x in of if statistics.MAXIMUM[x] not in known}

        def body(_: Array, chunk: Array, carry: tuple[Stats, Stats]) -> tuple[Stats, Stats]:
            maxima, stats = carry
            pieces = self.pieces(of, chunk, once=once)
            maxima = {
                m: functools.reduce(jnp.maximum, (piece[x] for piece in pieces), maxima[m])
                for m, x in tops.items()
            }
            stats = self.follow(maxima, stats)
            bases = {m: stats[m] for m in tops}
            for k, piece in enumerate(pieces):
                tile = self.tile(piece, known | bases)
                for name, x in statistics.terms(tile, names).items():
                    stats[name] = stats[name] + x
                if keep:
                    self.kept_at(chunk, k)[...] = tile.log_mass()
            return maxima, stats

        floors = dict.fromkeys(tops, self.each_lane(FLOOR))
        zeros = dict.fromkeys(sorted(names), self.each_lane(0.0))
        maxima, lanes = self.column_loop(of, body, (floors, floors | zeros))
        found = {m: jnp.max(maxima[m]) for m in tops}
        lanes = statistics.rebase(lanes, found, functions=self.functions)
        return found | {name: jnp.sum(lanes[name]) for name in sorted(names)}

    def follow(self, maxima: Stats, stats: Stats) -> Stats:
        """The sums, relative to other maxima if some lane's has passed its own by `SLACK`.

        To correct them in every chunk takes an exponential for every eighth entry and maximum.
        """
        if not maxima:
            return stats
        ahead = functools.reduce(jnp.logical_or, (x - stats[m] > SLACK for m, x in maxima.items()))
        return jax.lax.cond(
            _any_of_thread(self.plan.lanes, self.row.interpret)(ahead),
            lambda: statistics.rebase(stats, maxima, functions=self.functions),
            lambda: stats,
        )

    def gradient(self, table: statistics.Coefficients, row: Stats) -> None:
        """Writes the gradient: the weights and values of every entry times their coefficients."""
        own, table = table.get("zy"), {key: x for key, x in table.items() if key != "zy"}
        from_r = {"r", "s"} if self.kept else {"r", "s", "ratio"}
        of = "zr" if any(from_r & {*key} for key in table) else "z"
        out = self.refs["out"]

        def add_own(chunk: Array, own: Array, dz: list[Array]) -> list[Array]:
            at = (self.columns(chunk, k) == self.row.target for k in range(self.plan.pieces))
            return [x + jnp.where(y, own, jnp.float32(0)) for x, y in zip(dz, at, strict=True)]

        def body(i: Array, chunk: Array, carry: Array) -> Array:
            part = jax.lax.rem(i, jnp.int32(OUT_SLOTS))
            plgpu.wait_smem_to_gmem(OUT_SLOTS - 1, wait_read_only=True)
            pieces = self.pieces(of, chunk)
            known: list[Parts] = [{} for _ in pieces]
            if self.kept:
                kept = (self.across(self.kept_at(chunk, k)[...]) for k in range(len(pieces)))
                known = [{statistics.LOG_MASS: x} for x in kept]
            tiles = (self.tile(piece, row, x) for piece, x in zip(pieces, known, strict=True))
            dz = [statistics.gradient(tile, table, None, finite=True) for tile in tiles]
            if own is not None:
                here = self.holds(chunk, self.row.target)
                dz = jax.lax.cond(here, partial(add_own, chunk, own), lambda x: x, dz)
            for k, x in enumerate(dz):
                out[part, pl.ds(k * self.plan.lanes, self.plan.lanes)] = x.astype(out.dtype)
            plgpu.commit_smem()
            if self.plan.overlaps:
                # The last chunk and the one before it share entries: one copy after the other.
                second = self.plan.chunks - 1 if self.forward else 1
                pl.when(i == second)(lambda: plgpu.wait_smem_to_gmem(0))
            columns = pl.ds(self.start(chunk), self.plan.chunk)
            plgpu.copy_smem_to_gmem(out.at[part], self.refs["dz"].at[self.row.index, columns])
            return carry

        self.column_loop(of, body, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def write_zeros(self) -> None:
        """The gradient of a row of which nothing is asked."""
        out = self.refs["out"]
        zeros = self.each_lane(0.0).astype(out.dtype)
        for k in range(self.plan.pieces):
            out[0, pl.ds(k * self.plan.lanes, self.plan.lanes)] = zeros
        plgpu.commit_smem()

        def copy(chunk: Array, _: None) -> None:
            columns = pl.ds(self.start(chunk), self.plan.chunk)
            plgpu.copy_smem_to_gmem(out.at[0], self.refs["dz"].at[self.row.index, columns])

        jax.lax.fori_loop(0, self.plan.chunks, copy, None)
        plgpu.wait_smem_to_gmem(0)


@plgpu.inline_mgpu()
def _meet(_: Any) -> None:
    """Waits for the cluster's other blocks; what they wrote to shared memory can then be read."""
    from jaxlib.mlir.dialects import nvvm

    nvvm.cluster_arrive(aligned=True)  # releases, at the cluster's scope
    nvvm.cluster_wait(aligned=True)  # acquires


class _Row:
    """A row, of which a block has a segment."""

    def __init__(self, call: Call, interpret: bool, refs: dict[str, Any]):
        self.call, self.refs, self.interpret = call, refs, interpret
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
        blocks = call.plan.cluster
        self.shared = blocks > 1 and not interpret
        self.block = jax.lax.axis_index("block") if self.shared else 0
        mine = [self.block] if self.shared else range(blocks)
        self.segments = [_Segment(self, number, place) for place, number in enumerate(mine)]
        self.merges = 0

    def sums(self, of: str, names: frozenset[str], known: Stats, keep: bool = False) -> Stats:
        """The sums `names` of the row, and the maxima of the logits `of` that are not `known`."""
        functions = self.segments[0].functions
        parts = [segment.sums(of, names, known, keep) for segment in self.segments]
        parts = self.of_all_blocks(parts)
        if len(parts) > 1:
            found = [m for m in statistics.MAXIMA if m in parts[0]]
            tops = {m: _total(jnp.maximum, parts, m) for m in found}
            parts = [statistics.rebase(part, tops, functions=functions) for part in parts]
            parts = [tops | {name: _total(jnp.add, parts, name) for name in sorted(names)}]
        return statistics.in_nats(parts[0], functions)

    def of_all_blocks(self, parts: list[Stats]) -> list[Stats]:
        """The same of every block of the cluster, in order."""
        if not self.shared:
            return parts
        (mine,), names, sums = parts, sorted(parts[0]), self.refs["sums"]
        for k, name in enumerate(names):
            sums[self.merges, k] = mine[name]
        _meet()
        every = [
            plgpu.cluster_ref(sums, {"block": jnp.int32(k)}) for k in range(self.call.plan.cluster)
        ]
        parts = [{name: theirs[self.merges, k] for k, name in enumerate(names)} for theirs in every]
        self.merges += 1
        return parts

    def write_stats(self, stats: Stats) -> None:
        """Writes the statistics that leave the kernel; one block does."""

        def write() -> None:
            for k, name in enumerate(self.call.returned):
                self.refs["stats"][k, self.index] = stats[name]

        pl.when(self.block == 0)(write) if self.shared else write()

    def leave(self) -> None:
        """A block stays until the others have read its sums."""
        if self.shared:
            _meet()


def _total(op: Callable[[Array, Array], Array], parts: list[Stats], name: str) -> Array:
    return functools.reduce(op, (part[name] for part in parts))


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
    weight = named["scalars"][jax.lax.axis_index("row"), 0]

    def run(pushed: bool) -> None:
        _whole_row(_Row(call, interpret, named), pushed)

    def by_kind() -> None:
        if call.branches:
            pl.when(weight < 0)(lambda: run(True))
            pl.when(~(weight < 0))(lambda: run(False))
        else:
            run(True)

    if call.op.skip_ignored:
        pl.when(weight != 0)(by_kind)
        pl.when(weight == 0)(lambda: _skip(_Row(call, interpret, named)))
    else:
        by_kind()


def _whole_row(row: _Row, pushed: bool) -> None:
    """The algorithm, on a row of a token that is pushed down, or on one of another."""
    call, c = row.call, row.call.op.settings
    needed = names = call.needs(pushed)
    if names & statistics.SECOND_PASS.keys() == {"sqz"}:  # without a logarithm: of one loop's sums
        names = names - {"sqz"} | {"qz", "sum_z"}
    for segment in row.segments:
        segment.load_first(pushed)

    # The sums, over the reference alone first where others take the logarithm of s(q).
    known: Stats = {}
    if call.reads_reference_first(pushed):
        alone = names & frozenset(statistics.OF_REFERENCE)
        known = row.sums("r", alone, {})
        known |= objectives.finish_reference(known)
        made_from = {statistics.SECOND_PASS.get(name, name) for name in names - alone}
        names = statistics.with_normalisers(frozenset(made_from))
    of = "zr" if call.reference else "z"
    stats = row.sums(of, names, known, call.keeps(pushed)) | known | {"zy": row.zy}
    if call.reference:
        stats["ry"] = row.ry

    # Statistics; 0 for those that no row of this kind needs.
    stats = objectives.finish(stats, row.of_token)
    if "sqz" in needed and "sqz" not in stats:
        stats["sqz"] = stats["qz"] / stats["rs"] + c.smoothing * stats["sum_z"]
    stats = dict.fromkeys(call.names, jnp.float32(0)) | stats

    # Gradient.
    if call.stage is Stage.VALUE_AND_GRAD:
        derivatives = partial(objectives.derivatives, c=c, cotangents={"loss": jnp.float32(1)})
        d_stats = _lowerable(derivatives, stats)
        unread = objectives.unread(c, pushed=pushed)
        read = {name: x for name, x in d_stats.items() if name not in unread}
        table = statistics.coefficients(stats, read, row.segments[0].functions)
        asked = statistics.any_asked(table)
        for segment in row.segments:
            pl.when(asked)(partial(segment.gradient, table, stats))
            pl.when(~asked)(segment.write_zeros)

    row.write_stats(stats | {"bad": jnp.where(stats["bad"], 1.0, 0.0)})
    row.leave()


def _skip(row: _Row) -> None:
    """An ignored token, of which nothing is read."""
    row.write_stats(dict.fromkeys(row.call.returned, jnp.float32(0)))
    if row.call.stage is Stage.VALUE_AND_GRAD:
        for segment in row.segments:
            segment.write_zeros()


# The interpreter's options (`jax.experimental.pallas.mosaic_gpu.InterpretGPUParams`), by name.
Options = tuple[tuple[str, Any], ...]
INTERPRET: Options = ()


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
    rows, plan = z.shape[0], call.plan
    axes = tiling.axes_of_kernel("pallas_gpu", inputs, interpreted=interpret is not None)
    varying = jax.sharding.ManualAxisType(varying=axes)
    returned: dict[str, Any] = {"stats": ((len(call.returned), rows), jnp.float32)}
    logits = [name for name in ("z", "r") if name in inputs]
    # An interpreter's one block has the slots of a cluster.
    blocks, slots = (
        (plan.cluster, plan.slots) if interpret is None else (1, plan.cluster * plan.slots)
    )
    scratch: dict[str, Any] = {
        f"{name}_ring": plgpu.SMEM((slots, plan.chunk), inputs[name].dtype) for name in logits
    }
    scratch |= {f"{name}_arrived": plgpu.Barrier(num_barriers=slots) for name in logits}
    if call.stage is Stage.VALUE_AND_GRAD:
        dtype = jnp.dtype(plans.gradient_dtype(call.op, plan.columns) or z.dtype)
        returned["dz"] = (z.shape, dtype)
        scratch["out"] = plgpu.SMEM((OUT_SLOTS, plan.chunk), dtype)
    if plan.keeps and plan.keeps_in not in scratch:
        scratch[plan.keeps_in] = plgpu.SMEM((slots, plan.chunk), jnp.float32)
    if blocks > 1:
        scratch["sums"] = plgpu.SMEM((MERGES, THREADS), jnp.float32)
    kernel = plgpu.kernel(
        partial(_kernel, call, interpret is not None, (*inputs, *returned, *scratch)),
        out_type=tuple(
            jax.ShapeDtypeStruct(*x, manual_axis_type=varying) for x in returned.values()
        ),
        scratch_types=tuple(scratch.values()),
        grid=(rows,),
        grid_names=("row",),
        cluster=(blocks,) * (blocks > 1),
        cluster_names=("block",) * (blocks > 1),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=REDUCTIONS,
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
    sizes: BlockSizes,
    op: Operation,
    stage: Stage,
    operands: Operands,
    tokens: Tokens,
    stats: Stats | None = None,
    d_stats: Stats | None = None,
) -> Result:
    """The driver (`operation.Driver`) of rows that `plan.why_not` has no objection to."""
    if stage not in WHOLE_ROWS or operands.model[0].shape[0] == 0:
        return gpu_form.run(op, stage, operands, tokens, stats, d_stats)
    logits = (*operands.model, *operands.reference)
    columns, itemsizes = logits[0].shape[1], tuple(x.dtype.itemsize for x in logits)
    edits = 0 if tokens.edit_ids is None else tokens.edit_ids.shape[1]
    op = dataclasses.replace(op, head=None, donate=False)  # neither changes the kernel
    call = plans.call_of(op, stage, columns, itemsizes, edits, sizes)
    return _run(call, interpret, operands, tokens)
