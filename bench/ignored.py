"""What tokens of weight 0 cost on this machine's CPU, skipped and not: part of `make bench`.

    python -m bench.ignored

Value and gradient of a summed loss, T = 1024, V = 32128 (hidden states: D = 512), float32, jitted,
all forms timed in turn in one process. Without `skip_ignored` a token costs the same whatever its
weight. Of the half that is ignored, every other token is, or 64 and 64 in turn, as prompts and
padding are. The zeros alone: a program that makes the zeros of the gradients and nothing else.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from bench import common
from t5patches_kernels import linear_targeted_negative_loss, targeted_negative_loss

NAME = "ignored"  # of the file in bench/results/
TOKENS, WIDTH, VOCABULARY = 1024, 512, common.VOCABULARIES["T5"]
OBJECTIVES = ("tnff", "tnrf")
COUNTED = {
    "all": lambda t: t >= 0,
    "every other": lambda t: t % 2 == 1,
    "64 of 128": lambda t: t // 64 % 2 == 1,
}


def _on_logits(h, kernel, r, y, w, **options):
    return targeted_negative_loss(h, r, y, w, **options).loss.sum()


def _on_hidden(h, kernel, r, y, w, **options):
    return linear_targeted_negative_loss(*(h, kernel, h, r), y, w, **options).loss.sum()


def _row(losses: Callable, objective: str, arrays: tuple) -> dict:
    of = (0, 1) if losses is _on_hidden else (0,)
    calls = {}
    for skip in (False, True):
        loss = functools.partial(losses, objective=objective, skip_ignored=skip)
        program = jax.jit(jax.value_and_grad(loss, of))
        for counted, among in COUNTED.items() if skip else [("all", COUNTED["all"])]:
            w = among(jnp.arange(TOKENS)).astype(jnp.float32)
            name = f"skipping, {counted}" if skip else "not skipping"
            calls[name] = functools.partial(program, *arrays, w)
    zeros = jax.jit(lambda *model: [jnp.zeros_like(x) for x in model])
    calls["the zeros alone"] = functools.partial(zeros, *(arrays[i] for i in of))
    times = common.timed(calls, rounds=15)
    return {
        "of": "hidden states" if losses is _on_hidden else "logits",
        "objective": objective,
        "V": VOCABULARY,
        **{f"{name} ms": vars(t) for name, t in times.items()},
        **{
            f"{name} / not": times[name].median / times["not skipping"].median
            for name in calls
            if name != "not skipping"
        },
    }


def main() -> None:
    """Prints the table and stores it."""
    keys = jax.random.split(jax.random.key(0), 4)
    h = jax.random.normal(keys[0], (TOKENS, WIDTH)) / 8
    kernel, other = (jax.random.normal(key, (WIDTH, VOCABULARY)) / 8 for key in keys[1:3])
    y = jax.random.randint(keys[3], (TOKENS,), 0, VOCABULARY)
    logits = (h @ kernel, kernel, h @ other, y)
    rows = []
    for objective in OBJECTIVES:
        rows.append(_row(_on_hidden, objective, (h, kernel, other, y)))
        rows.append(_row(_on_logits, objective, logits))
    table = Table(title="Half of the tokens ignored: time by that without skipping")
    shares = [name for name in rows[0] if name.endswith("/ not")]
    for column in ("of", "objective", "V", "not skipping, ms", *shares):
        table.add_column(column)
    for row in rows:
        first = (row["of"], row["objective"], str(row["V"]))
        median = f"{row['not skipping ms']['median']:.0f}"
        table.add_row(*first, median, *(f"{row[name]:.2f}" for name in shares))
    console = Console(width=140)
    console.print(table)
    console.print(", ".join(f"{k} {v}" for k, v in common.setting().items()))
    key = operator.itemgetter("of", "objective", "V")
    console.print(f"stored in {common.add(NAME, rows, key)}")


if __name__ == "__main__":
    main()
