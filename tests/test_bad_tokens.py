"""Ids out of range, ignored tokens, and rows with nothing left: NaN, 0 and the documented rule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import CASES, GPU_FORM, MAIN, _compiled, gpu_form_by_name, slow_unless

import t5patches_kernels as tk

IMPLEMENTATIONS = ("xla", "reference")
Z = jax.random.normal(jax.random.key(0), (6, 40))
R = jax.random.normal(jax.random.key(1), (6, 40))
NO_EDITS = (jnp.zeros((6, 0), jnp.int32), jnp.zeros((6, 0)))
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
@pytest.mark.parametrize("name", MAIN)
def test_a_weight_that_is_no_number_is_nan(name, implementation):
    w = jnp.array([1.0, jnp.nan, jnp.inf, -jnp.inf, -1.0, 0.0])
    out, gradient = outcome(name, implementation, jnp.arange(6), w=w)
    bad_rows = [False, True, True, True, False, False]
    np.testing.assert_array_equal(np.isnan(out.loss), bad_rows)
    np.testing.assert_array_equal(np.isnan(gradient).all(-1), bad_rows)
    np.testing.assert_array_equal(np.isnan(gradient).any(-1), bad_rows)


# By the entries of a row and a dtype: ids that are in range, and some that are not.
IDS_BY_DTYPE = [
    (200, "int8", [0, 127], [-1, -128]),
    (200, "uint8", [0, 199], [200, 255]),
    (65536, "uint16", [0, 40000, 62720, 65535], []),
    (65536, "int16", [0, 32767], [-1, -32768]),
    (200, "uint32", [0, 199], [200, 2**31 + 3, 2**32 - 1]),
    (200, "int64", [0, 199], [2**32 + 3, -(2**32) + 3]),
    (200, "uint64", [0, 199], [2**32 + 3, 2**63]),
]


@pytest.mark.parametrize(
    ("size", "dtype", "valid", "invalid", "implementation"),
    [slow_unless((i + j) % 2 == 0, *ids, implementation)
     for i, ids in enumerate(IDS_BY_DTYPE) for j, implementation in enumerate(IMPLEMENTATIONS)],
)  # fmt: skip
def test_ids_of_any_integer_dtype(size, dtype, valid, invalid, implementation):
    """An id is what it says, whether or not its dtype holds V and -1, or int32 holds it."""
    z, r = jax.random.normal(jax.random.key(2), (2, 5, size))
    w, factors = -jnp.ones(5), jnp.full((5, 1), 0.5)
    ids = (valid + invalid + valid)[:5]

    def of_targets(ids):
        return tk.unlikelihood_loss(z, ids, w, implementation=implementation).loss

    def of_edits(ids):
        y, edits = jnp.zeros(5, jnp.int32), tk.Edits(ids[:, None], factors)
        return tk.targeted_negative_loss(
            z, r, y, w, edits=edits, implementation=implementation
        ).loss

    plain = jnp.array([i if i in valid else 0 for i in ids], jnp.int32)
    in_range = np.array([i in valid for i in ids])
    for loss, also in ((of_targets, []), (of_edits, [-1])):  # -1 lists no edit
        want = np.asarray(loss(plain))
        got = [np.asarray(loss(np.array(ids, dtype)))]
        with jax.enable_x64(dtype.endswith("64")):  # without it a JAX array has at most 32 bits
            as_jax = jnp.asarray(np.array(ids, dtype))
            assert as_jax.dtype == dtype
            got.append(np.asarray(loss(as_jax)))
        for one in got:
            np.testing.assert_array_equal(np.isfinite(one), [i in valid + also for i in ids])
            np.testing.assert_array_equal(one[in_range], want[in_range])


def test_booleans_are_no_ids():
    with pytest.raises(TypeError, match="targets must be integer token ids, got bool"):
        tk.unlikelihood_loss(Z, jnp.ones(6, bool), W)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["tnff", "ul"])
@pytest.mark.parametrize(
    ("bad_id", "bad_factor"), [(40, 0.0), (-2, 0.0), (3, -1.0), (3, np.nan), (3, np.inf)]
)
def test_a_bad_edit_is_nan_where_it_counts(name, implementation, bad_id, bad_factor):
    """An ignored token keeps its log-probability: that is of the model alone."""
    ids = jnp.full((6, 2), -1).at[2:4, 1].set(bad_id)
    factors = jnp.zeros((6, 2)).at[2:4, 1].set(bad_factor).at[0].set(bad_factor)  # of no id
    y = jnp.argmax(Z, axis=-1)
    # Traced, so that the values are not known when the call is checked.
    run = jax.jit(lambda f: CASES[name](Z, R, y, W, tk.Edits(ids, f), implementation))
    out, bad_rows = run(factors), [False, False, False, True, False, False]
    np.testing.assert_array_equal(np.isnan(out.loss), bad_rows)
    np.testing.assert_array_equal(np.isnan(out.log_prob), bad_rows)
    assert out.log_prob[2] < 0.0
    np.testing.assert_array_equal(out.correct, np.logical_not(bad_rows))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_factor_of_no_id_is_not_read(implementation):
    """Nor refused, where its value is known."""
    ids = jnp.full((6, 1), -1)
    loss, plain = (
        CASES["tnff"](Z, R, jnp.zeros(6, jnp.int32), W, tk.Edits(ids, factors), implementation).loss
        for factors in (jnp.full((6, 1), -1.0), jnp.ones((6, 1)))
    )
    np.testing.assert_array_equal(loss, plain)


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
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_an_ignored_token_may_have_any_cotangent(bad, implementation):
    """Of a mean over a sequence without tokens, which is left out where it is 0 / 0, it is NaN."""

    def total(z):
        loss = tk.cross_entropy_loss(z, y, W, implementation=implementation).loss
        return (loss * jnp.where(W == 0, bad, 1.0)).sum()

    def of_hidden(h, k):
        loss = tk.linear_cross_entropy_loss(h, k, y, W, implementation=implementation).loss
        return (loss * jnp.where(W == 0, bad, 1.0)).sum()

    y = jnp.zeros(6, jnp.int32)
    for gradient in (jax.grad(total)(Z), *jax.grad(of_hidden, (0, 1))(Z[:, :8], Z[:, 8:16].T @ Z)):
        assert np.isfinite(gradient).all()
        if len(gradient) == len(W):
            np.testing.assert_array_equal(gradient[W == 0], 0.0)


@pytest.mark.parametrize(
    "bad", [jnp.nan, slow_unless(False, jnp.inf), slow_unless(False, -jnp.inf)]
)
@pytest.mark.parametrize("implementation", ["reference", "xla", slow_unless(False, "pallas_tpu")])
def test_what_is_reported_of_an_ignored_token_has_no_gradient_where_it_is_no_number(
    implementation, bad
):
    rows, width, columns = 4, 8, 24
    h = jax.random.normal(jax.random.key(0), (rows, width))
    kernel = jax.random.normal(jax.random.key(1), (width, columns))
    w = jnp.array([1.0, 0.0, 1.0, 1.0])

    def reported(h, kernel):
        out = tk.linear_policy_gradient_loss(
            h, kernel, None, None, jnp.arange(rows), w, jnp.ones(rows),
            implementation=implementation,
        )  # fmt: skip
        return out.loss.sum() + out.entropy.sum() + out.log_prob.sum()

    clean, got = (
        jax.grad(reported, (0, 1))(h.at[1].set(x), kernel) for x in (jnp.zeros(width), bad)
    )
    np.testing.assert_array_equal(got[0][1], 0)
    np.testing.assert_allclose(got[0][2:], clean[0][2:], rtol=1e-5, atol=1e-6)
    assert np.isfinite(got[1]).all()


def test_the_reference_finds_a_nan_in_a_long_row():
    """XLA's maximum on a CPU loses it."""
    z = jnp.sin(jnp.arange(24.0 * 256)).reshape(24, 256)
    r = z.at[5, 158].set(jnp.nan)
    y, w = jnp.zeros(24, jnp.int32), -jnp.ones(24)
    loss = tk.targeted_negative_loss(z, r, y, w, implementation="reference").loss
    np.testing.assert_array_equal(np.isnan(loss), np.arange(24) == 5)


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


