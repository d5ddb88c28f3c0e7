r"""The static table of the TPU kernels: what the compiler says of them, ahead of time.

    make bench-tpu-static
    python -m bench.tpu_static --chips v4 --objectives tnff,tnrr --name mine
    python -m bench.tpu_static --linear --objectives tnff,tnrf

**Nothing here ran on a TPU.** The real compiler's schedule gives the cycles of a block of rows (one
bundle of instructions a cycle, stalls not counted); arithmetic gives the time that its copies need
at the chip's bandwidth. Where the second is longer, a kernel runs at the memory roofline.

How the schedule is read: `*-packed-bundles-post-ra.txt` has the bundles in order; a loop is a
backward branch to a bundle's number, and the widest loop is the grid's. What a block of rows goes
through follows from its forward branches: they skip what only some blocks need (edits, masks), but
for pairs, of which the first skips to the second: of the two ways between them a block takes one,
and the figures are those of the first. Every loop that is left is a column loop and has its number
of steps. The `final_*` files do not serve: idle bundles have been taken out of them.

The columns "least" are a floor: the cycles of that path if in each column loop the busiest unit is
never idle, and those over the copies. The units are vector arithmetic, loads, stores, exponentials
and logarithms; and on v4, whose two slots for arithmetic are one that adds and one that multiplies
(an exponential or logarithm takes either), each of the two. What a ratio is above its floor is
order and latency; where the floor itself is above 1, only fewer or other instructions would help.
"a register" is what it consists of: arithmetic for each register of 8 x 128 entries of a row, over
all column loops.

"kept" is what a block of kept tokens only takes, over one in which a token is pushed down: of
`tnrf` and `tnrll` the former leaves out what only a pushed-down token's term reads, the logarithm
above all.

"masked" is what a block takes that goes through the fallback too, over what it takes without: one
with masked entries elsewhere than in the last 128 columns of the row.

The last column is what 32 edits on 4% of the tokens take over one edit on each of those, of the
cycles (not of the time, where copies take longer).

With `--linear` a row is a head, from hidden states to the loss and both gradients: what is held
beyond the kernel's gradient in float32, beside XLA's form on whole float32 logits; and the least
that the copies take (the compiler's count of bytes at the chip's bandwidth; a count of what goes
through v4's other memory too) and the products (at the matrix unit's full rate), beside the
products that a form would need which keeps the logits inside a kernel.
"""

from __future__ import annotations

import argparse
import collections
import functools
import glob
import importlib.metadata
import itertools
import json
import operator
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).parent
TOKENS = 2048
PUSHED = 0.04  # of the tokens, as is typical


class Core(NamedTuple):
    """A core's clock and its share of the chip's rates, as published or assumed."""

    ghz: float | None
    gigabytes: float
    teraflops: float  # bfloat16


# tpu7x has no published clock: its cycles are shown, its times are not.
CORES = {
    "v4": Core(1.05, 614, 137.5),
    "v5e": Core(1.5, 819, 197),
    "v5p": Core(1.75, 1382, 229.5),
    "v6e": Core(1.75, 1640, 918),
    "tpu7x": Core(None, 3690, 1153.5),
}


# --- The compiler's schedule ----------------------------------------------------------------------


class Unit(NamedTuple):
    """A part of the core: how often each bundle uses it, of how often it can."""

    uses: list[int]
    slots: int


class Schedule(NamedTuple):
    """The bundles of one kernel, and what a block of rows does of them."""

    grid: tuple[int, int]  # the loop over steps: first bundle, last bundle
    loops: dict[int, int]  # the loops in it: last bundle, first bundle
    skips: dict[int, int]  # forward branches in it: from, to
    units: list[Unit]  # what the bundles use; vector arithmetic first


def schedule(path: str) -> Schedule:
    """Reads the branches of a kernel."""
    branches = []
    for line in pathlib.Path(path).read_text().splitlines():
        at = _number(line)
        if at < 0:
            continue
        targets = re.findall(r"sbr\.rel (?:\([^)]*\) )?target bundleno = (\d+)", line)
        branches += [(at, int(target)) for target in targets]
    loops = {last: first for last, first in branches if first <= last}
    end = max(loops, key=lambda last: last - loops[last])
    start = loops.pop(end)
    skips = {a: b for a, b in branches if start <= a < b <= end and b - a < (end - start) / 2}
    return Schedule((start, end), loops, skips, _units(path))


