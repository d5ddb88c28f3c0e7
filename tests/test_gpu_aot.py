"""What the real compiler makes of the losses for an H200, ahead of time: no card needed."""

import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from gpu_topology import column_loops, compile_for, device, passes
from harness import CASES, MAIN, slow_unless

import t5patches_kernels as tk
from bench import common, gpu
from t5patches_kernels.backends.pallas_gpu import plan as plans
from t5patches_kernels.core.objectives import Settings
from t5patches_kernels.core.operation import Operation, Stage

pytestmark = pytest.mark.skipif(isinstance(device(), str), reason=str(device()))

T, V = 2048, 32128
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Arrays read and written for value and gradient, at best: those of one row, of two, and of two
# where the reference's normaliser must be known first.
OWN, FORWARD, REVERSE = 3, 5, 6
PASSES = {
    name: OWN
    if name.split("-")[0] in ("ul", "nl", "ce")
    else REVERSE
    if name.split("-")[0] in ("tnrr", "tnrf", "tnrll") or name == "kl_reverse"
    else FORWARD
    for name in CASES
}


def program(name, implementation, dtype, *, gradient, rows=T, size=V, card="H200"):
    """A loss, or its value and gradient, compiled."""

    def total(z, r, y, w):
        out = CASES[name](z, r, y, w, None, implementation)
        return out.loss.sum(), out

    f = jax.value_and_grad(total, has_aux=True) if gradient else total
    z = jax.ShapeDtypeStruct((rows, size), DTYPES[dtype])
    y, w = (jax.ShapeDtypeStruct((rows,), x) for x in (jnp.int32, jnp.float32))
    return compile_for(device(card), f, z, z, y, w)


# --- The streaming form ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [slow_unless((i + j) % (3 if name in MAIN else 6) == 0, name, dtype)
     for i, name in enumerate(CASES) for j, dtype in enumerate(DTYPES)],
)  # fmt: skip
def test_passes(name, dtype):
    compiled = program(name, "xla", dtype, gradient=True)
    assert passes(compiled, (T, V)) == PASSES[name]
    large = T * V * jnp.dtype(DTYPES[dtype]).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < 0.06 * large


CARDS = ("H100", "A100", "L4", "B200", "RTX 5090")
ON_OTHER_CARDS = {
    ("tnff", "H100"),
    ("tnrf", "H100"),
    ("tnrll", "A100"),
    ("tnrf", "B200"),
    ("ce", "L4"),
}


@pytest.mark.parametrize(
    ("name", "card", "dtype"),
    [slow_unless(dtype == "float32" and (name, card) in ON_OTHER_CARDS, name, card, dtype)
     for name in MAIN for card in CARDS for dtype in DTYPES],
)  # fmt: skip
def test_passes_as_xla_sees_another_card(name, card, dtype):
    """What it fuses depends on that: masks were once stored on an H100, and not on an H200."""
    compiled = program(name, "xla", dtype, gradient=True, card=card)
    assert passes(compiled, (T, V)) == PASSES[name]


@pytest.mark.parametrize("name", ["tnff", "tnrr", "ce"])
def test_passes_for_the_value_alone(name):
    looks = {OWN: 1, FORWARD: 2, REVERSE: 3}
    compiled = program(name, "xla", "float32", gradient=False)
    assert passes(compiled, (T, V)) == looks[PASSES[name]]


@pytest.mark.parametrize("name", ["tnff", "tnrf-divergence"])
@pytest.mark.parametrize("size", [50257, 250112])
def test_passes_at_other_vocabularies(name, size):
    compiled = program(name, "xla", "float32", gradient=True, rows=512, size=size)
    assert passes(compiled, (512, size)) == PASSES[name]
    assert compiled.memory_analysis().temp_size_in_bytes < 0.06 * 512 * size * 4


def test_a_pass_is_counted():
    """A control: the dense formula makes more passes, a sum of two arrays three."""
    assert passes(program("tnrr", "reference", "float32", gradient=True), (T, V)) > REVERSE
    z = jax.ShapeDtypeStruct((T, V), jnp.float32)
    assert passes(compile_for(device(), jnp.add, z, z), (T, V)) == 3


# --- The kernel -----------------------------------------------------------------------------------


