r"""A borrowed card in minutes: first whether the kernels are right on it, then how fast they are.

    make bench-gpu                                               # a GPU, with its JAX there
    pip install -e ".[bench-tpu]" && python -m bench.card        # a TPU; in a notebook behind a !
    python -m bench.card --minutes 3 --vocabularies 32128        # a part

In this order, as what fails first says most:

1. how far loss and gradient of 8 tokens are from float64, beside how far the dense formula in
   float32 is. On a GPU by the very plans that are timed later, of one block a row, the head, and
   every cluster, in a process for each number of blocks (`bench.checks`): none has run on a card
   as it stands, and where one hangs the rows say so, what would run it again is left out, and all
   else goes on. On a TPU for every objective, in low blocks and in tall ones;
2. on a GPU, the same call a hundred times: how often its bits differ;
3. a copy on the device;
4. value and gradient of many tokens: on a GPU by the kernel, with clusters, and by streaming XLA,
   of two objectives at every vocabulary; on a TPU what `make bench-tpu` times, by the kernel, by
   streaming XLA and by T5Patches' formula;
5. the head, from hidden states: on a GPU by the size of a chunk, and at the shapes of Liger's
   benchmark (`bench.liger`, which `make bench-gpu` runs next);
6. on a GPU, the bytes that two kernels move, by the card's own counters (`bench.counters`);
7. the other objectives as in 4.

Times are of calls that are queued back to back (`bench.gpu.time_of`). Each row is stored once it is
there, in `results/gpu-card.json` or `results/tpu-card.json`. When the time is over, nothing new
begins, and the last line says how many rows are missing; a call that never comes back ends the
script half a minute later.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import faulthandler
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from bench import checks, common, counters, gpu, liger
from bench.checks import Apart, Program, Row

# A CPU is a dry run of the GPU's.
PLATFORM = "tpu" if jax.default_backend() == "tpu" else "gpu"
KERNEL = f"pallas_{PLATFORM}"
OBJECTIVES = (*common.OBJECTIVES, *common.ALONE)
FIRST = 2  # objectives that are timed before the head
TOKENS = {"gpu": 8192, "tpu": 2048}
VOCABULARIES = {"gpu": [32128, 128256, 250112], "tpu": [32128, 250112]}
CHUNKS_MIB = {"gpu": [512, 1024, 2048], "tpu": [237]}
CLUSTERS = (2, 4, 8, 16)
FEW, WIDTH = 8, 64  # tokens of a check, and of what width hidden states are
ON_TPU = ((8, 264), (530, 264), (8, 32128))  # tokens and vocabularies of a TPU's checks
# What is checked of clusters beside the plans that are timed, by vocabularies and blocks: every
# number of blocks, and what is left of rows in float32 where a card starts no more than 8 together.
SHARED = (*((32128, cluster) for cluster in CLUSTERS), (250112, 8))
# Objectives that differ in what stays on chip and in how often a cluster's sums are merged: once
# for kept rows of the first and twice for those that are pushed down, then twice, then once.
DISTINCT = ("tnrf", "tnrr", "tnff")
# Of a row that a cluster holds and one block does not: are the passes those that are planned?
COUNTED = {"objective": "tnff", "dtype": "bfloat16", "tokens": 2048, "vocabulary": 128256}
HANGS = 30  # seconds past its time after which the script ends itself

Step = tuple[Row, Callable[[], Row]]  # what a row is of, and what measures it


# --- Right ----------------------------------------------------------------------------------------


def checked(options: argparse.Namespace) -> dict[int, list[Program]]:
    """What a GPU is held to float64 with, by the blocks that share a row; each program once.

    Of one block a row all objectives at the smallest vocabulary, those that are timed first at the
    others, and heads.
    """
    found: dict[int, list[Program]] = {n: [] for n in (1, *options.clusters)}
    smallest, largest = min(options.vocabularies), max(options.vocabularies)
    for (size, cluster), dtype in itertools.product(SHARED, options.dtypes):
        if cluster in found and size <= largest:
            found[cluster].append(Program(DISTINCT[0], dtype, FEW, size, cluster))
    shapes = itertools.product(options.vocabularies, options.dtypes)
    for (size, dtype), name in itertools.product(shapes, options.objectives):
        if size == smallest or name in options.objectives[:FIRST]:
            found[1].append(Program(name, dtype, FEW, size, 1))
        best = Program(name, dtype, FEW, size, "cluster")
        if options.clusters and name in DISTINCT and best.blocks in found:
            found[best.blocks].append(best._replace(what=best.blocks))
    for size in sorted({largest, *(shape["vocabulary"] for shape in liger.SHAPES.values())}):
        if size <= largest:
            found[1].append(Program("tnff", "bfloat16", FEW, size, 1, width=WIDTH))
    return {blocks: list(dict.fromkeys(programs)) for blocks, programs in found.items() if programs}


def right_on_gpu(apart: Apart, programs: dict[int, list[Program]]) -> Iterator[Step]:
    """Loss and gradient beside float64, by the blocks that share a row."""
    for blocks, program in ((n, x) for n, of in programs.items() for x in of):
        of = program.of | {"what": "error", "cluster": blocks}
        yield of, functools.partial(apart.row, blocks)


def right_on_tpu(options: argparse.Namespace) -> Iterator[Step]:
    """The same, in this process: a TPU is one process's."""
    small = [size for size in ON_TPU if size[1] <= max(options.vocabularies)]
    every = itertools.product(small, options.objectives, options.dtypes)
    programs = [Program(name, dtype, *size, KERNEL) for size, name, dtype in every]
    for program, check in zip(programs, checks.errors(programs), strict=True):
        yield program.of | {"what": "error"}, check


