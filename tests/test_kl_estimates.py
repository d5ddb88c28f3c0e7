"""What `python -m bench.kl_estimates` compares: what each estimate's gradient is on average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import kl_estimates
from t5patches.editing import policy

V, D = 5, 3


@pytest.mark.parametrize("kind", kl_estimates.KINDS)
def test_the_mean_gradient_over_all_tokens(kind):
    """Every token stands once, with its probability as its weight."""
    rng = np.random.default_rng(0)
    h, kernel, r, ref_kernel = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((1, D), (D, V), (1, D), (D, V))
    )
    log_q = jax.nn.log_softmax((r @ ref_kernel)[0])
    p = jax.nn.softmax((h @ kernel)[0])

    def loss(h):
        rows = (jnp.tile(h, (V, 1)), kernel, jnp.tile(r, (V, 1)), ref_kernel)
        found = policy.linear_policy_gradient_loss(
            *rows, jnp.arange(V), p, jnp.zeros(V), jnp.log(p), kl_coefficient=0.5,
            implementation="reference",
        )  # fmt: skip
        return found.loss.sum()

    def wanted(h):
        log_p = jax.nn.log_softmax((h @ kernel)[0])
        forward = (jnp.exp(log_q) * (log_q - log_p)).sum()
        reverse = (jnp.exp(log_p) * (log_p - log_q)).sum()
        return 0.5 * {"k1": 0 * reverse, "k3": forward}.get(kind, reverse)

    with kl_estimates.measured_by(kind):
        got = jax.grad(loss)(h)
    np.testing.assert_allclose(got, jax.grad(wanted)(h), atol=1e-6)


def test_variance_and_share_are_in_units_of_the_exact_mean():
    exact = np.array([[2.0, 0.0], [2.0, 2.0], [2.0, -2.0]])
    found = np.array([[1.0, 4.0], [1.0, -4.0], [1.0, 0.0]])
    assert kl_estimates.of_gradients(exact, exact) == {"variance": 1.0, "share": 1.0}
    assert kl_estimates.of_gradients(found, exact) == {"variance": 4.0, "share": 0.5}
