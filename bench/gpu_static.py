r"""The static table of the GPU programs: what the compiler says of them, ahead of time.

    python -m bench.gpu_static
    python -m bench.gpu_static --clusters   # rows that a cluster of blocks shares

**Nothing here ran on a GPU.** Passes are the ``[T, V]`` arrays that the optimised program reads and
writes, counted in its HLO; temporaries are the compiler's own figure, in such arrays; registers and
spills are ptxas's. Of clusters, passes are those of the plan. Needs the CUDA plugin: ``pip install
--no-deps jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import pathlib
import re
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

from bench import common, gpu
from t5patches_kernels import BlockSizes
from t5patches_kernels.backends.pallas_gpu import plan as plans
from t5patches_kernels.core.objectives import Settings
from t5patches_kernels.core.operation import Operation, Stage

sys.path.append(str(pathlib.Path(__file__).parent.parent / "tests"))
import gpu_topology

TOKENS, VOCABULARY = 2048, common.VOCABULARIES["T5"]
LARGEST = 524288  # that a cluster takes


def shapes(tokens: int, vocabulary: int, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Logits of two models, targets and weights."""
    z = jax.ShapeDtypeStruct((tokens, vocabulary), dtype)
    return z, z, *(jax.ShapeDtypeStruct((tokens,), x) for x in (jnp.int32, jnp.float32))


def streamed(card: jax.Device, objective: str, dtype: Any) -> dict[str, Any]:
    """Passes and temporaries of the dense formula and of the streaming form."""
    row: dict[str, Any] = {}
    for what in ("dense", "xla"):
        f = jax.value_and_grad(functools.partial(common.total, what, objective))
        compiled = gpu_topology.compile_for(card, f, *shapes(TOKENS, VOCABULARY, dtype))
        unit = TOKENS * VOCABULARY * jnp.dtype(dtype).itemsize
        row[f"{what} passes"] = gpu_topology.passes(compiled, (TOKENS, VOCABULARY))
        row[f"{what} temporaries"] = round(common.temporaries(compiled, unit), 4)
    return row


def kernel(card: jax.Device, objective: str, dtype: Any) -> dict[str, Any]:
    """Chunks, slots, registers and spills of the kernel."""
    plan = plans.plan(VOCABULARY, (jnp.dtype(dtype).itemsize,) * 2)
    row: dict[str, Any] = {"chunks": plan.chunks, "slots": plan.slots}
    return row | assembled(card, "pallas_gpu", objective, VOCABULARY, dtype)


def assembled(
    card: jax.Device, what: str | BlockSizes, objective: str, vocabulary: int, dtype: Any
) -> dict[str, int]:
    """What ptxas says of the kernel."""
    with tempfile.TemporaryDirectory() as dump:
        os.environ["MOSAIC_GPU_DUMP_TO"] = dump
        f = jax.value_and_grad(functools.partial(common.total, what, objective))
        gpu_topology.compile_for(card, f, *shapes(TOKENS, vocabulary, dtype))
        reports = "".join(x.read_text() for x in pathlib.Path(dump).glob("*.ptxas"))
    found = re.search(r"Used (\d+) registers", reports)
    if not found:  # there is no ptxas here, or the same kernel was compiled before
        return {}
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", reports))
    return {"registers": int(found[1]), "spilled bytes": spilled}


def cluster(card: jax.Device, objective: str, vocabulary: int, dtype: Any) -> dict[str, Any]:
    """The best plan of rows that a cluster of blocks shares, beside that of one block a row."""
    op = Operation(Settings(objective, vocabulary, smoothing=1e-6))
    itemsizes = (jnp.dtype(dtype).itemsize,) * 2

    def call(sizes: BlockSizes) -> plans.Call:
        return plans.call_of(op, Stage.VALUE_AND_GRAD, vocabulary, itemsizes, 1, sizes)

    best, one = BlockSizes(), BlockSizes(cluster=1)
    plan = call(best).plan
    row: dict[str, Any] = {"cluster": plan.cluster, "blocks an SM": plan.blocks}
    row["shared memory"] = {buffer.name: buffer.bytes for buffer in plan.buffers}
    row["passes"] = round(call(best).passes(pushed=True), 2)
    if not plans.why_not(vocabulary, itemsizes, one):
        row["passes, one block"] = round(call(one).passes(pushed=True), 2)
    return row | assembled(card, best, objective, vocabulary, dtype)


def head(card: jax.Device, objective: str) -> dict[str, Any]:
    """Temporaries of the head: the logits whole, or made in chunks."""
    tokens, vocabulary, width = (gpu.HEAD[k] for k in ("tokens", "vocabulary", "width"))
    h, k = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((tokens, width), (width, vocabulary)))
    rest = shapes(tokens, vocabulary, jnp.bfloat16)[2:]
    row: dict[str, Any] = dict(gpu.HEAD) | {"objective": objective, "dtype": "bfloat16"}
    for what in ("dense", "xla"):
        f = jax.value_and_grad(functools.partial(common.head_total, what, objective), (0, 1))
        compiled = gpu_topology.compile_for(card, f, h, k, h, k, *rest)
        row[f"{what} GiB"] = round(common.temporaries(compiled, 2**30), 2)
    return row


def main() -> None:
    card = gpu_topology.device()
    if isinstance(card, str):
        raise SystemExit(card)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clusters", action="store_true", help="these alone")
    rows = []
    if parser.parse_args().clusters:
        sizes = (*common.VOCABULARIES.values(), LARGEST)
        for of in itertools.product(sizes, ("float32", "bfloat16"), ("tnff", "tnrr")):
            vocabulary, dtype, objective = of
            row: dict[str, Any] = dict(zip(("vocabulary", "dtype", "objective"), of, strict=True))
            rows.append(row | cluster(card, objective, vocabulary, dtype))
            print(rows[-1], flush=True)
        print(f"stored in {common.save('gpu-clusters', rows)}")
        return
    for objective in common.OBJECTIVES:
        for dtype in ("float32", "bfloat16"):
            row = {"compiled for": card.device_kind}
            row |= {"objective": objective, "dtype": dtype}
            rows.append(row | streamed(card, objective, dtype) | kernel(card, objective, dtype))
            print(rows[-1], flush=True)
    rows.append(head(card, "tnff"))
    print(rows[-1])
    print(f"stored in {common.save('h200-static', rows)}")


if __name__ == "__main__":
    main()
