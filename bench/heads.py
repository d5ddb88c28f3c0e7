"""A head and its loss on this machine's CPU, logits never whole, beside dense ones: `make bench`.

    python -m bench.heads

Value and gradient, to hidden states and to the kernel, of a summed `tnff`, 512 tokens, float32;
heads as wide and with as many columns as those of the models that they are named for, made of
random numbers. Dense: T5Patches' formula on whole logits. Fused: `linear_targeted_negative_loss`
with chunks as large as it makes them by itself, and with chunks of 16 MiB, which at many columns is
a few tokens. All jitted, timed in turn in one process.
"""

from __future__ import annotations

import functools
import operator

import jax
from rich.console import Console
from rich.table import Table

from bench import common
from t5patches_kernels.linear_losses import tokens_per_chunk

NAME = "heads"  # of the file in bench/results/
TOKENS, OBJECTIVE, SMALL = 512, "tnff", 16 << 20
HEADS = {  # width, columns
    "T5 1.1 small": (512, 32128),
    "SmolLM2-135M": (576, 49152),
    "Gemma 3 270M": (640, 262144),
}
PROGRAMS = {"dense": ("dense", None), "fused": ("xla", None), "fused, 16 MiB": ("xla", SMALL)}


def _row(head: str) -> dict:
    width, columns = HEADS[head]
    arrays = [
        x.astype("float32") if x.dtype == "bfloat16" else x
        for x in common.head_inputs(TOKENS, columns, width)
    ]
    compiled = {}
    for name, (what, chunk_bytes) in PROGRAMS.items():
        loss = functools.partial(common.head_total, what, OBJECTIVE, chunk_bytes=chunk_bytes)
        compiled[name] = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays).compile()
    times = common.timed(
        {name: functools.partial(program, *arrays) for name, program in compiled.items()}, rounds=3
    )
    return {
        "head": head,
        "D": width,
        "V": columns,
        **{f"{name} ms": vars(t) for name, t in times.items()},
        **{f"{name} GiB": common.temporaries(p, 2**30) for name, p in compiled.items()},
        **{
            f"{name} tokens": tokens_per_chunk(TOKENS, columns, platform="cpu", chunk_bytes=size)
            for name, (what, size) in PROGRAMS.items()
            if what != "dense"
        },
    }


def main() -> None:
    """Prints the table and stores it."""
    rows = [_row(head) for head in HEADS]
    table = Table(title=f"{TOKENS} tokens, {OBJECTIVE}: medians; GiB beyond inputs and outputs")
    table.add_column("head")
    for name in PROGRAMS:
        table.add_column(f"{name}, ms", justify="right")
        table.add_column("GiB", justify="right")
    for row in rows:
        shown = [f"{row['head']}: D = {row['D']}, V = {row['V']}"]
        for name in PROGRAMS:
            shown += [f"{row[f'{name} ms']['median']:.0f}", f"{row[f'{name} GiB']:.2f}"]
        table.add_row(*shown)
    console = Console(width=140)
    console.print(table)
    console.print(", ".join(f"{k} {v}" for k, v in common.setting().items()))
    console.print(f"stored in {common.add(NAME, rows, operator.itemgetter('head'))}")


if __name__ == "__main__":
    main()
