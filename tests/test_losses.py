"""Every objective x dtype x vocabulary x row kind against the oracle in float64."""

import jax.numpy as jnp
import pytest
from harness import (
    CASES,
    MAIN,
    TAKES_EDITS,
    VOCABULARIES,
    assert_as_good_as_dense,
    batch,
    slow_unless,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from t5patches_kernels.backends.xla import driver
from t5patches_kernels.core import statistics

SEEDS = st.integers(0, 2**32 - 1)
# On every run sizes take turns over the objectives, a sixth of each, and half of the variants.
SWEEP = [
    slow_unless((i + j) % (6 if name in MAIN else 2) == 0, name, size)
    for i, name in enumerate(CASES)
    for j, size in enumerate(VOCABULARIES if name in MAIN else (257,))
]


@pytest.mark.parametrize(("name", "size"), SWEEP)
@settings(max_examples=5)
@given(seed=SEEDS)
def test_float32(name, size, seed):
    assert_as_good_as_dense(name, "xla", batch(seed, size))


@pytest.mark.parametrize(
    ("name", "size"),
    [slow_unless((i + j) % 2 == 0 and name in MAIN, name, size)
     for i, name in enumerate(CASES) for j, size in enumerate((7, 257))
     if name in MAIN or size == 257],
)  # fmt: skip
@settings(max_examples=5)
@given(seed=SEEDS)
def test_bfloat16(name, size, seed):
    b = batch(seed, size, dtype=jnp.bfloat16)
    assert_as_good_as_dense(name, "xla", b, jnp.bfloat16)


@pytest.mark.parametrize("name", [slow_unless(i % 4 == 2, x) for i, x in enumerate(TAKES_EDITS)])
@settings(max_examples=5)
@given(seed=SEEDS)
def test_sets_of_edits(name, seed):
    assert_as_good_as_dense(name, "xla", batch(seed, 257, edits=5))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@settings(max_examples=3)
@given(seed=SEEDS)
def test_a_whole_vocabulary(name, seed):
    assert_as_good_as_dense(name, "xla", batch(seed, 50257, edits=0))


# Each control has a vocabulary of its own: its programs are traced with what is patched, and no
# other test meets them.


@pytest.mark.parametrize("name", [slow_unless(x == "tnrr", x) for x in ("tnff", "tnrr", "ce")])
def test_control_a_phantom_column_is_seen(name, monkeypatch):
    """The control: a driver that counts one column of logit 0 too many must fail."""
    honest = statistics.first_pass

    def padded(z, r, *rest):
        pad = ((0, 0), (0, 1))
        return honest(jnp.pad(z, pad), None if r is None else jnp.pad(r, pad), *rest)

    monkeypatch.setattr(statistics, "first_pass", padded)
    with pytest.raises(AssertionError, match="constant"):
        assert_as_good_as_dense(name, "xla", batch(0, 258))


def test_control_a_target_left_in_the_sum_is_seen(monkeypatch):
    """The control: removing the target by subtraction loses every digit where it leads."""
    honest = driver._edited

    def subtracted(reference, tokens):
        peak = reference.max(-1, keepdims=True)
        q = jnp.exp(reference - peak)
        rest = q * jnp.exp(honest(jnp.zeros_like(q), tokens))
        return jnp.log(rest / q.sum(-1, keepdims=True) + 1e-12)

    monkeypatch.setattr(driver, "_edited", subtracted)
    with pytest.raises(AssertionError, match="lead"):
        assert_as_good_as_dense("tnff", "xla", batch(0, 259))