def _units(path: str) -> list[Unit]:
    """Vector arithmetic (on v4 an exponential or logarithm takes a slot of it), loads and stores.

    Where a bundle has two slots for arithmetic, as on v4, one of them adds and subtracts and the
    other multiplies: no bundle of any of these kernels has two of the same kind.
    """
    stem = re.match(r".*t5patches_\w+\.\d+-", path)
    assert stem is not None
    (found,) = glob.glob(f"{stem[0]}*pre-delay_hlo-static-per-bundle-utilization.txt")
    _, names, slots, _, *bundles = pathlib.Path(found).read_text().splitlines()
    counts = list(zip(*(map(int, line.split()) for line in bundles), strict=True))
    columns = [names.split(", ").index(name) for name in ("VALU", "EUP", "VLOAD", "VSTORE")]
    units = [Unit(list(counts[at]), int(slots.split()[at])) for at in columns]
    if units[0].slots == 2:
        texts = [line for line in pathlib.Path(path).read_text().splitlines() if _number(line) >= 0]
        for kind in (r"= v(?:add|sub)\.f32", r"= vmul\.f32"):
            units.append(Unit([len(re.findall(kind, line)) for line in texts], 1))
    return units


def _number(line: str) -> int:
    """A bundle's number; -1 where the line is none."""
    bundle = re.match(r"\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:", line)
    return -1 if bundle is None else int(bundle[1], 16)


def least_cycles(found: Schedule, path: collections.Counter[int]) -> float:
    """The cycles that a path takes if its busiest unit is never idle, loop by loop."""
    total, at = 0.0, sorted(path)
    ends = [
        i for i in range(1, len(at)) if at[i] != at[i - 1] + 1 or path[at[i]] != path[at[i - 1]]
    ]
    for start, end in itertools.pairwise([0, *ends, len(at)]):
        bundles = at[start:end]
        busiest = max(sum(unit.uses[b] for b in bundles) / unit.slots for unit in found.units)
        total += path[bundles[0]] * busiest
    return total


def path_of(found: Schedule, steps: int, phases: int) -> collections.Counter[int]:
    """The bundles that a window of rows without edits, masks and NaN goes through, how often.

    Args:
      found: the kernel's branches.
      steps: the steps of a column loop.
      phases: how often the kernel goes over the windows. The widest branches skip a phase each.
    """
    if phases == 1:
        return _walk(found, steps, None)
    widest = sorted(found.skips, key=lambda a: a - found.skips[a])[:phases]
    return sum((_walk(found, steps, phase) for phase in widest), collections.Counter())


def _walk(
    found: Schedule, steps: int, entered: int | None, second: bool = False
) -> collections.Counter[int]:
    """The bundles of one step of the grid; the branch at `entered` is not taken.

    Of pairs it is the first of the two ways that is taken, or the second.
    """
    seconds: set[int] = set()  # of pairs
    for first, to in sorted(found.skips.items()):
        if first not in seconds and to in found.skips:
            seconds.add(to)
    at, end = found.grid
    total: collections.Counter[int] = collections.Counter()
    while at <= end:
        total[at] += 1
        if at in found.loops:
            total.update(dict.fromkeys(range(found.loops[at], at + 1), steps - 1))
        to = found.skips.get(at, at + 1)
        first = to in seconds and at not in seconds
        on = first or at == entered  # the other way begins behind the branch that ends this one
        at = to + 1 if first and second else at + 1 if on else to
    return total


def again_cycles(found: Schedule, steps: int) -> int:
    """The bundles more that a block takes which goes through the fallback.

    The branch before those is the last that skips a loop.
    """
    first = max(a for a, b in found.skips.items() if any(a < last < b for last in found.loops))
    to = found.skips[first]
    inside = ((a, last) for last, a in found.loops.items() if first < a and last < to)
    return to - first - 1 + sum((last - a + 1) * (steps - 1) for a, last in inside)


