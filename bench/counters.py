r"""Bytes that a kernel moves between a card and its memory, by the card's own counters.

    python -m bench.counters pallas_gpu tnff bfloat16 2048 128256     # the kernel alone, run once

NVIDIA's profiler, `ncu`, which CUDA's toolkit has, runs that program and reads the counters of the
kernel in it (`of_kernel`).
"""

from __future__ import annotations

import argparse
import collections
import csv
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp

from bench import common
from t5patches_kernels import BlockSizes

METRICS = {"read_bytes": "dram__bytes_read.sum", "written_bytes": "dram__bytes_write.sum"}
KERNELS = "regex:mosaic_gpu"  # of the names that Mosaic gives
SECONDS = 45  # for all of a program under the profiler
WHATS: dict[str, str | BlockSizes] = {"pallas_gpu": "pallas_gpu", "cluster": BlockSizes()}


def read(printed: str) -> dict[str, float]:
    """The bytes of a kernel that ran once, from what ``ncu --csv --print-units base`` prints.

    Raises:
      LookupError: no kernel or more than one has the counters.
    """
    lines = printed.splitlines()
    start = next((k for k, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, list[float]] = collections.defaultdict(list)
    for row in csv.DictReader(lines[start:]):
        if row["Metric Name"] in METRICS.values():
            found[row["Metric Name"]].append(float(row["Metric Value"].replace(",", "")))
    if any(len(found[metric]) != 1 for metric in METRICS.values()):
        tail = " ".join(lines[-4:])
        raise LookupError(f"one kernel has no counters in what ncu printed, which ends: {tail}")
    return {name: found[metric][0] for name, metric in METRICS.items()}


def of_kernel(
    what: str, objective: str, dtype: str, tokens: int, vocabulary: int
) -> dict[str, float]:
    """The bytes of value and gradient, and how many arrays as large as the logits they are.

    Raises:
      FileNotFoundError: `ncu` is not on PATH.
      RuntimeError: it failed.
      LookupError: it has not read what it was to read.
    """
    ncu = shutil.which("ncu")
    if ncu is None:
        raise FileNotFoundError("ncu, NVIDIA's profiler, is not on PATH")
    command = [sys.executable, "-m", "bench.counters", what, objective, dtype]
    options = ["--csv", "--print-units", "base", "--clock-control", "none", "-k", KERNELS]
    options += ["--launch-count", "1", "--metrics", ",".join(METRICS.values())]
    ran = subprocess.run(
        [ncu, *options, *command, str(tokens), str(vocabulary)],
        # The process that waits may hold nearly all of the card's memory.
        env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    if ran.returncode:
        raise RuntimeError(f"ncu failed: {(ran.stderr or ran.stdout).strip()[-150:]}")
    moved = read(ran.stdout)
    array = tokens * vocabulary * jnp.dtype(dtype).itemsize
    return moved | {"passes": sum(moved.values()) / array}


def program(what: str, objective: str, dtype: str, tokens: int, vocabulary: int) -> Callable:
    """A call of value and gradient, once."""
    z, r = (
        jax.random.normal(jax.random.key(k), (tokens, vocabulary), jnp.dtype(dtype)) for k in (0, 1)
    )
    y = jnp.arange(tokens) % vocabulary
    w = jnp.where(jnp.arange(tokens) % 4 == 0, -1.0, 1.0)
    f = jax.jit(jax.value_and_grad(functools.partial(common.total, WHATS[what], objective)))
    return lambda: jax.block_until_ready(f(z, r, y, w))


def main() -> None:
    """Runs a kernel once."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=WHATS)
    parser.add_argument("objective", choices=common.OBJECTIVES)
    parser.add_argument("dtype")
    parser.add_argument("tokens", type=int)
    parser.add_argument("vocabulary", type=int)
    program(**vars(parser.parse_args()))()


if __name__ == "__main__":
    main()
