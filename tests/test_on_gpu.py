"""What only a card can prove; run with ``JAX_PLATFORMS=cuda,cpu pytest tests/test_on_gpu.py``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import CASES, TAKES_EDITS, assert_as_good_as_dense, batch

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs a GPU and JAX_PLATFORMS=cuda,cpu"
)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
IMPLEMENTATIONS = ("xla", "pallas_gpu")


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


def test_the_program_of_a_gpu_is_the_one_for_gpus():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(8, 256)), jnp.float32)
    import t5patches_kernels as tk

    lowered = jax.jit(lambda z: tk.token_statistics(z, jnp.zeros(8, int)).entropy).lower(z)
    assert "stablehlo.while" not in lowered.as_text()
