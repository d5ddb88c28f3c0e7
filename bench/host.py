"""Speed and memory on this machine's CPU, beside T5Patches' dense formula: `make bench`.

    python -m bench.host          # memory as it is given out by default
    python -m bench.host --kept   # memory that the process keeps

Value and gradient of each objective's summed loss, T = 8 x 64, V = 32128, float32; both jitted,
timed in turn in one process. `a + b` over the same arrays is the time of three passes over memory.
`entries` is that of the exponentials and the logarithm that an objective's gradient needs, entry by
entry in one such pass, without a maximum or a sum, by the functions that the library uses.

XLA gives every result and temporary back when a program ends, and glibc gives arrays of this size
back to the kernel, which hands out fresh pages, cleared, the next time: a good part of both times.
With `--kept` the process keeps its memory, as it does under another allocator.
"""

from __future__ import annotations

import argparse
import functools
import math
import operator
import os
import sys

import jax
from rich.console import Console
from rich.table import Table

from bench import common
from t5patches_kernels import targeted_negative_loss
from t5patches_kernels.backends.xla import cpu_math

NAME = "host-cpu"  # of the file in bench/results/
MEMORY = ("fresh", "kept")
# One arena, as others refuse arrays of this size; and no array so large that it is mapped alone, or
# that the memory behind it is given back.
_KEPT = ":".join(
    f"glibc.malloc.{name}"
    for name in ("arena_max=1", "mmap_threshold=1099511627776", "trim_threshold=1099511627776")
)
TOKENS = (8, 64)
VOCABULARY = common.VOCABULARIES["T5"]
_HELD = ("dense", "fused")  # whose memory is shown


def _add(z, r, y, w):
    return z + r


def _entries(name: str, z, r, y, w):
    exp, log = cpu_math.exp, cpu_math.log
    if name in ("tnff", "tnfll"):
        return exp(z) - exp(r)
    return exp(z) * (z - log(exp(r) + 1e-6))


def _row(name: str, memory: str, arrays) -> dict:
    unit = 4 * math.prod(TOKENS) * VOCABULARY
    fused = functools.partial(targeted_negative_loss, objective=name, implementation="xla")
    programs = {
        "dense": jax.jit(common.value_and_gradient(functools.partial(common.dense, name))),
        "fused": jax.jit(common.value_and_gradient(lambda *a: fused(*a).loss)),
        "entries": jax.jit(functools.partial(_entries, name)),
        "a + b": jax.jit(_add),
    }
    compiled = {k: f.lower(*arrays).compile() for k, f in programs.items()}
    times = common.timed({k: functools.partial(f, *arrays) for k, f in compiled.items()})
    return {
        "objective": name,
        "memory": memory,
        **{f"{k} ms": vars(t) for k, t in times.items()},
        "times faster": times["dense"].median / times["fused"].median,
        **{f"{k} temporaries / TV": common.temporaries(compiled[k], unit) for k in _HELD},
        "shown": times,
    }


def main() -> None:
    """Prints the table and stores it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kept", action="store_true", help="memory that the process keeps")
    memory = MEMORY[parser.parse_args().kept]
    if memory == "kept" and os.environ.get("GLIBC_TUNABLES") != _KEPT:  # read when a process starts
        again = [sys.executable, "-m", "bench.host", "--kept"]
        os.execve(sys.executable, again, {**os.environ, "GLIBC_TUNABLES": _KEPT})
    arrays = common.inputs(TOKENS, VOCABULARY)
    table = Table(
        title=f"Value and gradient, T = {TOKENS[0]} x {TOKENS[1]}, V = {VOCABULARY}, float32, "
        f"{memory} memory: milliseconds, median and quartiles; temporaries in [T, V] float32 "
        "arrays (TV)"
    )
    for column in (
        "objective",
        "dense",
        "fused (xla)",
        "entries",
        "a + b",
        "times faster",
        "dense TV",
        "fused TV",
    ):
        table.add_column(column, justify="left" if column == "objective" else "right")
    rows = []
    for name in common.OBJECTIVES:
        row = _row(name, memory, arrays)
        shown = row.pop("shown")
        rows.append(row)
        table.add_row(
            name,
            *(str(shown[k]) for k in ("dense", "fused", "entries", "a + b")),
            f"{row['times faster']:.1f}",
            *(f"{row[f'{k} temporaries / TV']:.2f}" for k in _HELD),
        )
    console = Console(width=140)
    console.print(table)
    console.print(", ".join(f"{k} {v}" for k, v in common.setting().items()))
    console.print(f"stored in {common.add(NAME, rows, operator.itemgetter('objective', 'memory'))}")


if __name__ == "__main__":
    main()
