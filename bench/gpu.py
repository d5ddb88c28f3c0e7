r"""The table of the GPU: value and gradient of a loss, ours beside what one would use instead.

`make bench-gpu-table`, with a card at hand for a quarter of an hour; in less, `bench.card`.

    python -m bench.gpu --out bench/results/gpu.json             # the whole table
    python -m bench.gpu --tokens 2048 --vocabularies 32128        # a part of it
    python -m bench.gpu --linear --out bench/results/gpu-linear.json
    JAX_PLATFORMS=cpu python -m bench.gpu --what torch --out bench/results/gpu-torch.json

Times are of the device: calls are queued back to back and the queue's time is divided by their
number, so that a call's launch hides behind the one before it. GB/s counts the floor, two arrays
read once and one written once, whatever the program really moves; it stands beside a
device-to-device copy measured in the same process.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from bench import common

ROUNDS = 7
ROUND_SECONDS = 0.06
HEAD = {"tokens": 32768, "vocabulary": 250112, "width": 1024}
HEAD_TOKENS = 8192  # that are timed: the dense form's logits of all of them fill a card


def time_of(call: Callable[[], Any], wait: Callable[[Any], Any]) -> dict[str, float]:
    """Milliseconds a call: the median and the extremes of some rounds."""
    wait(call())
    start = time.perf_counter()
    wait(call())
    count = max(2, min(200, int(ROUND_SECONDS / (time.perf_counter() - start))))
    rounds = []
    for _ in range(ROUNDS):
        start, out = time.perf_counter(), None
        for _ in range(count):
            del out  # or two results would be held
            out = call()
        wait(out)
        rounds.append(1e3 * (time.perf_counter() - start) / count)
    return {"ms": statistics.median(rounds), "least": min(rounds), "most": max(rounds)}


# --- What is compared -----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def logits(key: Any, tokens: int, vocabulary: int, dtype: str) -> jax.Array:
    """Row by row: the random bits of a whole array would not fit beside the largest."""
    row = lambda k: (3 * jax.random.normal(k, (vocabulary,), dtype)).astype(dtype)  # noqa: E731
    return jax.lax.map(row, jax.random.split(key, tokens))


def operands(tokens: int, vocabulary: int, dtype: str) -> tuple[jax.Array, ...]:
    """Logits of two models; a quarter of the tokens pushed down."""
    keys = jax.random.split(jax.random.key(0), 3)
    y = jax.random.randint(keys[2], (tokens,), 0, vocabulary)
    w = jnp.where(jnp.arange(tokens) % 4 == 0, -1.0, 1.0)
    return *(logits(k, tokens, vocabulary, dtype) for k in keys[:2]), y, w


def run_jax(what: str, objective: str, args: tuple[jax.Array, ...]) -> dict[str, Any]:
    """Value and gradient by JAX: time, and memory beyond the inputs."""
    f = jax.jit(jax.value_and_grad(functools.partial(common.total, what, objective)))
    compiled = f.lower(*args).compile()
    memory = compiled.memory_analysis()
    row = time_of(lambda: compiled(*args), jax.block_until_ready)
    return row | {"temporary_bytes": memory.temp_size_in_bytes}


def run_torch(objective: str, tokens: int, vocabulary: int, dtype: str) -> dict[str, Any]:
    """Value and gradient of the dense formula by ``torch.compile``."""
    import torch

    from bench import torch_dense

    torch._dynamo.reset()
    losses = torch.compile(functools.partial(torch_dense.dense, objective), dynamic=False)
    kind = getattr(torch, dtype)
    z = (3 * torch.randn(tokens, vocabulary, device="cuda", dtype=kind)).requires_grad_()
    r = 3 * torch.randn(tokens, vocabulary, device="cuda", dtype=kind)
    y = torch.randint(vocabulary, (tokens,), device="cuda")
    w = torch.where(torch.arange(tokens, device="cuda") % 4 == 0, -1.0, 1.0)

    def call():
        return torch.autograd.grad(losses(z, r, y, w).sum(), z)

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    row = time_of(call, lambda _: torch.cuda.synchronize())
    peak = torch.cuda.max_memory_allocated() - before
    return row | {"temporary_bytes": peak - z.numel() * z.element_size()}


def copy_gb_per_second(torch_only: bool) -> float:
    """Bytes read and written by a copy of 4 GiB on the device, a second."""
    if torch_only:
        import torch

        x = torch.randint(1 << 30, (1 << 30,), device="cuda", dtype=torch.int32)
        row = time_of(x.clone, lambda _: torch.cuda.synchronize())
    else:
        size = 1 << (20 if jax.default_backend() == "cpu" else 30)  # a CPU is a dry run
        x = jax.random.bits(jax.random.key(1), (size,), jnp.uint32)
        copy = jax.jit(jnp.copy)
        row = time_of(lambda: copy(x), jax.block_until_ready)
    return 2 * x.nbytes / 1e6 / row["ms"]


# --- The head -------------------------------------------------------------------------------------


def run_head(
    what: str, objective: str, args: tuple[jax.Array, ...], chunk_bytes: int | None = None
) -> dict[str, Any]:
    """Value and both gradients of the head."""
    total = functools.partial(common.head_total, what, objective, chunk_bytes=chunk_bytes)
    f = jax.value_and_grad(total, (0, 1))
    compiled = jax.jit(f).lower(*args).compile()
    row = time_of(lambda: compiled(*args), jax.block_until_ready)
    return row | {"temporary_bytes": compiled.memory_analysis().temp_size_in_bytes}


# --- The tables -----------------------------------------------------------------------------------


def guarded(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row, or why there is none: a shape that one program cannot hold is a result."""
    try:
        return run()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}


