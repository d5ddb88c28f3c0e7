"""Bounded logits, ``c tanh(z / c)``: every linear loss against the formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_made_up_objectives import BOTH_READ_THE_REFERENCE, COTANGENTS, WEIGHTS, registered, rows
from test_made_up_objectives import dense as dense_made_up
from test_transforms import CT, KEYS, LINEAR, LOSSES, B, D, H, K, L, V, W, Y, weighed

import t5patches_kernels as tk
from t5patches_kernels import calls
from t5patches_kernels.backends import chunked_linear
from t5patches_kernels.core.objectives import Settings

CAP = 1.5
SCALE = 0.7  # logits of up to four times the cap, and many well below it
HEAD = {"logit_scale": SCALE, "softcap": CAP}
# Another model, of another width.
RH = jax.random.normal(KEYS[7], (B, L, D + 3))
RK = jax.random.normal(KEYS[6], (D + 3, V))

# `LINEAR` smooths no labels.
OF_LOGITS = {**LOSSES, "ce": lambda z, r, y, w, **o: tk.cross_entropy_loss(z, y, w, **o)}


def in_float64(*arrays):
    return [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]


@functools.cache
def by_formula(name):
    """Outputs and gradients of a loss on logits that are bounded here."""
    with jax.enable_x64(True):
        h, k, rh, rk, w, ct = in_float64(H, K, RH, RK, W, CT)

        def total(h, k):
            z, r = (CAP * jnp.tanh(SCALE * (a @ b) / CAP) for a, b in ((h, k), (rh, rk)))
            out = OF_LOGITS[name](z, r, Y, w, implementation="reference")
            return weighed(out, ct), out

        f = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
        (_, out), gradients = f(h, k)
        return jax.tree.map(np.asarray, (out, gradients))


def fused(name, implementation, dtype=np.float32):
    with jax.enable_x64(dtype == np.float64):
        h, k, rh, rk, w, ct = (jnp.asarray(x, dtype) for x in (H, K, RH, RK, W, CT))

        def total(h, k):
            out = LINEAR[name](h, k, rh, rk, Y, w, implementation=implementation, **HEAD)
            return weighed(out, ct), out

        f = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
        (_, out), gradients = f(h, k)
        return jax.tree.map(np.asarray, (out, gradients))


def assert_close(got, want, rtol):
    def check(a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())

    jax.tree.map(check, got, want)


# The other objectives under a softcap: `test_transforms`, against the reference.
@pytest.mark.parametrize("name", ["tnff", "tnrf", "ul", "ce"])
def test_value_and_gradient_are_those_of_the_formula(name):
    want = by_formula(name)
    assert_close(fused(name, "reference", np.float64), want, rtol=1e-12)
    assert_close(fused(name, "xla"), want, rtol=2e-5)


def test_statistics():
    with jax.enable_x64(True):
        h, k, rh, rk = in_float64(H, K, RH, RK)
        z, r = (CAP * jnp.tanh(SCALE * (a @ b) / CAP) for a, b in ((h, k), (rh, rk)))
        want = tk.token_statistics(z, Y, r, implementation="reference")
    for implementation in ("xla", "reference"):
        got = tk.linear_token_statistics(H, K, Y, RH, RK, implementation=implementation, **HEAD)
        assert_close(got._replace(correct=0), want._replace(correct=0), rtol=1e-5)
        np.testing.assert_array_equal(got.correct, want.correct)


@pytest.mark.parametrize("dropped", ["capped", "_uncapped"])
def test_control_a_softcap_dropped_from_value_or_gradient_is_seen(dropped, monkeypatch):
    monkeypatch.setattr(chunked_linear, dropped, lambda x, *_: x)
    chunked_linear.run.clear_cache()
    try:
        with pytest.raises(AssertionError, match="Not equal"):
            assert_close(fused("tnff", "xla"), by_formula("tnff"), rtol=2e-5)
    finally:
        chunked_linear.run.clear_cache()


def test_a_made_up_objective():
    """Hidden states that are z, and a head that is the identity."""
    m, size = BOTH_READ_THE_REFERENCE, 130
    z, r, y, ids, factors = rows(m, size)
    z, r = (jnp.where(jnp.isinf(x), 0.0, x) for x in (z, r))  # 0 * inf is no logit
    bounded_z, bounded_r = (CAP * np.tanh(np.asarray(x, np.float64) / CAP) for x in (z, r))
    eye = jnp.eye(size)
    with registered(m.kept, m.pushed) as name:
        c = Settings(name, size, alpha=3.0, smoothing=m.smoothing, label_smoothing=0.1)
        # Its reference is normalised.
        bounded_r -= np.log(np.exp(bounded_r).sum(-1, keepdims=True))
        want, by_logit = dense_made_up(m, c, "given", bounded_z, bounded_r, y, ids, factors)

        def total(z):
            inputs = calls.linear_inputs(z, eye, (r, eye), 1.0, CAP, False, None, None)
            losses = calls.call(c, inputs, calls.How(), y, WEIGHTS)[0]["loss"]
            return (losses * COTANGENTS).sum(), losses

        (_, got), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(z)
    counts = WEIGHTS != 0  # the ignored row is not a number
    by_z = by_logit[counts] * (1 - (bounded_z[counts] / CAP) ** 2)
    assert_close(got[counts], want[counts], rtol=2e-5)
    assert_close(gradient[counts], by_z, rtol=2e-5)
    np.testing.assert_array_equal(got[~counts], 0.0)
    np.testing.assert_array_equal(gradient[~counts], 0.0)


@pytest.mark.parametrize("far", [3.0, 9.0, 20.0])
def test_the_gradient_keeps_its_digits_where_the_logits_are_bounded(far):
    """``1 - tanh(9)^2`` is 6.1e-8: less than a step of float32 near 1."""
    h, k, y = jnp.array([[far]]), jnp.array([[1.0, 0.25, -0.5]]), jnp.array([1])

    def total(k):
        return tk.linear_cross_entropy_loss(h, k, y, softcap=1.0).loss.sum()

    got = np.asarray(jax.grad(total)(k), np.float64)[0]
    z = far * np.asarray(k, np.float64)[0]
    p = np.exp(np.tanh(z))
    want = far * (p / p.sum() - [0, 1, 0]) / np.cosh(z) ** 2
    np.testing.assert_allclose(got, want, rtol=5e-6)


def test_a_masked_column_is_bounded_too():
    """Documented: what overflows to -inf counts as -c, and a logit of infinity is no fault."""
    h = jnp.array([[1.0, 1.0]])
    k = jnp.array([[0.5, -3e38, 3e38, 1.0], [0.0, -3e38, 3e38, 0.0]])
    z = CAP * jnp.tanh(jnp.array([[0.5, -jnp.inf, jnp.inf, 1.0]]) / CAP)
    y = jnp.array([0])
    for implementation in ("xla", "reference"):
        f = jax.value_and_grad(
            lambda k, i=implementation: tk.linear_cross_entropy_loss(
                h, k, y, softcap=CAP, implementation=i
            ).loss.sum()
        )
        value, gradient = f(k)
        np.testing.assert_allclose(value, tk.cross_entropy_loss(z, y).loss[0], rtol=1e-6)
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[:, 1:3], 0.0)
