"""The GPU kernel, interpreted: the oracle, races, the transforms, and what it cannot run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import (
    CASES,
    MAIN,
    TAKES_EDITS,
    Batch,
    _compiled,
    assert_as_good_as_dense,
    batch,
    one_of_each,
    slow_unless,
)

import t5patches_kernels as tk

pytest.importorskip("jax.experimental.pallas.mosaic_gpu", reason="needs absl-py")
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from t5patches_kernels import dispatch
from t5patches_kernels.backends.pallas_gpu import kernel as pallas_gpu
from t5patches_kernels.backends.pallas_gpu import plan as plans
from t5patches_kernels.core.objectives import Settings
from t5patches_kernels.core.operation import Operands, Operation, Stage, Tokens

NAME = "pallas_gpu"
SIZE = 1288  # three chunks of 512, the last of them overlapping, in two slots


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Rows that do not fit, at sizes an interpreter can bear."""
    monkeypatch.setattr(plans, "_WIDE", 128)
    monkeypatch.setattr(plans, "_PIECES", 4)
    monkeypatch.setattr(plans, "_SHARED_BYTES", 12 << 10)
    assert plans.plan(SIZE, (4, 4)) == plans.Plan(SIZE, (4, 4), 4, 1, lanes=128, pieces=4, slots=2)


# On every run three of them in float32, and another in bfloat16.
@pytest.mark.parametrize(
    "name", [slow_unless(x in ("tnff", "tnrll", "policy_gradient"), x) for x in CASES]
)
def test_float32(name):
    assert_as_good_as_dense(name, NAME, one_of_each(batch(0, SIZE)))


@pytest.mark.parametrize("name", [slow_unless(x == "tnrr", x) for x in MAIN])
def test_bfloat16(name):
    assert_as_good_as_dense(
        name, NAME, one_of_each(batch(1, SIZE, dtype=jnp.bfloat16)), jnp.bfloat16
    )


@pytest.mark.parametrize("name", [slow_unless(x != "tnff", x) for x in ("tnff", "tnrf", "ul")])
def test_sets_of_edits(name):
    assert_as_good_as_dense(name, NAME, one_of_each(batch(2, SIZE, edits=5)))


@pytest.mark.parametrize("size", [slow_unless(False, 128), 264, slow_unless(False, 512)])
def test_rows_that_fit(size):
    assert_as_good_as_dense("tnrf", NAME, one_of_each(batch(size, size)))


@pytest.mark.parametrize("name", ["tnrf", slow_unless(False, "tnrr"), slow_unless(False, "ce")])
def test_rows_that_rise(name):
    """Sums follow a maximum that has risen far at once, and one that has not at the end."""
    rng = np.random.default_rng(6)
    kept, pushed = [400.0, 40, 6, 6], [-400.0, -40, -6, -6]  # the latter are summed backwards
    rises = np.array(kept + pushed)[:, None] * np.linspace(0, 1, SIZE)
    z, r = (np.float32(rises + rng.uniform(size=rises.shape)) for _ in range(2))
    y = np.where(np.arange(8) % 2, z.argmax(-1), z.argsort(-1)[:, -2])  # the largest, or the next
    w = np.float32([1] * 4 + [-1] * 4)
    none = np.zeros((8, 0))
    assert_as_good_as_dense(name, NAME, Batch(z, r, y, w, none.astype(int), np.float32(none)))


@pytest.mark.parametrize("name", [slow_unless(False, "tnff"), "tnrf"])
def test_no_races(name, monkeypatch):
    monkeypatch.setattr(pallas_gpu, "INTERPRET", (("detect_races", True),))
    _compiled.cache_clear()
    # Whole chunks: of other sizes the last one writes numbers of the one before it again, the same
    # ones, and the interpreter of jax 0.11 calls two copies to one place a race.
    size = 3 * 4 * 128
    assert_as_good_as_dense(name, NAME, Batch(*(x[:4] for x in batch(4, size))))
    assert not gpu_callbacks.get_races().races_found


# --- A row that a cluster of blocks shares, its segments one after the other ----------------------

SHARED_SIZE = {"float32": 1292, "bfloat16": 1288}


SHARED_BYTES = {"held": 28 << 10, "not held": 6 << 10}


def share_rows(monkeypatch, held):
    """Rows of which no block has as many entries as another, with room for all of its own or not.

    Where there is room, log s(q) is kept too.
    """
    monkeypatch.setattr(plans, "_PIECES", 2)
    monkeypatch.setattr(plans, "_SHARED_BYTES", SHARED_BYTES[held])
    for dtype, segments in (("float32", (644, 648)), ("bfloat16", (640, 648))):
        itemsizes = (jnp.dtype(dtype).itemsize,) * 2
        plan = plans.plan(SHARED_SIZE[dtype], itemsizes, tk.BlockSizes(cluster=2), logarithms=True)
        slots, keeps = (3, True) if held == "held" else (2, False)
        assert (plan.segments, plan.chunks, plan.slots, plan.keeps) == (segments, 3, slots, keeps)


