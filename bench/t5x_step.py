r"""The whole T5X training step, ours beside T5Patches' own: `make bench-t5x T5X=FOLDER`.

    python -m bench.t5x_step               # this machine: T5 1.1 small, time and memory
    python -m bench.t5x_step --chip v4     # static: T5 1.1 base for a TPU, memory

Three steps of one objective: T5Patches' trainer and model; ours in their place, on the same T5X
network; ours with `t5patches.network` and `fused_head=True`. All with T5X's Adafactor, no dropout,
each sequence of 64 tokens on both sides. Needs T5X on PYTHONPATH and T5Patches' checkout in
T5PATCHES_UPSTREAM.

**Static** figures are the TPU compiler's own, ahead of time: nothing ran on a TPU. T5Patches' step
is compiled as its trainer makes it, with the original parameters as constants.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench import common

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

LENGTH = 64
VARIANTS = ("upstream", "ours", "ours, fused head")
GIB = 2**30


class Step(NamedTuple):
    """A training step of one variant."""

    library: Any
    model: Any
    state: Any  # shapes
    initializer: Any
    partitioner: Any

    def trainer(self, library: Any, state: Any) -> Any:
        """The trainer of a library, from a train state."""
        return library.trainer.SelfDistillationTrainer(
            self.model,
            train_state=state,
            partitioner=self.partitioner,
            eval_names=[],
            summary_dir=None,
            train_state_axes=self.initializer.train_state_axes,
            rng=jax.random.PRNGKey(1),
            learning_rate_fn=lambda step: 1e-3,
            num_microbatches=None,
        )


def prepare(
    variant: str,
    objective: str,
    sizes: Mapping[str, Any],
    batch: Mapping[str, Any],
    dtype: str,
    implementation: str,
    partitioner: Any,
) -> Step:
    """The model of a variant and the shapes of its train state, for batches like `batch`."""
    import t5x_stack
    from t5x import utils
    from t5x.examples.t5 import network as t5x_network

    from t5patches import network

    fused = variant == VARIANTS[2]
    module = network if fused else t5x_network
    config = module.T5Config(dtype=dtype, **sizes)
    library = t5x_stack.upstream() if variant == "upstream" else t5x_stack.OURS
    options = (
        {} if variant == "upstream" else {"implementation": implementation, "fused_head": fused}
    )
    model = t5x_stack.model(library, objective, module.Transformer(config), **options)
    initializer = utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes={name: x.shape for name, x in batch.items()},
        input_types={name: x.dtype for name, x in batch.items()},
        partitioner=partitioner,
    )
    return Step(library, model, initializer.global_train_state_shape, initializer, partitioner)


# --- On this machine ------------------------------------------------------------------------------


def constants(text: str) -> int:
    """Bytes of the float constants in a compiled program."""
    found = re.findall(r"f32\[([\d,]+)\]\S* constant\(", text)
    return sum(4 * math.prod(int(n) for n in shape.split(",")) for shape in found)


def on_this_machine(objective: str, rows: int) -> dict[str, Any]:
    """Time and memory of the variants, in turn in one process."""
    import t5x_stack

    row: dict[str, Any] = {"objective": objective}
    calls: dict[str, Callable[[], Any]] = {}
    batch = t5x_stack.batch(rows, LENGTH, vocabulary=common.VOCABULARIES["T5"])
    for variant in VARIANTS:
        step = prepare(
            variant, objective, common.T5_1_1["small"], batch, "float32", "xla",
            t5x_stack.partitioner(),
        )  # fmt: skip
        trainer = step.trainer(step.library, step.initializer.from_scratch(jax.random.PRNGKey(0)))
        state = trainer.train_state
        start = time.perf_counter()
        compiled = trainer._partitioned_train_step.lower(state, batch).compile()
        row[f"{variant} compile s"] = time.perf_counter() - start
        program = getattr(compiled, "_step", compiled)  # ours takes the original along
        row[f"{variant} temporaries MiB"] = common.temporaries(program, 2**20)
        row[f"{variant} constants MiB"] = constants(program.as_text()) / 2**20
        calls[variant] = functools.partial(_advance, compiled, [state], batch)
        trainer.close()
        del trainer, state
        gc.collect()
    for name, t in common.timed(calls, rounds=3).items():
        row[f"{name} ms"] = vars(t)
    return row


def _advance(compiled: Callable, state: list, batch: Any) -> Any:
    """One step; the state before it is given away."""
    state[0], metrics = compiled(state[0], batch)
    return metrics["loss"].total


# --- For a TPU, ahead of time ---------------------------------------------------------------------


def memory(compiled: Any) -> dict[str, float]:
    """What a compiled step takes of a device's memory, by its compiler."""
    found = compiled.memory_analysis()
    of = {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "program": found.generated_code_size_in_bytes,
        "peak": found.peak_memory_in_bytes,
    }
    not_in_place = found.output_size_in_bytes - found.alias_size_in_bytes
    of["all"] = of["arguments"] + not_in_place + of["temporaries"] + of["program"]
    return {f"{name} GiB": size / GIB for name, size in of.items()}


def static(chip: str, objective: str, variant: str, rows: int) -> dict[str, Any]:
    """What the TPU compiler says of a step of T5 1.1 base."""
    import t5x_stack
    from t5x.train_state import InferenceState
    from tpu_topology import compile_for

    batch = t5x_stack.batch(rows, LENGTH)
    step = prepare(
        variant, objective, common.T5_1_1["base"], batch, "bfloat16", "pallas_tpu",
        t5x_stack.partitioner(),
    )  # fmt: skip
    train = step.library.trainer.train_with_lr

    def run(state, batch, original):
        return train(
            state,
            batch,
            learning_rate=jnp.float32(1e-3),
            dropout_rng=jax.random.PRNGKey(0),
            model=step.model,
            num_microbatches=None,
            orig_train_state=InferenceState(step=None, params=original),
        )

    original = step.state.params
    if variant == "upstream":
        rng = np.random.default_rng(0)  # numbers that do not compress
        original = jax.tree.map(
            lambda x: rng.standard_normal(x.shape, np.float32).astype(x.dtype), original
        )
        held, arguments = original, (step.state, batch)

        def f(state, batch):
            return run(state, batch, held)
    else:
        f, arguments = run, (step.state, batch, original)
    start = time.perf_counter()
    compiled = compile_for(chip, f, *arguments, donate=(0,))
    seconds = time.perf_counter() - start
    cost = compiled.cost_analysis()
    return {
        "chip": chip,
        "objective": objective,
        "variant": variant,
        "compile s": seconds,
        **memory(compiled),
        "accessed GB": cost["bytes accessed"] / 1e9,
        "TFLOP": cost["flops"] / 1e12,
    }


def _store(name: str, row: dict[str, Any]) -> pathlib.Path:
    """Writes a row, instead of an earlier one of the same program."""

    def key(row: dict[str, Any]) -> tuple:
        return row["objective"], row.get("variant"), row.get("chip")

    return common.add(name, [row], key, load=os.getloadavg()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--objectives", nargs="+", default=["TNFF", "TNRR"])
    parser.add_argument("--chip", help="compile for this TPU instead of measuring here")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--rows", type=int, help="sequences in a batch (default 32; 8 here)")
    options = parser.parse_args()
    for objective in options.objectives:
        for variant in options.variants if options.chip else [None]:
            if options.chip:
                row = static(options.chip, objective, variant, options.rows or 32)
            else:
                row = on_this_machine(objective, options.rows or 8)
            print(row, flush=True)
            print(_store("t5x-step-static" if options.chip else "t5x-step", row), flush=True)


if __name__ == "__main__":
    main()