@pytest.fixture
def spills(tmp_path, monkeypatch):
    """What ptxas says it spilled, in bytes, once something has been compiled."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))

    def read() -> list[int]:
        reports = [x.read_text() for x in pathlib.Path(tmp_path).glob("*.ptxas")]
        return [int(n) for x in reports for n in re.findall(r"(\d+) bytes spill", x)]

    return read


def check_kernel(name, dtype, gradient, size, spills):
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu", reason="needs absl-py")
    text = program(name, "pallas_gpu", dtype, gradient=gradient, rows=264, size=size).as_text()
    assert "mosaic_gpu" in text
    assert not any(spills())  # none at all where the same kernel was compiled before


@pytest.mark.skipif(
    shutil.which("ptxas") is None, reason="needs ptxas: pip install nvidia-cuda-nvcc"
)
def test_spills_are_reported(spills):
    """A control."""
    check_kernel("tnff", "float32", True, V + 4, spills)
    assert spills()


@pytest.mark.parametrize(
    ("name", "dtype", "gradient"),
    [slow_unless((i + 2 * j + gradient) % 6 == 1, name, dtype, gradient)
     for i, name in enumerate(MAIN) for j, dtype in enumerate(DTYPES)
     for gradient in (False, True)],
)  # fmt: skip
def test_kernel(name, dtype, gradient, spills):
    check_kernel(name, dtype, gradient, V, spills)


@pytest.fixture
def instructions(tmp_path, monkeypatch):
    """Those of a kernel's column loops, for rows in bfloat16 that fit into shared memory."""
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu", reason="needs absl-py")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))

    def loops(name, implementation="pallas_gpu", size=8192):
        program(name, implementation, "bfloat16", gradient=True, rows=264, size=size)
        return column_loops(next(tmp_path.glob("*.ptx")).read_text())

    return loops


def special_functions(lines):
    found = [line for line in lines if re.match(r"(ex2|lg2|rcp|sqrt|rsqrt|tanh)\.", line)]
    assert all(".ftz." in line for line in found)  # each is one instruction of the card's
    return found


@pytest.mark.parametrize(
    ("name", "most", "special"), [("tnrr", 44.5, 7), slow_unless(False, "tnff", 31, 4)]
)
def test_instructions_of_an_entry(name, most, special, instructions):
    lines = [line for step in instructions(name) for line in step]
    entries = 16  # of a thread, in one step of each loop
    assert len(lines) <= most * entries
    assert len(special_functions(lines)) <= special * entries


@pytest.mark.parametrize(
    ("size", "entries", "most", "special"),
    [(V, 16, 40, 5), slow_unless(False, 128256, 16, 40, 5), slow_unless(False, 250112, 14, 46, 7)],
)
def test_instructions_of_an_entry_of_a_cluster(size, entries, most, special, instructions):
    """The logarithm is kept where there is room for it."""
    op = Operation(Settings("tnrr", size, smoothing=1e-6))
    call = plans.call_of(op, Stage.VALUE_AND_GRAD, size, (2, 2), 1, tk.BlockSizes())
    assert (call.plan.chunk, call.keeps(pushed=True)) == (entries * plans.THREADS, special == 5)
    lines = [line for step in instructions("tnrr", tk.BlockSizes(), size) for line in step]
    assert len(lines) <= most * entries
    assert len(special_functions(lines)) <= special * entries


@pytest.mark.parametrize("name", [slow_unless(True, "tnrf"), slow_unless(False, "tnrll")])
def test_a_kept_row_has_two_loops_and_no_logarithm(name, instructions):
    """One over the reference, two with logarithms, and those of kept rows."""
    logarithms = [any("lg2." in line for line in step) for step in instructions(name)]
    assert sorted(logarithms) == [False, False, False, True, True]


SHARED = re.compile(r"dynamic_shared_memory_size %c(\d+)_i32")


