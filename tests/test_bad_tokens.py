"""Ids out of range, ignored tokens, and rows with nothing left: NaN, 0 and the documented rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import CASES, MAIN

import t5patches_kernels as tk

IMPLEMENTATIONS = ("xla", "reference")
Z = jax.random.normal(jax.random.key(0), (6, 40))
R = jax.random.normal(jax.random.key(1), (6, 40))
W = jnp.array([1.0, -1.0, 0.0, 1.0, -1.0, 0.0])


def outcome(name, implementation, y, z=Z, r=R, w=W, edits=None):
    def total(z):
        out = CASES[name](z, r, y, w, edits, implementation)
        return out.loss.sum(), out

    (_, out), gradient = jax.value_and_grad(total, has_aux=True)(z)
    return out, np.asarray(gradient)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("bad", [-1, -100, 40, 10**6])
def test_a_bad_target_is_nan_where_it_counts(name, implementation, bad):
    y = jnp.array([3, 3, bad, bad, bad, 3])
    out, gradient = outcome(name, implementation, y)
    bad_rows = [False, False, False, True, True, False]
    np.testing.assert_array_equal(np.isnan(out.loss), bad_rows)
    np.testing.assert_array_equal(np.isnan(out.log_prob), bad_rows)
    np.testing.assert_array_equal(np.isnan(gradient).all(-1), bad_rows)
    np.testing.assert_array_equal(np.asarray(out.loss)[[2, 5]], 0.0)
    assert out.log_prob[2] == 0.0
    assert not np.asarray(out.correct)[[2, 3, 4]].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["tnff", "ul"])
@pytest.mark.parametrize(("bad_id", "bad_factor"), [(40, 0.0), (-2, 0.0), (3, -1.0), (3, np.nan)])
def test_a_bad_edit_is_nan_where_it_counts(name, implementation, bad_id, bad_factor):
    ids = jnp.full((6, 2), -1).at[2:4, 1].set(bad_id)
    factors = jnp.zeros((6, 2)).at[2:4, 1].set(bad_factor)
    y = jnp.zeros(6, jnp.int32)
    # Traced, so that the values are not known when the call is checked.
    total = jax.jit(lambda f: CASES[name](Z, R, y, W, tk.Edits(ids, f), implementation).loss)
    np.testing.assert_array_equal(
        np.isnan(total(factors)), [False, False, False, True, False, False]
    )


@pytest.mark.parametrize("implementation", ["xla"])
@pytest.mark.parametrize("name", MAIN)
def test_an_ignored_token_may_hold_nan(name, implementation):
    z, r = Z.at[2].set(jnp.nan), R.at[2].set(jnp.nan)
    out, gradient = outcome(name, implementation, jnp.zeros(6, jnp.int32), z, r)
    np.testing.assert_array_equal(np.asarray(out.loss)[2], 0.0)
    np.testing.assert_array_equal(gradient[[2, 5]], 0.0)
    assert np.isfinite(out.loss).all()
    assert np.isfinite(gradient).all()
    assert out.log_prob[2] == 0.0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", [*tk.TARGETED_NEGATIVE, "ul"])
def test_with_all_mass_removed_there_is_nothing_to_move_to(name, implementation):
    """One column, or a reference that is certain of the removed id: 0, with gradient 0."""
    w = jnp.array([-1.0, -1.0, -1.0, -1.0, -1.0, -1.0])
    y = jnp.zeros(6, jnp.int32)
    certain = R.at[:, 1:].set(-jnp.inf)
    z = certain if name == "ul" else Z  # for ul the model itself is the reference
    for logits, ref in ((Z[:, :1], R[:, :1]), (z, certain)):
        out, gradient = outcome(name, implementation, y, logits, ref, w)
        np.testing.assert_array_equal(out.loss, 0.0)
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MAIN)
def test_a_row_with_every_entry_masked_is_nan(name, implementation):
    z = Z.at[0].set(-jnp.inf)
    out, _ = outcome(name, implementation, jnp.zeros(6, jnp.int32), z)
    assert np.isnan(out.loss[0])
    assert np.isfinite(np.asarray(out.loss)[1:]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mass_where_the_model_is_masked_is_never_plausible(implementation):
    z = Z.at[0, 7].set(-jnp.inf)
    out, gradient = outcome("tnff", implementation, jnp.zeros(6, jnp.int32), z)
    assert out.loss[0] > 1e20
    assert np.isfinite(gradient).all()


def test_no_tokens():
    out = tk.targeted_negative_loss(Z[:0], R[:0], jnp.zeros(0, jnp.int32), W[:0])
    assert out.loss.shape == (0,)


def test_an_id_listed_twice_has_both_factors():
    def loss(ids, factors):
        edits = tk.Edits(jnp.tile(jnp.array(ids), (6, 1)), jnp.tile(jnp.array(factors), (6, 1)))
        return [
            CASES["tnff"](Z, R, jnp.zeros(6, jnp.int32), W, edits, i).loss for i in IMPLEMENTATIONS
        ]

    for twice, once in zip(loss([4, 4], [0.5, 3.0]), loss([4], [1.5]), strict=True):
        np.testing.assert_allclose(twice, once, rtol=1e-5)
