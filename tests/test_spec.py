"""The specification by itself: merging, tiles, derivatives, and that nothing is written twice."""

import dataclasses
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import CASES, batch
from hypothesis import given, settings
from hypothesis import strategies as st

import t5patches_kernels
from t5patches_kernels import dense, losses
from t5patches_kernels.core import objectives, statistics
from t5patches_kernels.core.objectives import Settings
from t5patches_kernels.core.operation import Tokens
from t5patches_kernels.core.statistics import Functions, Tile

# All but those that need the other row's normaliser first.
ALL = frozenset(statistics.SUMS) - {"zs", "ss", "sz", "sr"}
BITS = Functions(jnp.exp2, jnp.log2, 1 / math.log(2))
SETTINGS = {
    name: Settings(name, 130, alpha=3.0, smoothing=1e-3, z_loss=1e-2, threshold=-9.0)
    for name in objectives.OBJECTIVES
} | {
    "tnrll-divergence": Settings("tnrll", 130, smoothing=1e-3, divergence=True),
    "tnrf-divergence": Settings("tnrf", 130, smoothing=1e-3, divergence=True),
    "ce-smoothed": Settings("ce", 130, label_smoothing=0.1),
    "kl_reverse-unsmoothed": Settings("kl_reverse", 130),
    "statistics": Settings("statistics", 130),
    "pair_statistics": Settings("pair_statistics", 130),
    "policy_gradient": Settings(
        "policy_gradient", 130, clip=(0.2, 0.3), kl="k3", kl_coefficient=0.1,
        entropy_coefficient=0.5,
    ),
    "policy_gradient-exact": Settings("policy_gradient", 130, kl="exact", kl_coefficient=0.1),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def rows(seed, size=130):
    b = batch(seed, size)
    return tuple(jnp.asarray(x, jnp.float64) for x in (b.logits, b.ref_logits))


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-10, atol=1e-10, err_msg=name)


def tiled(z, r, cuts):
    tiles = zip(jnp.split(z, cuts, axis=-1), jnp.split(r, cuts, axis=-1), strict=True)
    return [statistics.first_pass(z, r, ALL) for z, r in tiles]


@settings(max_examples=5)
@given(seed=st.integers(0, 2**31), tile=st.sampled_from([1, 7, 64, 128]))
def test_tiles_of_any_size_merge_to_the_whole_row(seed, tile):
    z, r = rows(seed, size=3 * tile + 2)
    first, *rest = tiled(z, r, [tile, 2 * tile, 3 * tile])
    for tile in rest:
        first = statistics.merge(first, tile)
    assert_same(first, statistics.first_pass(z, r, ALL))


def test_merging_is_associative_and_commutative():
    a, b, c = tiled(*rows(0), [40, 90])
    merge = statistics.merge
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)))
    assert_same(merge(a, b), merge(b, a))


def numbers_of(c, z, r, y, w):
    names = objectives.needs(c)
    of = objectives.reference_of(c)
    ref = None if of is None else jnp.where(z < z[:, :1], z, -jnp.inf) if of == "self" else r
    stats = statistics.first_pass(z, ref, names)
    stats["zy"], stats["ry"] = (jnp.take_along_axis(x, y[:, None], -1) for x in (z, r))
    own = jnp.where(w < 0, -1.0, 1.0), jnp.linspace(-4.0, -6.0, len(w))
    numbers = dict(zip(("advantages", "old_log_probs"), own, strict=True))
    if c.objective == "policy_gradient":  # another's negative weight is no answer there
        w = jnp.abs(w)
    tokens = Tokens(y, w, jnp.zeros_like(w, jnp.bool_), numbers=numbers)
    stats = objectives.finish(stats, tokens.of_rows())
    if objectives.needs_second_pass(c):
        tile = Tile(z, ref, stats, c.smoothing)
        stats = stats | statistics.second_pass(tile, names)
    return stats, ref