# --- Fast -----------------------------------------------------------------------------------------


class Timed:
    """Value and gradient of logits, compiled by threads while others are checked.

    None compiles while another is timed: it would keep Python from queueing that one's calls.

    Args:
      options: the script's.
      apart: what says which numbers of blocks hang.
    """

    def __init__(self, options: argparse.Namespace, apart: Apart):
        self.options, self.apart = options, apart
        shared = ["cluster"] if options.clusters else []
        self.whats = [KERNEL, *shared, "xla"] if PLATFORM == "gpu" else [KERNEL, "xla", "dense"]
        first, largest = min(options.vocabularies), max(options.vocabularies)
        again = [(first, KERNEL), *((size, x) for x in shared for size in (first, largest))]
        again = list(dict.fromkeys(again)) if PLATFORM == "gpu" else []
        every = itertools.product(options.objectives[:FIRST], options.dtypes, again)
        self.again = [self._program(*x) for x in every]
        # By objective first: a run that is cut short has times of every vocabulary.
        sizes = itertools.product(options.vocabularies, self.whats)
        every = itertools.product(options.objectives, options.dtypes, sizes)
        self.programs = [self._program(*x) for x in every]
        self.pool = concurrent.futures.ThreadPoolExecutor(checks.THREADS)
        self.pending: dict[Program, concurrent.futures.Future] = {}
        self.operands = functools.lru_cache(maxsize=1)(gpu.operands)  # the largest take 16 GB

    def _program(self, objective: str, dtype: str, size: tuple[int, str]) -> Program:
        return Program(objective, dtype, self.options.tokens, *size)

    def compile(self, objectives: list[str]) -> None:
        """Begins to compile those of some objectives."""
        for of in (*self.again, *self.programs):
            if of.objective in objectives and of not in self.pending:
                self.pending[of] = self.pool.submit(of.compiled)

    def _ready(self, of: Program) -> tuple[Any, tuple[jax.Array, ...]]:
        self.apart.refuse(of.blocks)
        return self.pending[of].result(), self.operands(of.tokens, of.vocabulary, of.dtype)

    def repeats(self) -> Iterator[Step]:
        """The same call again and again."""
        for of in self.again:
            best = {"cluster": "best"} if of.what == "cluster" else {}

            def measure(of: Program = of) -> Row:
                return checks.differing(*self._ready(of), self.options.repeats)

            yield of.of | {"what": "repeats"} | best, measure

    def times(self, objectives: list[str]) -> Iterator[Step]:
        """Of some objectives."""
        for of in (of for of in self.programs if of.objective in objectives):

            def measure(of: Program = of) -> Row:
                concurrent.futures.wait(self.pending.values())
                run, args = self._ready(of)
                row = gpu.time_of(lambda: run(*args), jax.block_until_ready)
                return row | {"gb_per_second": 3 * args[0].nbytes / 1e6 / row["ms"]}

            yield of.of | {"what": of.what}, measure


