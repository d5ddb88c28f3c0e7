"""DPO, IPO, NPO and a reward model's loss: the papers' formulas, and numbers by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import t5patches_kernels as tk
from t5patches_kernels import preferences

RNG = np.random.default_rng(0)
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = -20 + 5 * RNG.standard_normal((4, 3, 7))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_formula(objective, beta, chosen, rejected, ref_chosen, ref_rejected):
    ratio_chosen, ratio_rejected = np.exp(chosen - ref_chosen), np.exp(rejected - ref_rejected)
    if objective == "dpo":  # Rafailov et al. (2023), eq. 7
        return -np.log(sigmoid(beta * np.log(ratio_chosen) - beta * np.log(ratio_rejected)))
    if objective == "ipo":  # Azar et al. (2023), eq. 17: h is the logarithm of a quotient
        h = np.log(ratio_chosen / ratio_rejected)
        return (h - 1 / beta / 2) ** 2
    return 2 / beta * np.log(1 + ratio_rejected**beta)  # Zhang et al. (2024), eq. 3


def given(objective, dtype=np.float64):
    arrays = [x.astype(dtype) for x in (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)]
    if objective == "npo":
        arrays[0] = arrays[2] = None
    return arrays


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("objective", preferences.OBJECTIVES)
def test_it_is_that_of_the_paper(objective, beta):
    want = by_formula(objective, beta, CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)
    with jax.enable_x64(True):
        got = tk.preference_loss(*given(objective), objective=objective, beta=beta)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, want, rtol=1e-12)
    got = tk.preference_loss(*given(objective, np.float32), objective=objective, beta=beta)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-4)
    other = by_formula(objective, 1.01 * beta, CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)
    assert (np.abs(other - want) > 2e-4 * want).mean() > 0.5  # what would be seen


@pytest.mark.parametrize("objective", preferences.OBJECTIVES)
def test_gradients_are_those_of_the_docstring(objective):
    """And nothing flows to the reference."""
    beta = 0.3

    def total(*arrays):
        return tk.preference_loss(*arrays, objective=objective, beta=beta).sum()

    h_rejected = REJECTED - REF_REJECTED
    h = CHOSEN - REF_CHOSEN - h_rejected
    by_chosen = {"dpo": -beta * sigmoid(-beta * h), "ipo": 2 * (h - 1 / (2 * beta))}.get(objective)
    by_rejected = 2 * sigmoid(beta * h_rejected) if by_chosen is None else -by_chosen
    with jax.enable_x64(True):
        arrays = given(objective)
        there = [i for i, x in enumerate(arrays) if x is not None]
        found = dict(zip(there, jax.grad(total, there)(*arrays), strict=True))
        if by_chosen is not None:
            np.testing.assert_allclose(found[0], by_chosen, rtol=1e-9)
        np.testing.assert_allclose(found[1], by_rejected, rtol=1e-9)
        for i in set(there) - {0, 1}:
            np.testing.assert_array_equal(found[i], 0.0)


def test_by_hand():
    one = jnp.ones(())
    dpo = tk.preference_loss(-2 * one, -4 * one, -3 * one, -3 * one, beta=0.5)
    np.testing.assert_allclose(dpo, math.log(1 + math.exp(-1)), rtol=1e-6)  # margin 2, times 0.5
    ipo = tk.preference_loss(-2 * one, -4 * one, -3 * one, -3 * one, beta=0.5, objective="ipo")
    np.testing.assert_allclose(ipo, 1.0)  # (2 - 1)^2
    npo = tk.preference_loss(None, -4 * one, None, -4 * one, beta=0.5, objective="npo")
    np.testing.assert_allclose(npo, 4 * math.log(2), rtol=1e-6)  # a policy that has not moved
    np.testing.assert_allclose(tk.pairwise_reward_loss(3 * one, 3 * one), math.log(2), rtol=1e-6)
    np.testing.assert_allclose(
        tk.pairwise_reward_loss(2 * one, 3 * one), math.log(1 + math.e), rtol=1e-6
    )


@pytest.mark.parametrize("gap", [-1e4, 1e4])
def test_answers_that_are_far_apart(gap):
    """No overflow: the loss goes on linearly, its gradient is that of a sure mistake, or 0."""
    at = jnp.float32(gap)
    f = jax.value_and_grad(lambda x: tk.preference_loss(x, 0 * x, 0 * x, 0 * x, beta=1.0))
    for value, gradient in (f(at), jax.value_and_grad(tk.pairwise_reward_loss)(at, 0 * at)):
        assert value == max(-gap, 0)
        assert gradient == -(gap < 0)


def test_sums_of_a_models_log_probabilities():
    """From hidden states to DPO's gradient, as the module says, without logits."""
    rng = np.random.default_rng(1)
    h, rh = (jnp.asarray(rng.standard_normal((2, 2, 5, 8)), jnp.float32) for _ in range(2))
    k = jnp.asarray(rng.standard_normal((8, 48)), jnp.float32)
    y, is_answer = rng.integers(48, size=(2, 2, 5)), np.arange(5) >= 2

    def total(k, fused):
        def sums(h):
            if fused:
                log_prob = tk.linear_token_statistics(h, k, y).log_prob
            else:
                log_p = jax.nn.log_softmax(h @ k)
                log_prob = jnp.take_along_axis(log_p, jnp.asarray(y)[..., None], -1)[..., 0]
            return jnp.where(is_answer, log_prob, 0.0).sum(-1)

        (chosen, rejected), (ref_chosen, ref_rejected) = sums(h), sums(rh)
        return tk.preference_loss(chosen, rejected, ref_chosen, ref_rejected).sum()

    got, want = (
        jax.jit(jax.value_and_grad(total), static_argnums=1)(k, fused) for fused in (True, False)
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