# What logits [T, V] may hold that there is no answer for.
NO_ANSWER = {
    "a NaN": lambda x: x.at[:, 7].set(jnp.nan),
    "NaN at the target": lambda x: x.at[:, 0].set(jnp.nan),
    "all NaN": lambda x: x * jnp.nan,
    "+inf": lambda x: x.at[:, 7].set(jnp.inf),
    "+inf at the target": lambda x: x.at[:, 0].set(jnp.inf),
    "nothing unmasked": lambda x: x.at[:].set(-jnp.inf),
}
WITH_REFERENCE = (*tk.TARGETED_NEGATIVE, "kl_forward", "kl_reverse")
ON_BACKENDS = [
    *(
        slow_unless(n % 2 == (i == "xla"), name, i)
        for n, name in enumerate((*MAIN, "kl_forward", "kl_reverse"))
        for i in IMPLEMENTATIONS
    ),
    *((name, GPU_FORM) for name in ("tnff", "tnrf", "ul")),
    *((name, "pallas_tpu") for name in ("tnrf", "tnrll", "ul")),
    ("ul", "pallas_gpu"),
    slow_unless(False, "tnrll", "pallas_gpu"),
]


@pytest.mark.parametrize(("name", "implementation"), ON_BACKENDS)
def test_rows_without_an_answer_are_nan_where_they_count(name, implementation, monkeypatch):
    """NaN, and the whole row of the gradient too; exactly 0 for ignored tokens."""
    gpu_form_by_name(monkeypatch)
    call = _compiled(name, implementation, False)
    logits = dict(zip("zr", 2 * jax.random.normal(jax.random.key(3), (2, 6, 136)), strict=True))
    y = jnp.zeros(6, jnp.int32)
    faulty = np.array([True, True, True, False, False, False])
    counts = np.ones(6, bool) if name.startswith("kl") else np.asarray(W) != 0

    def run(**changed):
        (_, out), gradient = call(*(logits | changed).values(), y, W, *NO_EDITS)
        return np.asarray(out.loss), np.asarray(gradient)

    loss, gradient = run()
    assert np.isfinite(loss).all()
    assert np.isfinite(gradient).all()
    for fault, spoil in NO_ANSWER.items():
        for of in "zr" if name in WITH_REFERENCE else "z":
            lost = faulty & counts
            got, dz = run(**{of: spoil(logits[of]).at[3:].set(logits[of][3:])})
            message = f"{fault} in {of}"
            np.testing.assert_array_equal(np.isnan(got), lost, err_msg=message)
            np.testing.assert_array_equal(np.isnan(dz).all(-1), lost, err_msg=message)
            np.testing.assert_array_equal(np.isnan(dz).any(-1), lost, err_msg=message)
            for zero in (got, dz):
                np.testing.assert_array_equal(zero[faulty & ~lost], 0.0, err_msg=message)
            np.testing.assert_array_equal(got[3:], loss[3:], err_msg=message)
            np.testing.assert_array_equal(dz[3:], gradient[3:], err_msg=message)