@pytest.mark.parametrize(
    ("name", "cluster", "dtype", "edits", "held"),
    [("tnrf", 2, "float32", 0, "held")]
    + [slow_unless(False, name, cluster, dtype, 3 * (name in TAKES_EDITS), held)
       for name in CASES for dtype in SHARED_SIZE
       for cluster, held in ((2, "not held"), (2, "held"), (8, "held"))],
)  # fmt: skip
def test_a_row_that_a_cluster_shares(name, cluster, dtype, edits, held, monkeypatch):
    """Also where one block has masked entries alone, and the other all that counts."""
    share_rows(monkeypatch, held)
    _compiled.cache_clear()
    size = SHARED_SIZE[dtype]
    z, r, y, w, *rest = one_of_each(batch(5, size, edits=edits, dtype=jnp.dtype(dtype)))
    z[::4, : size // 2], z[2::4, size // 2 + 4 :] = -np.inf, -np.inf
    r[np.isinf(z)] = -np.inf
    rows = Batch(z, r, np.where(np.isinf(z).any(-1), z.argmax(-1), y), w, *rest)
    if not edits:
        rows = Batch(*(x[:9] for x in rows))
    assert_as_good_as_dense(name, tk.BlockSizes(cluster), rows, jnp.dtype(dtype))


@pytest.mark.slow
def test_a_row_that_a_cluster_shares_and_skips():
    z, r, y, w = operands(size=264)

    def gradient(implementation):
        def total(z):
            out = tk.targeted_negative_loss(
                z, r, y, w, objective="tnrf", skip_ignored=True, implementation=implementation
            )
            return out.loss.sum()

        return jax.value_and_grad(total)(z)

    want, got = gradient("xla"), gradient(tk.BlockSizes(cluster=2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
    assert not np.asarray(got[1])[np.asarray(w) == 0].any()


def operands(lead=(2, 3), size=136):
    rng = np.random.default_rng(0)
    z, r = (jnp.asarray(rng.normal(size=(*lead, size)), jnp.float32) for _ in range(2))
    y = jnp.asarray(rng.integers(size, size=lead))
    w = jnp.asarray(rng.choice([1.0, -1.0, 0.0], size=lead), jnp.float32)
    return z, r, y, w


def total(implementation):
    def loss(z, r, y, w):
        out = tk.targeted_negative_loss(
            z, r, y, w, objective="tnrf", alpha=3.0, implementation=implementation
        )
        return (out.loss * jnp.arange(1.0, 1 + out.loss.size).reshape(out.loss.shape)).sum()

    return loss


def test_vmap():
    args = operands()
    want, got = (jax.vmap(jax.value_and_grad(total(name)))(*args) for name in ("xla", NAME))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_linear(softcap):
    rng = np.random.default_rng(1)
    h, k = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 8), (8, 136)))
    _, _, y, w = operands(lead=(6,))

    def loss(implementation, h, k):
        """Of unequal cotangents: the gradient to `k` is made again, from the statistics."""
        out = tk.linear_targeted_negative_loss(
            h, k, h + 0.1, k, y, w, objective="tnrf", alpha=3.0, softcap=softcap,
            implementation=implementation,
        )  # fmt: skip
        return (out.loss * jnp.arange(1.0, 7.0)).sum()

    want, got = (jax.grad(loss, (1, 2))(i, h, k) for i in ("xla", NAME))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.parametrize(
    ("implementation", "size"),
    [("xla", 136), (NAME, 136), (NAME, 132), (tk.BlockSizes(cluster=2), 264),
     slow_unless(False, tk.BlockSizes(cluster=2), 260)],
)  # fmt: skip
def test_a_gradient_in_another_dtype(implementation, size):
    """Also where a row of it is no multiple of 16 bytes: it is converted behind the kernel."""
    z, r, y, w = operands(lead=(6,), size=size)
    rows, tokens = Operands((z,), (r,)), Tokens(y, w, jnp.zeros(6, bool))
    run = dispatch.driver(implementation, linear=False)
    op = Operation(Settings("tnff", z.shape[-1], alpha=3.0))
    halved = dataclasses.replace(op, gradient_dtype="bfloat16")
    ((want,), (got,)) = (run(x, Stage.VALUE_AND_GRAD, rows, tokens).gradient for x in (op, halved))
    assert (want.dtype, got.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


def test_no_rows():
    z, r, y, w = (x[:0] for x in operands(lead=(3,)))
    assert tk.targeted_negative_loss(z, r, y, w, implementation=NAME).loss.shape == (0,)


@pytest.mark.parametrize(
    ("size", "implementation", "message"),
    [(50257, NAME, "pad the vocabulary to a multiple of 4"),
     (50257, tk.BlockSizes(cluster=8), "pad the vocabulary to a multiple of 4"),
     (64, NAME, "rows of 128 to 262144"),
     (1 << 19, NAME, r"rows of 128 to 262144 .*BlockSizes\(\)"),
     (264, tk.BlockSizes(cluster=4), "BlockSizes.cluster=4.*rows of 512 to 524288 .*not 264"),
     ((1 << 19) + 8, tk.BlockSizes(), "rows of 128 to 524288")],
)  # fmt: skip
def test_why_not(size, implementation, message):
    z, r, y, w = operands(lead=(1,), size=size)
    with pytest.raises(NotImplementedError, match=message):
        tk.targeted_negative_loss(z, r, y, w, implementation=implementation)


@pytest.mark.parametrize("cluster", [0, 3, 32, "8"])
def test_no_such_cluster(cluster):
    with pytest.raises(ValueError, match=r"one of 1, 2, 4, 8, 16, or None .*got"):
        tk.BlockSizes(cluster)