@pytest.mark.parametrize(
    ("name", "dtype", "cluster", "size"),
    [slow_unless((name, dtype, cluster, size) == ("tnrr", "bfloat16", 16, 250112),
                 name, dtype, cluster, size)
     for name in MAIN for dtype in DTYPES
     for cluster, size in ((2, V), (4, V), (8, 250112), (16, 250112), (16, 524288))],
)  # fmt: skip
def test_kernel_of_a_cluster(name, dtype, cluster, size, tmp_path, monkeypatch):
    """Blocks start, meet and leave together, read each other's sums, and hold what is planned."""
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu", reason="needs absl-py")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    sizes = tk.BlockSizes(cluster)
    rows = 264 - cluster - len(name)  # others than where the same kernel was compiled before
    program(name, sizes, dtype, gradient=True, rows=rows, size=size)
    ptx, ptxas, passes = (
        next(tmp_path.glob(f"*.{x}")).read_text() for x in ("ptx", "ptxas", "mlir-passes.log")
    )
    assert f".reqnctapercluster {cluster}, 1, 1" in ptx
    itemsizes = (jnp.dtype(dtype).itemsize,) * (2 if name in tk.TARGETED_NEGATIVE else 1)
    op = Operation(Settings(name, size, smoothing=1e-6))
    call = plans.call_of(op, Stage.VALUE_AND_GRAD, size, itemsizes, 1, sizes)
    plan = call.plan
    kinds = (True, False) if call.branches else (True,)
    met = sum(2 + call.reads_reference_first(pushed) for pushed in kinds)  # to merge, and to leave
    arrive, wait = (ptx.count(f"barrier.cluster.{x}.aligned;") for x in ("arrive", "wait"))
    assert (arrive, wait) == (met, met + 1)  # Mosaic's own at the start arrives without order
    # The numbers of blocks whose memory is read, from jax 0.12 in a register for several reads.
    numbers = dict(re.findall(r"mov\.b32\s+(%r\d+), (\d+);", ptx))
    of_blocks = re.findall(r"mapa\.shared::cluster\.u\d\d .*, (\S+);", ptx)
    of_blocks = [int(numbers.get(block, block)) for block in of_blocks]
    assert {*of_blocks} == {*range(cluster)}
    assert len({of_blocks.count(block) for block in of_blocks}) == 1
    reads = ptx.count("ld.shared::cluster")
    if jax.__version_info__ < (0, 12):
        assert reads == len(of_blocks)
    assert reads >= len(of_blocks)
    assert reads % cluster == 0
    assert not any(int(n) for n in re.findall(r"(\d+) bytes spill", ptxas))
    assert {int(n) for n in SHARED.findall(passes)} == {sum(x.bytes for x in plan.buffers)}
    (registers,) = (int(n) for n in re.findall(r"Used (\d+) registers", ptxas))
    assert -(-registers // 8) * 8 * plans.THREADS * plan.blocks <= 65536


_FOR_BLACKWELL = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest, test_gpu_aot
for case in sys.argv[2:]:
    name, dtype, cluster = case.split(":")
    sizes = test_gpu_aot.tk.BlockSizes(int(cluster))
    test_gpu_aot.program(name, sizes, dtype, gradient=True, rows=264, card="B200")
"""


@pytest.mark.parametrize(
    "cases",
    [("tnrf:float32:1", "tnrr:bfloat16:2"),
     pytest.param(tuple(f"{x}:{d}:{c}" for x in MAIN for d in DTYPES for c in (1, 4, 16)),
                  marks=pytest.mark.slow)],
)  # fmt: skip
def test_kernels_for_blackwell(cases, tmp_path):
    """In a process of its own: Mosaic calls ptxas for the card that it first compiled for."""
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu", reason="needs absl-py")
    command = [sys.executable, "-c", _FOR_BLACKWELL, str(pathlib.Path(__file__).parent), *cases]
    environment = os.environ | {"MOSAIC_GPU_DUMP_TO": str(tmp_path)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    texts, reports = ([x.read_text() for x in tmp_path.glob(f"*.{y}")] for y in ("ptx", "ptxas"))
    assert len(texts) == len(cases)
    assert all(".target sm_100a" in text for text in texts)
    assert len(reports) == (0 if shutil.which("ptxas") is None else len(cases))
    spilled = [int(n) for x in reports for n in re.findall(r"(\d+) bytes spill", x)]
    assert spilled or not reports
    assert not any(spilled)


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_kernel_of_a_large_vocabulary(name, dtype, gradient, spills):
    check_kernel(name, dtype, gradient, 250112, spills)


def test_kernel_under_checkpoint():
    """The interpreter cannot show this one: JAX does not rematerialise its callbacks."""

    def total(z, r, y, w):
        out = tk.targeted_negative_loss(z, r, y, w, objective="tnrr", implementation="pallas_gpu")
        return out.loss.sum()

    z = jax.ShapeDtypeStruct((264, V), jnp.float32)
    y, w = (jax.ShapeDtypeStruct((264,), x) for x in (jnp.int32, jnp.float32))
    compile_for(device(), jax.grad(jax.checkpoint(total)), z, z, y, w)


# --- The head -------------------------------------------------------------------------------------


def head(implementation, objective, size, rows=1024, width=64):
    """Value and both gradients of a head in bfloat16, compiled."""
    h, k = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((rows, width), (width, size)))
    y, w = (jax.ShapeDtypeStruct((rows,), x) for x in (jnp.int32, jnp.float32))
    f = jax.value_and_grad(functools.partial(common.head_total, implementation, objective), (0, 1))
    return compile_for(device(), f, h, k, h, k, y, w)


def held_by_a_head(implementation, rows):
    """Bytes of temporaries at the shapes of bench.gpu, by chunks of the default size."""
    compiled = head(implementation, "tnff", gpu.HEAD["vocabulary"], rows, gpu.HEAD["width"])
    return compiled.memory_analysis().temp_size_in_bytes


def test_a_head_in_chunks_takes_little_memory():
    dense, streamed = (held_by_a_head(what, gpu.HEAD["tokens"]) for what in ("dense", "xla"))
    assert streamed < 0.05 * dense


@pytest.mark.parametrize(
    ("implementation", "rows"),
    [("pallas_gpu", gpu.HEAD_TOKENS), slow_unless(False, "pallas_gpu", gpu.HEAD["tokens"]),
     slow_unless(False, tk.BlockSizes(), gpu.HEAD_TOKENS)],
)  # fmt: skip
def test_a_head_by_the_kernel_takes_no_more_than_four_gibibytes(implementation, rows):
    """Two logits and their gradient in float32 are 23 GiB at T = 8192."""
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu", reason="needs absl-py")
    assert 0 < held_by_a_head(implementation, rows) < 4 << 30


def test_a_head_stores_the_gradient_as_its_products_take_it():
    """The kernel's gradient to a chunk's logits is bfloat16, and no pass converts it."""
    text = head("pallas_gpu", "tnff", V).as_text()
    kernel = re.findall(r"= \(f32\[\S+ (\w+)\[1024,32128\]\S* custom-call\(", text)
    converted = re.findall(r"= (\w+)\[1024,32128\]\S* fusion\(.*calls=%wrapped_convert", text)
    assert (kernel, converted) == (["bf16"], [])


@pytest.mark.parametrize("implementation", [None, "pallas_gpu", tk.BlockSizes(cluster=4)])
def test_a_head_of_rows_that_are_whole_copies_in_float32_alone(implementation):
    """The kernel then leaves the gradient in float32."""
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu", reason="needs absl-py")
    text = head(implementation, "tnff", 32100).as_text()
    assert re.findall(r"= \(f32\[\S+ (\w+)\[\d+,32100\]\S* custom-call\(", text) == ["f32"]


@pytest.mark.parametrize(
    ("objective", "cluster", "size"),
    [slow_unless((objective, cluster) == ("tnrr", 16), objective, cluster, size)
     for objective in ("tnff", "tnrr") for cluster in (2, 16) for size in (50264, 262208)],
)  # fmt: skip
def test_a_head_over_a_cluster(objective, cluster, size, tmp_path, monkeypatch):
    """Where 16 bytes of the logits are 8 of the gradient: both are in the plan."""
    pytest.importorskip("jax.experimental.pallas.mosaic_gpu", reason="needs absl-py")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    sizes = tk.BlockSizes(cluster)
    head(sizes, objective, size, rows=264 - cluster)
    op = Operation(Settings(objective, size, smoothing=1e-6), gradient_dtype="bfloat16")
    plan = plans.call_of(op, Stage.VALUE_AND_GRAD, size, (4, 4), 1, sizes).plan
    passes = next(tmp_path.glob("*.mlir-passes.log")).read_text()
    assert {int(n) for n in SHARED.findall(passes)} == {sum(x.bytes for x in plan.buffers)}
    assert plan.unit == 8
