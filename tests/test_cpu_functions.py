"""The exponential and the logarithm of XLA's form on CPUs, beside float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5patches_kernels.backends.xla import cpu_math

# Where each is used: a weight relative to its maximum; a probability and its smoothing.
ARGUMENTS = {
    "exp": np.concatenate([np.linspace(-87, 0, 1_000_001), -np.logspace(-38, 0, 10_001)]),
    "log": np.concatenate(
        [np.linspace(0.5, 2, 1_000_001), np.exp(np.linspace(-87, 87, 1_000_001))]
    ),
}


LIMIT = 1.25  # XLA's own: 0.99 and 1.18


def units_in_last_place(name: str) -> float:
    """The largest error."""
    x = np.asarray(ARGUMENTS[name], np.float32)
    exact = getattr(np, name)(x.astype(np.float64))
    function = getattr(cpu_math, name)
    got = np.asarray(jax.jit(lambda x: function(x))(x), np.float64)  # a lambda: compiled anew
    unit = np.spacing(np.maximum(np.abs(exact), np.finfo(np.float32).tiny).astype(np.float32))
    return np.max(np.abs(got - exact) / unit)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_error(name):
    assert units_in_last_place(name) < LIMIT


def test_a_short_polynomial_is_told(monkeypatch):
    monkeypatch.setattr(cpu_math, "_LOG", cpu_math._LOG[1:])
    assert units_in_last_place("log") > LIMIT


def test_exact_values():
    x = jnp.asarray([0.0, -0.0, -87.5, -1e30, -jnp.inf, jnp.nan], jnp.float32)
    np.testing.assert_array_equal(cpu_math.exp(x), [1, 1, 0, 0, 0, np.nan])
    np.testing.assert_array_equal(
        cpu_math.log(jnp.asarray([1.0, jnp.nan], jnp.float32)), [0, np.nan]
    )
