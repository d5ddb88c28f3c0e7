r"""A borrowed card in minutes: first whether the kernels are right on it, then how fast they are.

    python -m bench.card              # with the JAX for its GPU or TPU that is there
    python -m bench.card --minutes 3 --vocabularies 32128

In this order, as what fails first says most:

0. on a GPU, rows that a cluster of blocks shares, by every number of blocks: 8 tokens, beside
   float64. No cluster has run yet: where one hangs, ``--clusters`` without a number leaves all out;
1. every objective on few tokens, in low blocks and in tall ones: how far loss and gradient are from
   float64, beside how far the dense formula in float32 is. A kernel that waits for a copy that
   never comes hangs here, and costs no more than this;
2. the same call a hundred times: how often its bits differ;
3. a copy on the device;
4. value and gradient of many tokens, by the kernel, with clusters, and by streaming XLA;
5. the head, from hidden states, by the size of a chunk, and at the shapes of Liger's benchmark
   (`bench.liger`, which `make bench-card` runs next);
6. on a GPU, the bytes that two kernels move, by the card's own counters (`bench.counters`).

Each row is stored once it is there, in `results/gpu-card.json` or `results/tpu-card.json`. When the
time is over, nothing new begins, and the last line says how many rows are missing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import common, counters, gpu, liger
from t5patches_kernels import BlockSizes

# A CPU is a dry run of the GPU's.
PLATFORM = "tpu" if jax.default_backend() == "tpu" else "gpu"
KERNEL = f"pallas_{PLATFORM}"
OBJECTIVES = (*common.OBJECTIVES, *common.ALONE)
SMALL = ((8, 264), (530, 264), (8, 32128))  # tokens and vocabularies of the first part
# Tokens, vocabularies and blocks: rows that stay on chip, and in float32 some that do not. Kept
# rows of the objective are merged once, those pushed down twice.
CLUSTERS = (2, 4, 8, 16)
SHARED = (*((8, 32128, cluster) for cluster in CLUSTERS), (8, 250112, 8))
MERGED = "tnrf"
THREADS = 8  # that compile
TOKENS = {"gpu": 8192, "tpu": 2048}
CHUNKS_MIB = {"gpu": [512, 1024, 2048], "tpu": [237]}
# Of a row that a cluster holds and one block does not: are the passes those that are planned?
COUNTED = {"objective": "tnff", "dtype": "bfloat16", "tokens": 2048, "vocabulary": 128256}

Row = dict[str, Any]
Step = tuple[Row, Callable[[], Row]]  # what a row is of, and what measures it


def loss_and_gradient(what: str | BlockSizes, objective: str) -> Any:
    """Of logits, as one program."""
    return jax.jit(jax.value_and_grad(functools.partial(common.total, what, objective)))


def error(
    objective: str,
    dtype: str,
    tokens: int,
    vocabulary: int,
    what: str | BlockSizes = KERNEL,
) -> Row:
    """How far the kernel's loss and gradient are from float64, and how far they may be."""
    z, r, y, w = gpu.operands(tokens, vocabulary, dtype)
    y = y.at[0].set(0).at[1].set(vocabulary - 1)
    ours = jax.device_get(loss_and_gradient(what, objective)(z, r, y, w))
    z, r, y, w = jax.device_get((z, r, y, w))

    def by_dense(precision: Any) -> tuple[np.ndarray, ...]:
        with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(precision == np.float64):
            rows = (z.astype(precision), r.astype(precision), y, w.astype(precision))
            return jax.device_get(loss_and_gradient("reference", objective)(*rows))

    exact, dense = by_dense(np.float64), by_dense(np.float32)
    roundings = {"loss": 1e-5, "gradient": {"float32": 1e-5, "bfloat16": 2.0**-8}[dtype]}
    row: Row = {"right": True}
    for (name, rounding), x, base, got in zip(roundings.items(), exact, dense, ours, strict=True):
        far, base_far = (np.abs(np.asarray(of, np.float64) - x).max() for of in (got, base))
        allowed = base_far + rounding * np.abs(x).max()
        row |= {f"{name}_error": float(far), f"{name}_allowed": float(allowed)}
        row["right"] &= bool(far <= allowed)  # not where it is NaN
    return row


def differing(
    objective: str, dtype: str, vocabulary: int, repeats: int, what: str | BlockSizes = KERNEL
) -> Row:
    """How often a call gives other bits than the first."""
    args = gpu.operands(8 if jax.default_backend() == "cpu" else 2048, vocabulary, dtype)
    call, same = loss_and_gradient(what, objective), jax.jit(_equal)
    first = call(*args)
    differ = sum(not same(first, call(*args)) for _ in range(repeats))
    return {"repeats": repeats, "differ": differ, "right": differ == 0}


def _equal(a: Any, b: Any) -> jax.Array:
    return jnp.logical_and(*(jnp.all(x == y) for x, y in zip(a, b, strict=True)))


