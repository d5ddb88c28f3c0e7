r"""Edits of models of a billion parameters on a GPU, beside dense JAX and torch, in six minutes.

    python -m bench.decoder_card                                # with the JAX for its GPU
    python -m bench.decoder_card --shapes "Gemma 3 1B" --libraries ours torch

One update of TNFF with Adam, of all parameters and of an adapter of rank 16, of Llama 3.2 1B's and
Gemma 3 1B's shapes with random weights: activations and what is frozen in bfloat16, what is trained
in float32, examples of 128 and 32 tokens, the original run at each update. Ours is what `t5patches
edit` does; dense is the same with the losses' dense form, on whole logits; torch is transformers'
network and peft's adapter under autocast, with T5Patches' formula. Tokens a second, what the card
held at most, and the largest batch that would fit, by a straight line through two that ran.

Each shape and library is a process of its own. What a process of JAX held at most is never less
than before: its updates run in the order of their size. Each row is stored once it is there, in
`results/decoder-card.json`, beside those of an earlier run; one that fails, for memory or anything
else, says so. When the time is over, the process at work is ended and nothing new begins.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import gc
import itertools
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bench import common, decoder, gpu
from t5patches.editing.plan import MemoryPlan, plan_memory, with_larger_chunks
from t5patches.editing.train import Step
from t5patches.model.huggingface import understand

SHAPES: dict[str, dict[str, Any]] = {
    "Llama 3.2 1B": decoder.SHAPES["Llama 3.2 1B"],
    "Gemma 3 1B": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "vocab_size": 262144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
        "layer_types": [f"{'sliding' if (i + 1) % 6 else 'full'}_attention" for i in range(26)],
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    },
}
TRAINED = ("LoRA", "all")
BATCHES = (8, 64)
OF_CARD = 0.93  # its memory that each library may take
NAME = "decoder-card"

Row = dict[str, Any]


# --- In a process of its own: a shape by a library ------------------------------------------------


def by_jax(losses: str | None, shape: str, batches: Sequence[int]) -> Iterator[Row]:
    """The updates of `t5patches edit`, in the order of what they hold."""
    model = understand(SHAPES[shape], {}, shape).replace(dtype=jnp.dtype(jnp.bfloat16))
    with jax.default_device(jax.devices("cpu")[0]):  # as they are read from a folder
        params = jax.device_get(jax.jit(model.init)(jax.random.key(0)))

    def planned(trained: str, size: int) -> Row:
        settings = dataclasses.replace(
            decoder.settings_of(trained, losses), batch_size=size, param_dtype="bfloat16"
        )
        step = Step(model, settings, decoder.batch(size))
        settings = with_larger_chunks(step, settings)
        step = step.with_settings(settings)
        return {"step": step, "plan": plan_memory(step, settings)}

    def measured(step: Step, plan: MemoryPlan, size: int) -> Row:
        state, frozen = step.start(params), step.place(params, params)
        examples = jax.device_put(decoder.batch(size), jax.devices()[0])

        def call() -> jax.Array:
            nonlocal state
            state, metrics = step(state, frozen, examples, 0)
            return metrics["loss"]

        took = gpu.time_of(call, jax.block_until_ready)
        stats = jax.devices()[0].memory_stats() or {}  # a CPU has none
        held, limit = stats.get("peak_bytes_in_use", plan.total), stats.get("bytes_limit", 0)
        return took | {"GiB": held / 2**30, "limit GiB": limit / 2**30}

    updates = list(itertools.product(TRAINED, batches))
    with concurrent.futures.ThreadPoolExecutor(len(updates)) as pool:
        plans = [pool.submit(gpu.guarded, functools.partial(planned, *of)) for of in updates]
    found = [({"trained": trained, "batch": size}, plan.result())
             for (trained, size), plan in zip(updates, plans, strict=True)]  # fmt: skip
    for row, made in sorted(found, key=lambda x: x[1]["plan"].total if "plan" in x[1] else 0):
        if "plan" in made:
            made = gpu.guarded(functools.partial(measured, **made, size=row["batch"]))
        yield row | made


def by_torch(shape: str, batches: Sequence[int], device: str = "cuda") -> Iterator[Row]:
    """The same updates by torch."""
    import torch
    import transformers

    def measured(trained: str, size: int) -> Row:
        gc.collect()  # the model before, whose modules know of each other
        settings = {
            k: v for k, v in SHAPES[shape].items() if k not in ("architectures", "model_type")
        }
        with torch.device(device):
            config = transformers.AutoConfig.for_model(SHAPES[shape]["model_type"], **settings)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        work = decoder.dense_in_torch(
            model, trained, decoder.batch(size), frozen_dtype=torch.bfloat16
        )
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with torch.autocast(device, torch.bfloat16):
            took = gpu.time_of(work.call, lambda _: None)  # it waits for its loss by itself
        held = torch.cuda.max_memory_allocated()
        limit = OF_CARD * torch.cuda.get_device_properties(0).total_memory if held else 0
        return took | {"GiB": held / 2**30, "limit GiB": limit / 2**30}

    for trained, size in itertools.product(TRAINED, batches):
        row = {"trained": trained, "batch": size}
        yield row | gpu.guarded(functools.partial(measured, trained, size))


LIBRARIES: dict[str, Callable[[str, Sequence[int]], Iterator[Row]]] = {
    "ours": functools.partial(by_jax, None),
    "torch": by_torch,
    "dense": functools.partial(by_jax, "reference"),
}


def rows_of(shape: str, library: str, batches: Sequence[int]) -> Iterator[Row]:
    """A process's rows: with tokens a second, and beside a larger batch the largest that fits."""
    smallest: dict[str, Row] = {}
    for row in LIBRARIES[library](shape, batches):
        if "ms" in row:
            tokens = row["batch"] * (decoder.PROMPT + decoder.OUTPUT)
            row["tokens a second"] = 1e3 * tokens / row["ms"]
            first = smallest.setdefault(row["trained"], row)
            if row["GiB"] > first["GiB"]:
                each = (row["GiB"] - first["GiB"]) / (row["batch"] - first["batch"])
                more = math.floor((row["limit GiB"] - row["GiB"]) / each)
                row["largest batch"] = row["batch"] + more
        yield {"shape": shape, "library": library} | row