@pytest.mark.parametrize("name", SETTINGS)
def test_derivative_table_is_the_derivative(name):
    """For every output of every objective: table times per-row factors against autodiff."""
    c = SETTINGS[name]
    rng = np.random.default_rng(1)
    z, r = (jnp.asarray(rng.normal(size=(12, 130))) for _ in range(2))
    y, w = jnp.arange(12) * 7, jnp.tile(jnp.array([1.0, -1.0, -0.5]), 4)
    for output in objectives.lines_of(c):

        def total(z, output=output):
            return jnp.sum(objectives.evaluate(numbers_of(c, z, r, y, w)[0], c, output))

        stats, ref = numbers_of(c, z, r, y, w)
        d_stats = objectives.derivatives(stats, c, {output: jnp.ones_like(stats["m"])})
        is_target = jnp.arange(130)[None, :] == y[:, None]
        if not d_stats:  # an output without a gradient: the reference's own
            np.testing.assert_array_equal(jax.grad(total)(z), 0.0)
            continue
        tile = Tile(z, ref, stats, c.smoothing)
        dz = statistics.gradient(tile, statistics.coefficients(stats, d_stats), is_target)
        np.testing.assert_allclose(dz, jax.grad(total)(z), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in SETTINGS if "divergence" not in name])
def test_values_in_bits_give_the_same_numbers_and_gradients(name):
    c = SETTINGS[name]
    z, r = rows(3)
    y, w = jnp.arange(len(z)) % 130, jnp.where(jnp.arange(len(z)) % 2, 1.0, -1.0)
    stats, ref = numbers_of(c, z, r, y, w)
    names = objectives.needs(c)
    first = statistics.in_nats(statistics.first_pass(z, ref, names, BITS), BITS)
    tile = Tile(z, ref, stats, c.smoothing, functions=BITS)
    for name, x in (first | statistics.second_pass(tile, names)).items():
        if name not in ("s", "rs"):  # finish() has replaced those of empty rows
            np.testing.assert_allclose(x, stats[name], rtol=1e-9, atol=1e-9, err_msg=name)
    output = next(iter(objectives.lines_of(c)))
    d_stats = objectives.derivatives(stats, c, {output: jnp.ones_like(w)[:, None]})
    dz = statistics.gradient(tile, statistics.coefficients(stats, d_stats, BITS), None)
    plain = Tile(z, ref, stats, c.smoothing)
    expected = statistics.gradient(plain, statistics.coefficients(stats, d_stats), None)
    np.testing.assert_allclose(dz, expected, rtol=1e-9, atol=1e-12)


def test_rows_of_one_kind_need_the_normalisers_and_their_own_term():
    needed = {
        "tnrf": ({"s", "rs", "n", "sqz"}, {"s", "rs", "rkl"}),
        "tnrll": ({"s", "rs", "n", "sum_z"}, {"s", "rs", "rkl"}),
        "tnfll": ({"s", "rs"}, {"s", "rs", "qz"}),
    }
    for name, c in SETTINGS.items():
        kept, pushed = (objectives.needs_of(c, pushed=x) for x in (False, True))
        assert kept | pushed == objectives.needs(c)
        assert (kept, pushed) == needed.get(name, (kept, pushed)), name
        # Of kept rows a second loop over the columns is spared.
        less = (objectives.needs(c) - kept) & statistics.SECOND_PASS.keys()
        assert less == ({"rkl"} if name.startswith(("tnrf", "tnrll")) else set()), name


def test_an_objective_asks_for_no_more_than_it_needs():
    assert objectives.needs(Settings("ce", 10)) == {"s"}
    assert objectives.needs(Settings("tnff", 10)) == {"s", "rs", "qz"}
    assert objectives.needs(Settings("tnrr", 10, smoothing=1e-6)) == {"s", "rs", "rkl"}
    assert not objectives.needs_second_pass(Settings("pair_statistics", 10))
    alone = SETTINGS["policy_gradient"]
    assert objectives.needs(alone) == {"s", "pz", "rs"}
    assert objectives.needs(dataclasses.replace(alone, kl=None)) == {"s", "pz"}


def test_a_token_brings_what_a_line_reads():
    assert objectives.numbers(SETTINGS["policy_gradient"]) == ("advantages", "old_log_probs")
    assert objectives.numbers(SETTINGS["policy_gradient-exact"]) == ("advantages",)  # on policy
    assert not any(objectives.numbers(c) for c in SETTINGS.values() if c.clip is c.kl is None)


def test_one_name_everywhere():
    """The same word in the specification, the API, the oracle and the test ids."""
    for name in objectives.TARGETED_NEGATIVE:
        assert name in objectives.OBJECTIVES
        assert name in CASES
        assert name in inspect.getdoc(losses.targeted_negative_loss)
        assert f'"{name}"' in inspect.getsource(dense.tn_terms)
    for name in t5patches_kernels.__all__:
        assert getattr(t5patches_kernels, name) is not None


def test_the_oracle_shares_nothing():
    source = inspect.getsource(dense)
    assert "t5patches_kernels" not in source