def heads(options: argparse.Namespace, apart: Apart) -> Iterator[Step]:
    """Hidden states to loss and both gradients: by bytes a chunk, and beside Liger's."""
    largest = max(options.vocabularies)
    ours = {"tokens": options.tokens, "vocabulary": largest, "width": gpu.HEAD["width"]}
    rows: list[tuple[dict[str, int], str, str, int]]
    if PLATFORM == "gpu":
        rows = [(ours, "tnff", KERNEL, mib) for mib in options.chunks_mib]
        beside = (shape for shape in liger.SHAPES.values() if shape["vocabulary"] <= largest)
        of_liger = [{"tokens": options.tokens} | shape for shape in beside]
        rows += [(shape, "tnff", KERNEL, options.chunks_mib[0]) for shape in of_liger]
    else:
        every = itertools.product(("tnff", "tnrf"), (KERNEL, "xla", "dense"))
        of_tpu = common.TPU_HEAD | {"vocabulary": largest}
        rows = [(of_tpu, *x, options.chunks_mib[0]) for x in every]

    @functools.lru_cache(maxsize=1)
    def inputs(shape: tuple[tuple[str, int], ...]) -> tuple[jax.Array, ...]:
        return common.head_inputs(**dict(shape))

    for shape, objective, what, mib in rows:

        def measure(shape=shape, objective=objective, what=what, mib=mib) -> Row:
            apart.refuse(1)
            return gpu.run_head(what, objective, inputs(tuple(shape.items())), mib << 20)

        of: Row = {"dtype": "bfloat16", "objective": objective, "what": what, "chunk_mib": mib}
        yield shape | of, measure


def counted(options: argparse.Namespace, apart: Apart) -> Iterator[Step]:
    """What two kernels move, of the card's memory."""
    if PLATFORM == "gpu" and COUNTED["vocabulary"] <= max(options.vocabularies):
        for what in counters.WHATS if options.clusters else (KERNEL,):

            def measure(what: str = what) -> Row:
                apart.refuse(Program(**COUNTED, what=what).blocks)
                return counters.of_kernel(what, **COUNTED)

            yield COUNTED | {"what": what, "counters": "ncu"}, measure


def steps(options: argparse.Namespace) -> Iterator[Step]:
    """All of it, in order."""
    programs = checked(options) if PLATFORM == "gpu" else {}
    apart = Apart(programs)
    timed = Timed(options, apart)
    first, others = options.objectives[:FIRST], options.objectives[FIRST:]
    try:
        timed.compile(first)
        on_gpu = PLATFORM == "gpu"
        yield from right_on_gpu(apart, programs) if on_gpu else right_on_tpu(options)
        yield from timed.repeats()
        copy = functools.partial(gpu.copy_gb_per_second, False)
        yield {"what": "copy"}, lambda: {"gb_per_second": copy()}
        yield from timed.times(first)
        timed.compile(others)
        yield from heads(options, apart)
        yield from counted(options, apart)
        yield from timed.times(others)
    finally:
        apart.close()
        timed.pool.shutdown(cancel_futures=True)


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=4.5)
    parser.add_argument("--tokens", type=int, default=TOKENS[PLATFORM])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES[PLATFORM])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--objectives",
        nargs="+",
        choices=OBJECTIVES,
        default=list(common.OBJECTIVES if PLATFORM == "gpu" else OBJECTIVES),
    )
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--chunks-mib", type=int, nargs="+", default=CHUNKS_MIB[PLATFORM])
    parser.add_argument(
        "--clusters",
        type=int,
        nargs="*",
        choices=CLUSTERS,
        default=CLUSTERS if PLATFORM == "gpu" else (),
        help="blocks that share a row, on a GPU; none without a number",
    )
    return parser.parse_args(arguments)


def main() -> None:
    """Measures, prints and stores, row by row."""
    options = options_of()
    common.require_device("gpu", "tpu")
    until = time.monotonic() + 60 * options.minutes
    faulthandler.dump_traceback_later(60 * options.minutes + HANGS, exit=True, file=sys.__stderr__)
    rows: list[Row] = []
    missing = 0
    for of, measure in steps(options):
        if time.monotonic() > until:
            missing += 1
            continue
        rows.append(of | gpu.guarded(measure))
        print(*(f"{x:.4g}" if isinstance(x, float) else x for x in rows[-1].values()), flush=True)
        common.save(f"{PLATFORM}-card", rows)
    faulthandler.cancel_dump_traceback_later()
    wrong = [row for row in rows if "error" in row or row.get("right") is False]
    stored = f"{len(rows)} rows in bench/results/{PLATFORM}-card.json"
    print(f"{stored}, {missing} missing, {len(wrong)} wrong or failed", *wrong)
    print("An issue or a pull request with this file is welcome in the repository.")


if __name__ == "__main__":
    main()