def edits_cycles(found: Schedule, rows: int, each: int, share: float = PUSHED) -> float:
    """The bundles that the lists of edits take in a block, where a share of tokens has any.

    The first branch after the first column loop skips the edits and the maxima that they change.
    Two loops there are one in the other: over lists with an edit (one for each token, or with an
    edit a token one for all of them), and over the steps of a list.
    """
    from t5patches_kernels.backends.pallas_tpu.kernel import _EDITS_A_STEP

    first = min(a for a in found.skips if a > min(found.loops))
    loops = [(a, last) for last, a in found.loops.items() if first < a < found.skips[first]]
    a_list, step = next(
        (b - a + 1, d - c + 1) for a, b in loops for c, d in loops if a < c and d < b
    )
    lists = share * rows if each > 1 else 1 - (1 - share) ** rows
    steps = -(-(each if each > 1 else rows) // _EDITS_A_STEP)
    return lists * (a_list + (steps - 1) * step)


# --- One program, in a process of its own: the compiler is told at start-up where to write --------


def compile_one(chip: str, name: str, dtype: str, columns: int) -> dict[str, Any]:
    """Compiles value and gradient; returns what the compiled program says of itself."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import jax
    import jax.numpy as jnp
    from gpu_topology import passes
    from tpu_topology import compile_for, device

    from bench import common
    from t5patches_kernels.backends.pallas_tpu import kernel as pallas_tpu
    from t5patches_kernels.backends.pallas_tpu import plan as plans
    from t5patches_kernels.core import objectives
    from t5patches_kernels.core.objectives import Settings
    from t5patches_kernels.core.operation import Operands, Operation, Stage, Tokens

    logits = jax.ShapeDtypeStruct((TOKENS, columns), jnp.dtype(dtype))
    ids, weights = (jax.ShapeDtypeStruct((TOKENS,), d) for d in (jnp.int32, jnp.float32))

    ours, dense = (
        compile_for(
            chip,
            jax.value_and_grad(functools.partial(common.total, what, name)),
            *(logits, logits, ids, weights),
        )
        for what in ("pallas_tpu", "dense")
    )
    c = Settings(name, columns, smoothing=1e-6)
    reference = (logits,) if objectives.reference_of(c) == "given" else ()
    edits = jax.ShapeDtypeStruct((TOKENS, 1), jnp.int32) if name not in ("nl", "ce") else None
    tokens = Tokens(ids, weights, weights, edits, edits)
    memory = plans.chip(device(chip).device_kind)
    calls = {
        stage.value: pallas_tpu.call_of(
            Operation(c), stage, memory, Operands((logits,), reference), tokens
        )
        for stage in Stage
    }
    fused = calls["value_and_grad"]
    facts = {}
    if columns % 128:  # XLA copies arguments of such rows first; logits made here it need not

        def made(h, k, rk, y, w):
            z, r = (jnp.dot(h, x, preferred_element_type=jnp.dtype(dtype)) for x in (k, rk))
            return common.total("pallas_tpu", name, z, r, y, w)

        h, k = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((TOKENS, 768), (768, columns)))
        program = compile_for(chip, jax.value_and_grad(made, (0, 1)), h, k, k, ids, weights)
        of_products = 1 + len(reference) + 2  # logits written, their gradient read twice
        facts["passes_made"] = passes(program, (TOKENS, columns)) - of_products
    return facts | {
        "passes": round(passes(ours, (TOKENS, columns)) + (fused.again if fused else 0), 2),
        "dense_passes": passes(dense, (TOKENS, columns)),
        "temporaries_tv": ours.memory_analysis().temp_size_in_bytes
        / (TOKENS * columns * jnp.dtype(dtype).itemsize),
        "kernels": {
            stage: {
                "steps": call.steps,
                "fallback_steps": (call.groups - call.edge) // plans.FALLBACK_UNROLL,
                "tiles": call.tiles,
                "rows": call.plan.rows,
                "vmem_mib": round(call.plan.vmem / 2**20, 2),
                "phases": call.phases,
                "edited": call.edits > 0,
                "branches": call.branches,
                "arrays": 1 + len(reference) + call.makes_gradient + call.again,
            }
            for stage, call in calls.items()
            if call is not None
        },
    }


def compiler() -> str:
    """What makes a schedule of a kernel."""
    return ", ".join(f"{x} {importlib.metadata.version(x)}" for x in ("jaxlib", "libtpu"))


def measure(chip: str, name: str, dtype: str, columns: int) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        }
        command = [sys.executable, "-m", "bench.tpu_static", "--one"]
        done = subprocess.run(
            [*command, f"{chip},{name},{dtype},{columns}"],
            env=environment, cwd=HERE.parent, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{chip} {name} {dtype} {columns}:\n{done.stderr[-2000:]}")
        facts = json.loads(done.stdout.splitlines()[-1])
        took = {}
        for path in glob.glob(f"{folder}/*t5patches_*packed-bundles-post-ra.txt"):
            if "schedule-analysis" not in path:
                stage = re.search(rf"t5patches_{name}_([a-z_]+)", path)
                assert stage is not None
                took[stage[1]] = schedule(path)
    row = {"chip": chip, "objective": name, "dtype": dtype, "V": columns}
    row |= {"compiler": compiler(), **facts}
    return row | _times(row, took)


def _times(row: dict[str, Any], took: dict[str, Schedule]) -> dict[str, Any]:
    """Cycles and copies of a block of rows, over all kernels that it goes through."""
    core, size = CORES[row["chip"]], 2 if row["dtype"] == "bfloat16" else 4
    compute = copies = vector = least = registers = 0.0
    for stage, found in took.items():
        kernel = row["kernels"][stage]
        path = path_of(found, kernel["steps"], kernel["phases"])
        compute += kernel["tiles"] * path.total()
        vector += kernel["tiles"] * sum(n * found.units[0].uses[at] for at, n in path.items())
        least += kernel["tiles"] * least_cycles(found, path)
        registers = kernel["rows"] * row["V"] / (8 * 128)
        numbers = 2 * 128 * 4  # in and out, a row
        copies += kernel["rows"] * (kernel["arrays"] * row["V"] * size + numbers)
    moved = copies / core.gigabytes / 1e3
    facts = {
        "compiled": sorted(took),
        "kernels": {stage: row["kernels"][stage] for stage in took},
        "cycles": compute,
        "least_cycles": round(least),
        "instructions_a_register": vector / registers,
        "copies_us": moved,
    }
    fused = row["kernels"].get("value_and_grad")
    # With several phases, what only some blocks need is in each of them.
    if "value_and_grad" in took and fused["phases"] == 1:
        again = again_cycles(took["value_and_grad"], fused["fallback_steps"])
        facts["masked_over_unmasked"] = 1 + again / compute
        if fused["branches"]:
            kept = _walk(took["value_and_grad"], fused["steps"], None, second=True)
            facts["kept_over_pushed"] = kept.total() / compute
        if fused["edited"]:
            one, many = (
                edits_cycles(took["value_and_grad"], fused["rows"], each) for each in (1, 32)
            )
            facts["cycles_of_32_edits_over_1"] = round(many - one)
    if core.ghz is None:
        return facts
    at = compute / core.ghz / 1e3
    bound = "HBM" if at < moved else "vector unit"
    return facts | {
        "compute_us": at, "ratio": at / moved, "roofline": min(1.0, moved / at), "bound": bound,
        "least_ratio": least / core.ghz / 1e3 / moved,
    }  # fmt: skip


# --- A head: from hidden states to the loss and its gradients -------------------------------------

HEADS = ((4096, 768, 32128), (4096, 1024, 250112))  # tokens, width, vocabulary: T5's and mT5's


def measure_head(chip: str, name: str, tokens: int, width: int, columns: int) -> dict[str, Any]:
    """A row of the table of heads: what is held, and the least that copies and products take."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import jax
    import jax.numpy as jnp
    from tpu_topology import compile_for, device

    from bench import common
    from t5patches_kernels import dispatch
    from t5patches_kernels.backends import chunked_linear
    from t5patches_kernels.backends.pallas_tpu import plan as plans
    from t5patches_kernels.core.objectives import Settings
    from t5patches_kernels.core.operation import Head, Operands, Operation, Stage, Tokens

    h, k = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((tokens, width), (width, columns)))
    y, w, bad = (jax.ShapeDtypeStruct((tokens,), d) for d in (jnp.int32, jnp.float32, jnp.bool_))
    edits = [jax.ShapeDtypeStruct((tokens, 1), d) for d in (jnp.int32, jnp.float32)]
    programs = {
        what: compile_for(
            chip,
            jax.value_and_grad(functools.partial(common.head_total, what, name), (0, 1)),
            *(h, k, h, k, y, w),
        )
        for what in ("pallas_tpu", "dense")
    }
    # The compiler counts a loop's body once: the forward fused alone has one loop, over chunks.
    op = Operation(Settings(name, columns, smoothing=1e-6), head=Head(1.0, transposed=False))
    fused = functools.partial(dispatch.driver("pallas_tpu", linear=True), op, Stage.VALUE_AND_GRAD)
    chunk = compile_for(chip, fused, Operands((h, k), (h, k)), Tokens(y, w, bad, *edits))
    rows = chunked_linear.chunk_rows(tokens, columns, chunked_linear.own_bytes("tpu", columns))
    chunks = -(-tokens // rows)
    moved = {
        "chunked": chunks * chunk.cost_analysis()["bytes accessed"],
        "dense": programs["dense"].cost_analysis()["bytes accessed"],
    }
    vmem = plans.chip(device(chip).device_kind).vmem
    cores, core = device(chip).num_cores, CORES[chip]
    product = 2 * tokens * width * columns / core.teraflops / cores / 1e9  # ms
    # A kernel cannot keep logits for a gradient that needs whole rows: it makes both again, for the
    # hidden states and once more for the kernel, unless one of the two gradients stays in VMEM.
    products = 6 if 4 * tokens * width < vmem / 2 else 8
    accumulator = 4 * width * columns
    held = {k: p.memory_analysis().temp_size_in_bytes / 1e9 for k, p in programs.items()}
    return {
        "chip": chip,
        "objective": name,
        "T": tokens,
        "D": width,
        "V": columns,
        "accumulator_gb": accumulator / 1e9,
        "beyond_gb": held["pallas_tpu"] - accumulator / 1e9,
        "dense_gb": held["dense"],
        "chunks": chunks,
        "rows": rows,
        **{f"{k}_copies_ms": v / core.gigabytes / cores / 1e6 for k, v in moved.items()},
        "products_ms": 4 * product * chunks * rows / tokens,
        "in_kernel_products_ms": products * product,
    }


HEAD_HEADER = """\
| chip | objective | T, D, V | held beyond the accumulator, GB | dense, GB | chunks \
| copies, ms | products, ms | dense: copies, ms | in-kernel: products, ms |
|---|---|---|---|---|---|---|---|---|---|"""


def head_line(row: dict[str, Any]) -> str:
    """A row of the table of heads as Markdown."""
    return (
        f"| {row['chip']} | {row['objective']} | {row['T']}, {row['D']}, {row['V']} "
        f"| {row['beyond_gb']:.3f} ({row['beyond_gb'] / row['dense_gb']:.1%}) "
        f"| {row['dense_gb']:.2f} | {row['chunks']} of {row['rows']} "
        f"| {row['chunked_copies_ms']:.1f} | {row['products_ms']:.1f} "
        f"| {row['dense_copies_ms']:.1f} | {row['in_kernel_products_ms']:.1f} |"
    )


# --- The table ------------------------------------------------------------------------------------

HEADER = """\
| chip | objective | dtype | V | kernels | VMEM MiB | passes | XLA dense | cycles | least \
| a register | compute / copies us | ratio | least | bound | of roofline | masked \
| 32 edits over 1 |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def line(row: dict[str, Any]) -> str:
    """A row as Markdown."""
    vmem = max(kernel["vmem_mib"] for kernel in row["kernels"].values())
    times = "- | - | - | - | -"
    if "ratio" in row:
        times = (
            f"{row['compute_us']:.2f} / {row['copies_us']:.2f} | {row['ratio']:.2f} "
            f"| {row['least_ratio']:.2f} | {row['bound']} | {row['roofline']:.0%}"
        )
    return (
        f"| {row['chip']} | {row['objective']} | {row['dtype']} | {row['V']} "
        f"| {' '.join(row['compiled'])} | {vmem} | {row['passes']:g} | {row['dense_passes']:g} "
        f"| {row['cycles']:.0f} | {row['least_cycles']} | {row['instructions_a_register']:.1f} "
        f"| {times} | {row.get('masked_over_unmasked', 1):.2f} "
        f"| {row.get('cycles_of_32_edits_over_1', 0) / row['cycles']:.1%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--chips", default=",".join(CORES))
    parser.add_argument("--objectives", help="default: all")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--vocabularies", default="32128,32100,250112")
    parser.add_argument("--linear", action="store_true", help="hidden states instead of logits")
    parser.add_argument("--name", help="of the file in bench/results/")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        chip, name, dtype, columns = options.one.split(",")
        print(json.dumps(compile_one(chip, name, dtype, int(columns))))
        return
    try:
        import libtpu  # noqa: F401
    except ImportError:
        print("The static table needs the TPU compiler: pip install libtpu")
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    from bench import common  # after that, which JAX reads when it is imported
    from t5patches_kernels import TRAINING_OBJECTIVES

    chips = options.chips.split(",")
    objectives = options.objectives.split(",") if options.objectives else TRAINING_OBJECTIVES
    if options.linear:
        name, header, shown, sizes = "tpu_linear", HEAD_HEADER, head_line, "TDV"
        heads = itertools.product(chips, objectives, HEADS)
        measured = (measure_head(chip, objective, *head) for chip, objective, head in heads)
    else:
        name, header, shown, sizes = "tpu_static", HEADER, line, ("dtype", "V")
        kinds = options.dtypes.split(","), map(int, options.vocabularies.split(","))
        measured = itertools.starmap(measure, itertools.product(chips, objectives, *kinds))
    key = operator.itemgetter("chip", "objective", *sizes)
    print(f"Static, ahead of time; nothing ran on a TPU.\n{header}")
    for row in measured:
        print(shown(row), flush=True)
        common.add(options.name or name, [row], key)


if __name__ == "__main__":
    main()
