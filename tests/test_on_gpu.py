"""What only a card can prove; run with ``JAX_PLATFORMS=cuda,cpu pytest tests/test_on_gpu.py``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import CASES, TAKES_EDITS, assert_as_good_as_dense, batch

import t5patches_kernels as tk

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs a GPU and JAX_PLATFORMS=cuda,cpu"
)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
IMPLEMENTATIONS = ("xla", "pallas_gpu", tk.BlockSizes(cluster=2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [264, 32128])
@pytest.mark.parametrize("name", CASES)
def test_as_good_as_dense(name, size, dtype, implementation):
    dtype = DTYPES[dtype]
    assert_as_good_as_dense(name, implementation, batch(size, size, dtype=dtype), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", TAKES_EDITS)
def test_sets_of_edits(name, implementation):
    assert_as_good_as_dense(name, implementation, batch(7, 2048, edits=5))


@pytest.mark.parametrize("size", [7, 50257])
@pytest.mark.parametrize("name", ["tnff", "tnrr", "tnrf-divergence"])
def test_any_vocabulary(name, size):
    assert_as_good_as_dense(name, "xla", batch(size, size))


@pytest.mark.parametrize(("size", "kernel"), [(264, True), (257, False)])
def test_the_program_of_a_gpu_is_the_one_for_gpus(size, kernel):
    z = jnp.asarray(np.random.default_rng(0).normal(size=(8, size)), jnp.float32)
    y, w = jnp.zeros(8, int), jnp.ones(8)
    loss = jax.jit(lambda z: tk.targeted_negative_loss(z, z, y, w).loss)
    text = loss.lower(z).as_text()
    assert "stablehlo.while" not in text
    assert ("mosaic_gpu" in text) == kernel


@pytest.mark.parametrize("implementation", ["pallas_gpu", tk.BlockSizes()])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["tnff", "tnrf"])
def test_the_same_bits_every_time(name, dtype, implementation):
    """What threads share is in order: no barrier of the kernel is automatic."""
    size = 32064  # its last chunk overlaps
    keys = jax.random.split(jax.random.key(0), 2)
    z, r = (3 * jax.random.normal(k, (2048, size), DTYPES[dtype]) for k in keys)
    y, w = jnp.arange(2048) * 13 % size, jnp.where(jnp.arange(2048) % 4 == 0, -1.0, 1.0)

    def total(z):
        out = tk.targeted_negative_loss(z, r, y, w, objective=name, implementation=implementation)
        return out.loss.sum()

    visit = jax.jit(jax.value_and_grad(total))
    value, gradient = visit(z)
    for _ in range(30):
        again = visit(z)
        assert (again[0] == value) & (again[1] == gradient).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("same", [True, False])
def test_a_head(implementation, same):
    """Both ways to a head's kernel gradient: scaled, and made again."""
    rng = np.random.default_rng(1)
    h, k = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((300, 64), (64, 2048)))
    y = jnp.asarray(rng.integers(2048, size=300))
    w = jnp.asarray(rng.choice([1.0, -1.0, 0.0], size=300), jnp.float32)
    ct = jnp.ones(300) if same else jnp.arange(300.0)

    def loss(implementation, h, k):
        out = tk.linear_targeted_negative_loss(
            h, k, h, k, y, w, objective="tnrf", alpha=3.0, implementation=implementation
        )
        return (out.loss * ct).sum()

    want, got = (jax.grad(loss, (1, 2))(i, h, k) for i in ("reference", implementation))
    for a, b in zip(got, want, strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert np.linalg.norm(a - b) <= 1e-2 * np.linalg.norm(b)