@pytest.mark.parametrize("implementation", ["xla", "reference", "pallas_tpu"])
def test_statistics_without_an_answer_are_nan(implementation):
    def run(z, r):
        return tk.token_statistics(z, jnp.zeros(6, jnp.int32), r, implementation=implementation)

    of_model = {"log_prob": "z", "entropy": "z", "ref_log_prob": "zr", "kl": "zr"}
    run = jax.jit(run)
    for fault, spoil in NO_ANSWER.items():
        for of, out in (("z", run(spoil(Z), R)), ("r", run(Z, spoil(R)))):
            for field, read in of_model.items():
                got = np.asarray(getattr(out, field))
                message = f"{fault} in {of}: {field}"
                np.testing.assert_array_equal(np.isnan(got), of in read, err_msg=message)


def test_a_linear_loss_without_an_answer_is_nan():
    """The gradient to the kernel too: it is of all tokens."""
    h, k = (
        jax.random.normal(jax.random.key(4), (6, 5)),
        jax.random.normal(jax.random.key(5), (5, 40)),
    )

    def total(h, k, ref):
        y = jnp.zeros(6, jnp.int32)
        return tk.linear_targeted_negative_loss(h, k, ref, k, y, W, objective="tnrr").loss.sum()

    f = jax.jit(jax.value_and_grad(total, (0, 1)))
    value, (by_hidden, by_kernel) = f(h, k, h.at[1].set(jnp.nan))
    assert np.isnan(value)
    np.testing.assert_array_equal(np.isnan(by_hidden).all(-1), [False, True] + [False] * 4)
    assert np.isnan(by_kernel).all()
    value, gradients = f(h, k, h.at[2].set(jnp.nan))  # of an ignored token
    assert all(np.isfinite(x).all() for x in (value, *gradients))