def table(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The losses on logits."""
    shapes = itertools.product(options.dtypes, options.vocabularies, options.tokens)
    for dtype, vocabulary, tokens in shapes:
        floor = 3 * tokens * vocabulary * jnp.dtype(dtype).itemsize
        shape = {"tokens": tokens, "vocabulary": vocabulary, "dtype": dtype}
        args = () if options.what == ["torch"] else operands(tokens, vocabulary, dtype)
        for objective, what in itertools.product(options.objectives, options.what):
            if what == "torch":
                run = functools.partial(run_torch, objective, tokens, vocabulary, dtype)
            else:
                run = functools.partial(run_jax, what, objective, args)
            row = guarded(run)
            if "ms" in row:
                row["gb_per_second"] = floor / 1e6 / row["ms"]
            yield shape | {"objective": objective, "what": what} | row
        del args, run  # before the next shape's operands are made


def head_table(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The losses on hidden states, by bytes a chunk."""
    shape = HEAD | {"tokens": HEAD_TOKENS}
    args = common.head_inputs(**shape)
    for objective in options.objectives:
        for what in options.what:
            for mib in [None] if what == "dense" else options.chunk_mib:
                chunk_bytes = None if mib is None else mib << 20
                row = guarded(functools.partial(run_head, what, objective, args, chunk_bytes))
                chunk = {} if mib is None else {"chunk_mib": mib}
                yield (
                    shape
                    | {"dtype": "bfloat16", "objective": objective, "what": what}
                    | chunk
                    | row
                )


def line_of(row: dict[str, Any], copy: float) -> str:
    """A row as a reader wants it."""
    size = f"{row['tokens']:6d} x {row['vocabulary']:6d} {row['dtype']:9s}"
    name = f"{size} {row['objective']:6s}{row['what']:11s}"
    if "chunk_mib" in row:
        name += f"{row['chunk_mib']:5d} MiB "
    if "error" in row:
        return f"{name} {row['error'][:70]}"
    out = f"{name} {row['ms']:9.3f} ms [{row['least']:.3f}, {row['most']:.3f}]"
    if "gb_per_second" in row:
        share = row["gb_per_second"] / copy if copy else 0.0
        out += f" {row['gb_per_second']:6.0f} GB/s of the floor ({share:4.0%} of a copy)"
    return out + f" temporaries {row['temporary_bytes'] / 2**20:9.1f} MiB"


def about(torch_only: bool) -> dict[str, Any]:
    """What was measured on, with what, and when."""
    found: dict[str, Any] = dict(common.setting())
    if torch_only:
        import torch

        found |= {"torch": torch.__version__, "device": torch.cuda.get_device_name()}
    return found | {"copy_gb_per_second": copy_gb_per_second(torch_only)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192, 32768])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32128, 128256, 250112])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--objectives", nargs="+", default=["tnff", "tnrr"])
    parser.add_argument("--what", nargs="+", default=["dense", "xla", "pallas_gpu"])
    parser.add_argument("--linear", action="store_true", help="hidden states instead of logits")
    parser.add_argument("--chunk-mib", type=int, nargs="+", default=[512], help="with --linear")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    if "torch" in options.what and options.what != ["torch"]:
        parser.error("torch and JAX do not share a card's memory: --what torch has its own run")
    if options.what != ["torch"]:
        common.require_device("gpu")
    measured = about(options.what == ["torch"])
    print(measured, flush=True)
    rows = []
    for row in (head_table if options.linear else table)(options):
        rows.append(row)
        print(line_of(row, measured["copy_gb_per_second"]), flush=True)
        if options.out:  # after every row: a run that is cut short keeps what it has
            report = {"about": measured, "rows": rows}
            options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