# --- The run --------------------------------------------------------------------------------------


def command(shape: str, library: str, batches: Sequence[int]) -> list[str]:
    """What a process runs."""
    this = [sys.executable, "-m", "bench.decoder_card", "--child", shape, library]
    return [*this, "--batches", *map(str, batches)]


def of_process(shape: str, library: str, batches: Sequence[int], until: float) -> Iterator[Row]:
    """The rows of a process, until the time is over."""
    env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(OF_CARD), "XLA_PYTHON_CLIENT_PREALLOCATE": "true"}
    if library == "torch":
        env["JAX_PLATFORMS"] = "cpu"  # the card is torch's
    begun = subprocess.Popen(
        command(shape, library, batches), stdout=subprocess.PIPE, text=True, env=os.environ | env
    )
    timer = threading.Timer(max(0.0, until - time.monotonic()), begun.kill)
    timer.start()
    with begun as child:
        for line in child.stdout or ():
            if line.startswith("{"):
                yield json.loads(line)
        code = child.wait()
    timer.cancel()
    if code:
        why = "out of time" if time.monotonic() >= until else f"its process ended with {code}"
        yield {"shape": shape, "library": library, "error": why}


def main() -> None:
    """Measures, prints and stores, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    options = parser.parse_args()
    if options.child:
        shape, library = options.child
        for row in rows_of(shape, library, options.batches):
            print(json.dumps(row), flush=True)
        return
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the card is the processes'
    until = time.monotonic() + 60 * options.minutes
    common.require_device("gpu")
    parts = list(itertools.product(options.shapes, options.libraries))
    missing = 0
    for shape, library in parts:
        if time.monotonic() >= until:
            missing += 1
            continue
        for row in of_process(shape, library, options.batches, until):
            print(*(f"{x:.4g}" if isinstance(x, float) else x for x in row.values()), flush=True)
            common.add(NAME, [row], _which)
    print(f"{common.RESULTS / NAME}.json; of {len(parts)} processes {missing} did not begin")


def _which(row: Row) -> tuple:
    """What a row is of: another of the same takes its place."""
    return tuple(row.get(name) for name in ("shape", "library", "trained", "batch"))


if __name__ == "__main__":
    main()