LINEAR = {
    "ce": tk.linear_cross_entropy_loss,
    "ul": tk.linear_unlikelihood_loss,
    "tnff": lambda h, k, y, w, **o: tk.linear_targeted_negative_loss(h, k, h, k, y, w, **o),
    "policy_gradient": lambda h, k, y, w, **o: tk.linear_policy_gradient_loss(
        h, k, h, k, y, jnp.abs(w), w, **o
    ),
    "statistics": lambda h, k, y, w, **o: tk.linear_token_statistics(h, k, y, h, k, **o),
}


@pytest.mark.parametrize(
    ("name", "implementation", "softcap", "vocab_axis"),
    [("ce", "xla", None, None), ("ul", "xla", None, "model"), ("tnff", "xla", 2.0, None),
     ("policy_gradient", "xla", None, None), ("statistics", "xla", None, None),
     ("ce", "reference", None, None), ("tnff", "reference", 2.0, None)],
)  # fmt: skip
def test_an_ignored_tokens_hidden_states_may_hold_nan(name, implementation, softcap, vocab_axis):
    """They are multiplied by a gradient of 0, and 0 * NaN is NaN: in all of the kernel's."""
    h, k = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((6, 5), (5, 40))))
    y, options = jnp.arange(6), {"softcap": softcap, "implementation": implementation}

    def call(h, k):
        if vocab_axis is None:
            return LINEAR[name](h, k, y, W, **options)
        mesh = jax.make_mesh((2,), (vocab_axis,), axis_types=(jax.sharding.AxisType.Auto,))
        per_shard = functools.partial(LINEAR[name], vocab_axis=vocab_axis, **options)
        specs = (jax.P(), jax.P(None, vocab_axis), jax.P(), jax.P())
        return jax.shard_map(per_shard, mesh=mesh, in_specs=specs, out_specs=jax.P())(h, k, y, W)

    def total(h, k, factor):
        out = call(h, k)
        # As `preferences` sums log-probabilities; a loss is 0 by itself.
        of_tokens = out.loss if hasattr(out, "loss") else jnp.where(W != 0, out.log_prob, 0.0)
        return (of_tokens * factor).sum()

    f = jax.jit(jax.value_and_grad(total, (0, 1)))
    for factor in (jnp.ones(6), jnp.arange(1.0, 7.0)):  # the gradient of the forward pass, or anew
        want = f(h.at[2].set(0.0), k, factor)
        for fault in (jnp.nan, jnp.inf):
            jax.tree.map(np.testing.assert_array_equal, f(h.at[2, 1].set(fault), k, factor), want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mass_where_the_model_is_masked_is_never_plausible(implementation):
    z = Z.at[0, 7].set(-jnp.inf)
    out, gradient = outcome("tnff", implementation, jnp.zeros(6, jnp.int32), z)
    assert out.loss[0] > 1e20
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("implementation", [None, "pallas_tpu"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.vmap])
def test_no_tokens(wrap, implementation):
    def loss(z, y):
        return tk.cross_entropy_loss(z, y, implementation=implementation).loss

    y = jnp.zeros((0, 6), jnp.int32)
    f = jax.grad(lambda z: wrap(loss)(z, y).sum())
    assert f(jnp.zeros((0, 6, 40))).shape == (0, 6, 40)


def test_an_id_listed_twice_has_both_factors():
    def loss(ids, factors):
        edits = tk.Edits(jnp.tile(jnp.array(ids), (6, 1)), jnp.tile(jnp.array(factors), (6, 1)))
        return [
            CASES["tnff"](Z, R, jnp.zeros(6, jnp.int32), W, edits, i).loss for i in IMPLEMENTATIONS
        ]

    for twice, once in zip(loss([4, 4], [0.5, 3.0]), loss([4], [1.5]), strict=True):
        np.testing.assert_allclose(twice, once, rtol=1e-5)
