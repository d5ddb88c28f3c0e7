"""How the GPU kernel cuts rows up: the passes, the bytes, and that each entry has its place."""

import jax.numpy as jnp
import numpy as np
import pytest

import t5patches_kernels as tk
from t5patches_kernels.backends.pallas_gpu import plan as plans
from t5patches_kernels.core import objectives
from t5patches_kernels.core.objectives import Settings
from t5patches_kernels.core.operation import Operation, Stage

BEST = tk.BlockSizes()
ONE = tk.BlockSizes(cluster=1)
BLOCK_BYTES = 227 << 10  # that CUDA gives one, on Hopper and Blackwell


def call_of(objective, columns, dtype, sizes):
    op = Operation(Settings(objective, columns, smoothing=1e-6))
    itemsizes = (jnp.dtype(dtype).itemsize,) * 2
    return plans.call_of(op, Stage.VALUE_AND_GRAD, columns, itemsizes, 1, sizes)


def passes(columns, dtype, objective, sizes):
    call = call_of(objective, columns, dtype, sizes)
    return max(call.passes(pushed) for pushed in (False, True))


@pytest.mark.parametrize("objective", tk.TARGETED_NEGATIVE)
@pytest.mark.parametrize(
    ("columns", "dtype", "most"),
    [(32128, "bfloat16", 3.0), (128256, "bfloat16", 3.0), (250112, "bfloat16", 3.0),
     (262208, "bfloat16", 3.0), (524288, "bfloat16", 3.0), (32128, "float32", 3.0),
     (128256, "float32", 3.0), (250112, "float32", 3.0), (524288, "float32", 3.6)],
)  # fmt: skip
def test_passes(columns, dtype, most, objective):
    assert passes(columns, dtype, objective, BEST) <= most


@pytest.mark.parametrize(("objective", "most"), [("tnff", 3.32), ("tnrr", 3.48)])
def test_passes_where_a_gpu_starts_eight_blocks_together(objective, most):
    found = passes(250112, "float32", objective, tk.BlockSizes(cluster=8))
    assert round(found, 2) <= most


@pytest.mark.parametrize(
    ("dtype", "objective", "of_one"),
    [("bfloat16", "tnrr", 5.71), ("float32", "tnrr", 5.68), ("float32", "tnff", 4.79)],
)
def test_passes_of_one_block(dtype, objective, of_one):
    """A control."""
    assert round(passes(250112, dtype, objective, ONE), 2) == of_one


def test_what_is_kept_of_a_row():
    """Logarithms, where two blocks still share an SM or the reference makes room for them."""
    kept = {
        (objective, dtype, columns)
        for objective in tk.TARGETED_NEGATIVE
        for dtype in ("float32", "bfloat16")
        for columns in (32128, 250112)
        if call_of(objective, columns, dtype, BEST).keeps(pushed=True)
    }
    shapes = (("bfloat16", 32128), ("float32", 32128), ("float32", 250112))
    assert kept == {(name, *shape) for name in ("tnrr", "tnrf", "tnrll") for shape in shapes}
    assert not call_of("tnrf", 32128, "float32", BEST).keeps(pushed=False)
    assert not call_of("tnrr", 8192, "float32", ONE).keeps(pushed=True)


def test_nothing_is_written_over_logits_that_are_read_again(monkeypatch):
    def both(row, c):
        return objectives.reverse(row, c) + objectives.forward(row, c)

    for name, term in (("reverse", objectives.reverse), ("both", both)):
        monkeypatch.setitem(objectives.OBJECTIVES, name, objectives.Objective(term, term))
        kept = call_of(name, 32128, "float32", BEST).keeps(pushed=True)
        assert kept == (name == "reverse")


@pytest.mark.parametrize("cluster", [1, 2, 4, 8, 16, None])
@pytest.mark.parametrize("itemsizes", [(2, 2), (4, 4), (4, 2), (2,)])
def test_all_blocks_have_room(cluster, itemsizes):
    sizes = tk.BlockSizes(cluster)
    for columns in np.random.default_rng(0).integers(16, 65536, size=50) * 8:
        if plans.why_not(int(columns), itemsizes, sizes) is None:
            for logarithms in {False, len(itemsizes) == 2}:
                found = plans.plan(int(columns), itemsizes, sizes, logarithms)
                assert sum(buffer.bytes for buffer in found.buffers) <= BLOCK_BYTES
                assert found.blocks >= 1
                assert 1 <= found.slots <= found.chunks
                assert found.held == 1 or not found.keeps


@pytest.mark.parametrize("cluster", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_each_entry_is_summed_once(itemsize, cluster):
    """By the rule of the kernel: a chunk has what no chunk before it has had."""
    for columns in np.random.default_rng(cluster).integers(8 * cluster, 4096, size=30) * 16:
        cut = plans.plan(int(columns), (itemsize,) * 2, tk.BlockSizes(cluster), gradient=2)
        units, seen = cut.columns // cut.unit, np.zeros(cut.columns, int)
        for k in range(cluster):
            first, end = (n * units // cluster * cut.unit for n in (k, k + 1))
            assert end - first in cut.segments
            for chunk in range(cut.chunks):
                own = first + chunk * cut.chunk
                start = min(own, end - cut.chunk)
                assert start >= first
                assert start * 2 % plans.COPY_BYTES == 0  # of the gradient, as of the logits
                assert start == own or chunk == cut.chunks - 1
                seen[max(own, start) : start + cut.chunk] += 1
        assert (seen == 1).all()