def times(options: argparse.Namespace) -> Iterator[Step]:
    """Value and gradient of logits; what comes next compiles meanwhile."""
    shapes = list(itertools.product(options.vocabularies, options.dtypes))
    whats: dict[str, str | BlockSizes] = {KERNEL: KERNEL, "xla": "xla"}
    if options.clusters:
        whats["cluster"] = BlockSizes()
    programs = list(itertools.product(options.objectives, whats))

    @functools.lru_cache(maxsize=1)  # the largest take 16 GB
    def operands(shape: tuple[int, str]) -> tuple[jax.Array, ...]:
        return gpu.operands(options.tokens, *shape)

    def compiled(shape: tuple[int, str], program: tuple[str, str]) -> Any:
        like = jax.eval_shape(lambda: gpu.operands(options.tokens, *shape))
        return loss_and_gradient(whats[program[1]], program[0]).lower(*like).compile()

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        pending = {
            (shape, program): pool.submit(compiled, shape, program)
            for shape in shapes
            for program in programs
        }
        try:
            for shape, program in itertools.product(shapes, programs):
                of = dict(zip(("vocabulary", "dtype"), shape, strict=True))
                of |= {"tokens": options.tokens, "objective": program[0], "what": program[1]}

                def measure(shape: Any = shape, program: Any = program) -> Row:
                    run, args = pending[shape, program].result(), operands(shape)
                    row = gpu.time_of(lambda: run(*args), jax.block_until_ready)
                    return row | {"gb_per_second": 3 * args[0].nbytes / 1e6 / row["ms"]}

                yield of, measure
        finally:
            pool.shutdown(cancel_futures=True)


def heads(options: argparse.Namespace) -> Iterator[Step]:
    """Hidden states to loss and both gradients: by bytes a chunk, and beside Liger's."""
    largest = max(options.vocabularies)
    ours = {"vocabulary": largest, "width": gpu.HEAD["width"]}
    shapes = [(ours, mib) for mib in options.chunks_mib]
    if PLATFORM == "gpu":
        beside = (shape for shape in liger.SHAPES.values() if shape["vocabulary"] <= largest)
        shapes += [(shape, options.chunks_mib[0]) for shape in beside]

    @functools.lru_cache(maxsize=1)
    def inputs(shape: tuple[tuple[str, int], ...]) -> tuple[jax.Array, ...]:
        return common.head_inputs(options.tokens, **dict(shape))

    for shape, mib in shapes:

        def measure(shape: dict[str, int] = shape, mib: int = mib) -> Row:
            return gpu.run_head(KERNEL, "tnff", inputs(tuple(shape.items())), mib << 20)

        of = {"dtype": "bfloat16", "objective": "tnff", "what": KERNEL, "chunk_mib": mib}
        yield {"tokens": options.tokens} | shape | of, measure


def counted(options: argparse.Namespace) -> Iterator[Step]:
    """What two kernels move, of the card's memory."""
    if PLATFORM == "gpu" and COUNTED["vocabulary"] <= max(options.vocabularies):
        for what in counters.WHATS if options.clusters else (KERNEL,):
            measure = functools.partial(counters.of_kernel, what, **COUNTED)
            yield COUNTED | {"what": what, "counters": "ncu"}, measure


def steps(options: argparse.Namespace) -> Iterator[Step]:
    """All of it, in order."""
    largest = max(options.vocabularies)
    shared = [x for x in SHARED if x[1] <= largest and x[2] in options.clusters]
    for (tokens, size, cluster), dtype in itertools.product(shared, options.dtypes):
        of: Row = {"tokens": tokens, "vocabulary": size, "dtype": dtype}
        of |= {"objective": MERGED, "what": "error", "cluster": cluster}
        yield of, functools.partial(error, MERGED, dtype, tokens, size, BlockSizes(cluster))
    small = [size for size in SMALL if size[1] <= largest]
    for (tokens, size), name, dtype in itertools.product(small, options.objectives, options.dtypes):
        of = {"tokens": tokens, "vocabulary": size, "dtype": dtype}
        of |= {"objective": name, "what": "error"}
        yield of, functools.partial(error, name, dtype, tokens, size)
    size = small[-1][1]
    for name, dtype in itertools.product(options.objectives[:2], options.dtypes):
        of = {"vocabulary": size, "dtype": dtype, "objective": name, "what": "repeats"}
        again = functools.partial(differing, name, dtype, size, options.repeats)
        yield of, again
        if options.clusters:
            yield of | {"cluster": "best"}, functools.partial(again, BlockSizes())
    copy = functools.partial(gpu.copy_gb_per_second, False)
    yield {"what": "copy"}, lambda: {"gb_per_second": copy()}
    yield from times(options)
    yield from heads(options)
    yield from counted(options)


def main() -> None:
    """Measures, prints and stores, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--tokens", type=int, default=TOKENS[PLATFORM])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32128, 128256, 250112])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--chunks-mib", type=int, nargs="+", default=CHUNKS_MIB[PLATFORM])
    parser.add_argument(
        "--clusters",
        type=int,
        nargs="*",
        choices=CLUSTERS,
        default=CLUSTERS if PLATFORM == "gpu" else (),
        help="blocks that share a row, on a GPU",
    )
    options = parser.parse_args()
    common.require_device("gpu", "tpu")
    until = time.monotonic() + 60 * options.minutes
    rows: list[Row] = []
    missing = 0
    for of, measure in steps(options):
        if time.monotonic() > until:
            missing += 1
            continue
        rows.append(of | gpu.guarded(measure))
        print(*(f"{x:.4g}" if isinstance(x, float) else x for x in rows[-1].values()), flush=True)
        common.save(f"{PLATFORM}-card", rows)
    wrong = [row for row in rows if "error" in row or row.get("right") is False]
    stored = f"{len(rows)} rows in {PLATFORM}-card.json"
    print(f"{stored}, {missing} missing, {len(wrong)} wrong or failed", *wrong)


if __name__ == "__main__":
    main()
