"""What a cached teacher saves: `make bench-teacher`.

One update of T5 1.1, three ways: plain fine-tuning (cross-entropy), TNRF with the original model
run at each update, TNRF with its hidden states read from a cache. On this machine: milliseconds,
in turn in one process, reading the cache included. Ahead of time for a TPU: the operations of the
compiled update by the compiler's own count, but for those that no update of `edit` comes to. Random
weights and tokens; all else as `t5patches edit` has it.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from bench import common
from t5patches.editing.train import Step, TrainSettings, cache_teacher, update
from t5patches.model.protocol import LanguageModel
from t5patches.model.t5.model import T5
from t5patches.model.t5.network import T5Config
from t5patches.model.teacher_cache import ORIGINAL_HIDDEN, TeacherCache

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

LENGTH = 64
ROWS = 8
SIZES = {size: T5(T5Config(**common.T5_1_1[size])) for size in ("small", "base")}
VARIANTS = {"plain": ("ce", None), "live": ("tnrf", None), "cached": ("tnrf", "float32")}


def data(seed: int = 0) -> dict[str, np.ndarray]:
    """Random examples, one token in sixteen of TNRF's pushed down."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, common.VOCABULARIES["T5"], (2, ROWS, LENGTH)).astype(np.int32)
    weights = np.where(np.arange(ROWS * LENGTH) % 16 == 0, -1.0, 1.0)
    return {
        "inputs": tokens[0],
        "outputs": tokens[1],
        "weights": weights.reshape(ROWS, LENGTH).astype(np.float32),
    }


def step_of(model: LanguageModel, variant: str) -> tuple[Step, dict[str, np.ndarray]]:
    """The compiled update of a variant and its data."""
    objective, cached = VARIANTS[variant]
    arrays = data()
    if objective == "ce":
        arrays["weights"] = np.abs(arrays["weights"])
    settings = TrainSettings(objective=objective, batch_size=ROWS, implementation="xla")
    return Step(model, settings, arrays, cached=cached), arrays


def on_this_machine(model: LanguageModel, rounds: int) -> dict[str, Any]:
    """Milliseconds of each variant's update."""
    params = jax.jit(model.init)(jax.random.key(0))
    with tempfile.TemporaryDirectory() as directory:
        teacher = cache_teacher(directory, model, params, data(), batch_size=ROWS, dtype="float32")
        calls = {name: _advancing(model, name, params, teacher) for name in VARIANTS}
        return {f"{k} ms": vars(t) for k, t in common.timed(calls, rounds).items()}


def _advancing(
    model: LanguageModel, variant: str, params: Any, teacher: TeacherCache
) -> Callable[[], jax.Array]:
    step, arrays = step_of(model, variant)
    frozen, state = step.place(params, params), [step.start(params)]

    def call() -> jax.Array:
        batch = dict(arrays)
        if variant == "cached":
            batch[ORIGINAL_HIDDEN] = teacher.read(batch)
        state[0], metrics = step(state[0], frozen, batch, 0)
        return metrics["loss"]

    return call


def static(model: LanguageModel, chip: str) -> dict[str, float]:
    """Operations of each variant's update, by the TPU compiler."""
    from tpu_topology import compile_for

    found = {}
    for name, (objective, _) in VARIANTS.items():
        settings = TrainSettings(objective=objective, implementation="pallas_tpu")
        step, _ = step_of(model, name)
        f = functools.partial(update, model=model, settings=settings)
        compiled = compile_for(chip, f, *step.arguments, donate=(0,))
        counted = compiled.cost_analysis()["flops"] - _passed_over(model, name)
        found[f"{name} GFLOP"] = counted / 1e9
    return found


def _passed_over(model: LanguageModel, variant: str) -> int:
    """Operations that are compiled and counted, and run only where tokens' cotangents differ.

    Those of a mean over tokens do not, so the head's gradient is not made again (`autodiff`): the
    logits of each model that has a head there, and the product with the hidden states.
    """
    products = 2 if variant == "plain" else 3
    return products * 2 * ROWS * LENGTH * model.config.emb_dim * model.config.vocab_size


def shown(row: dict[str, Any], variant: str) -> list[str]:
    """A variant's milliseconds and operations, each with its ratio to plain fine-tuning."""
    ms, plain = (row.get(f"{name} ms", {}).get("median") for name in (variant, "plain"))
    timed = ["", ""] if ms is None else [f"{ms:.0f}", f"{ms / plain:.2f}"]
    flops = row[f"{variant} GFLOP"]
    return [*timed, f"{flops:.1f}", f"{flops / row['plain GFLOP']:.2f}"]


def main() -> None:
    """Prints the table and stores it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--timed", nargs="*", default=["small"], choices=list(SIZES))
    parser.add_argument("--chip", default="v4")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    table = Table(title=f"One update, {ROWS} x {LENGTH} tokens; relative to plain fine-tuning")
    for column in ("T5 1.1", "variant", "ms", "times plain", "GFLOP", "times plain"):
        table.add_column(column, justify="right")
    rows = []
    for size, model in SIZES.items():
        timed = on_this_machine(model, options.rounds) if size in options.timed else {}
        rows.append({"size": size, "chip": options.chip, **timed, **static(model, options.chip)})
        for name in VARIANTS:
            table.add_row(size, name, *shown(rows[-1], name))
    Console(width=110).print(table)
    print(f"written to {common.save('teacher-cache', rows)}")


if __name__ == "__main__":
    main()
