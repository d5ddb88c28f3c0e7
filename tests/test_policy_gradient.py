"""PPO's and GRPO's loss against the papers' formulas, written out in numpy, on every backend."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import GPU_FORM, gpu_form_by_name, slow_unless
from test_transforms import close

import t5patches_kernels as tk
from t5patches_kernels.core import objectives

T, V, D = 12, 136, 8
RNG = np.random.default_rng(0)
Z = 2 * RNG.standard_normal((T, V)).astype(np.float32)
R = (Z + 0.3 * RNG.standard_normal((T, V))).astype(np.float32)
Y = RNG.integers(V, size=T)
W = np.resize([1.0, 0.5, 1.0, 0.0], T).astype(np.float32)
A = np.resize([1.0, -2.0, 0.5, -0.25, 0.0], T).astype(np.float32)
CLIP = (0.2, 0.3)
PARTS = ("loss", "log_prob", "ratio", "kl", "entropy")
IMPLEMENTATIONS = ("xla", "reference", GPU_FORM, "pallas_tpu", "pallas_gpu")


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


# Ratios within the clip, above it and below.
LOG_RATIOS = np.resize([0.0, 0.1, 0.5, -0.5, 0.7, -0.1, -0.7], T)
OLD = (log_softmax(Z.astype(np.float64))[np.arange(T), Y] - LOG_RATIOS).astype(np.float32)


def by_formula(z, r, old, clip, kl, kl_coefficient, entropy_coefficient):
    """Schulman et al. (2017), eq. 7; Shao et al. (2024), eq. 4; Schulman (2020)."""
    at = np.arange(T), Y
    log_p, log_q = log_softmax(z), log_softmax(r)
    p, a = np.exp(log_p), A.astype(np.float64)
    ratio = np.exp(log_p[at] - old)
    surrogate = np.minimum(ratio * a, np.clip(ratio, 1 - clip[0], 1 + clip[1]) * a)
    log_r = log_q[at] - log_p[at]
    of_kl = {"exact": (p * (log_p - log_q)).sum(-1), "k1": -log_r, "k3": np.exp(log_r) - 1 - log_r}
    entropy = -(p * log_p).sum(-1)
    loss = W * (-surrogate + kl_coefficient * of_kl[kl] - entropy_coefficient * entropy)
    return tk.PolicyLoss(loss, log_p[at], ratio, None, of_kl[kl], entropy)


def gradients(**options):
    """Of each part's sum by the logits: central differences, a column at a time."""
    step, z, found = 1e-5, Z.astype(np.float64), {name: np.zeros((T, V)) for name in PARTS}
    for j in range(V):
        move = step * (np.arange(V) == j)
        ahead, behind = (
            by_formula(x, R.astype(np.float64), **options) for x in (z + move, z - move)
        )
        for name in PARTS:
            found[name][:, j] = (getattr(ahead, name) - getattr(behind, name)) / (2 * step)
    return found


def loss(z, implementation="xla", *, r=R, y=Y, w=W, a=A, old=OLD, **options):
    z, r, a, old = (x if x is None else jnp.asarray(x) for x in (z, r, a, old))
    options = {"clip": CLIP, "implementation": implementation} | options
    return tk.policy_gradient_loss(z, r, y, w, a, old, **options)


def outcome(implementation, part, **options):
    """All parts, and the gradient of the sum of one."""

    def total(z):
        out = loss(z, implementation, **options)
        return getattr(out, part).sum(), out

    (_, out), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(jnp.asarray(Z))
    return out, gradient


# The exact one of logits is among the sweeps' objectives.
@pytest.mark.parametrize(
    ("implementation", "kl", "part"),
    [slow_unless(name in ("xla", "reference") and (kl, part) == ("k3", "loss"), name, kl, part)
     for name in IMPLEMENTATIONS for kl in objectives.KLS for part in PARTS],
)  # fmt: skip
def test_every_part_is_that_of_the_papers(implementation, kl, part, monkeypatch):
    gpu_form_by_name(monkeypatch)
    check(implementation, part, kl)


SAID = {"clip": CLIP, "kl_coefficient": 0.3, "entropy_coefficient": 0.2}


def check(implementation, part, kl, wrong=()):
    """Holds a part and its gradient to the formulas, or to wrong ones."""
    got, gradient = outcome(implementation, part, kl=kl, **SAID)
    said = {"old": OLD.astype(np.float64), "kl": kl} | SAID | dict(wrong)
    want = by_formula(*map(np.float64, (Z, R)), **said)
    for name in PARTS:
        np.testing.assert_allclose(
            getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-5, err_msg=name
        )
    np.testing.assert_allclose(gradient, gradients(**said)[part], rtol=1e-4, atol=1e-5)
    held = (W != 0) & np.where(A > 0, LOG_RATIOS > 0.3, (A < 0) & (LOG_RATIOS < -0.3))
    assert held[A > 0].any()
    assert held[A < 0].any()
    np.testing.assert_array_equal(got.clipped, held)


@pytest.mark.parametrize(
    "wrong",
    [{"clip": (0.2, 0.301)}, {"clip": (0.201, 0.3)}, {"kl": "k1"}, {"entropy_coefficient": 0.201}],
)
def test_control_another_formula_is_seen(wrong):
    with pytest.raises(AssertionError, match="Not equal"):
        check("reference", "loss", "k3", wrong)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_clip_stops_the_gradient_on_the_side_of_the_advantage_alone(sign, implementation):
    """Above the clip for a positive advantage, below it for a negative one."""
    log_ratios = np.resize([0.5, 0.1, -0.1, -0.5], T)
    old = OLD + (LOG_RATIOS - log_ratios).astype(np.float32)
    ones = np.ones(T, np.float32)
    out, gradient = outcome(implementation, "loss", r=None, w=ones, a=sign * ones, old=old)
    held = sign * log_ratios > 0.3
    np.testing.assert_array_equal(out.clipped, held)
    np.testing.assert_array_equal((np.asarray(gradient) == 0).all(-1), held)
    bound = 1 + CLIP[1] if sign > 0 else 1 - CLIP[0]
    np.testing.assert_allclose(out.loss[held], -sign * bound, rtol=1e-6)
    # Elsewhere the target's logit goes up, or down.
    assert (sign * np.asarray(gradient)[np.arange(T), Y][~held] < 0).all()


@pytest.mark.parametrize(("a", "bound"), [(1.0, CLIP[1]), (-1.0, -CLIP[0])])
def test_at_the_bound_the_gradient_flows(a, bound):
    """As with a clip of nothing in the first update, where the ratio is exactly 1."""
    c = objectives.Settings("policy_gradient", V, clip=CLIP)
    one = jnp.ones(())

    def term(log_prob):
        row = {"zy": log_prob, "s": one, "old_log_probs": 0 * one, "advantages": a * one}
        return objectives.policy_gradient(objectives.Row(row), c)

    at = jnp.float32(np.log1p(bound))
    np.testing.assert_allclose(jax.grad(term)(at), -a * (1 + bound), rtol=1e-6)
    assert jax.grad(term)(at + 1e-6 * a) == 0


@pytest.mark.parametrize(
    "implementation", [slow_unless(not x.startswith("pallas"), x) for x in IMPLEMENTATIONS]
)
def test_on_policy_it_is_the_policy_gradient(implementation, monkeypatch):
    """Without old log-probabilities: REINFORCE, ``-A log p[y]``, whatever the clip."""
    gpu_form_by_name(monkeypatch)
    got, gradient = outcome(implementation, "loss", r=None, old=None, clip=(0.0, 0.0))
    np.testing.assert_array_equal(got.ratio, 1.0)
    np.testing.assert_array_equal(got.loss, -W * A)
    assert got.kl is None
    assert not got.clipped.any()
    want = jax.grad(lambda z: -(W * A * jax.nn.log_softmax(z)[np.arange(T), Y]).sum())(Z)
    np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "implementation",
    [slow_unless(x != "pallas_tpu", x) for x in ("xla", "reference", "pallas_tpu")],
)
def test_a_ratio_beyond_float32(implementation):
    a = np.resize([1.0, 0.0, -1.0], T).astype(np.float32)
    old = np.full(T, -200.0, np.float32)
    out, gradient = outcome(implementation, "loss", r=None, w=None, a=a, old=old)
    held, nothing, unheld = (np.arange(T) % 3 == k for k in range(3))
    np.testing.assert_allclose(out.loss[held], -1 - CLIP[1], rtol=1e-6)
    np.testing.assert_array_equal(out.loss[nothing], 0.0)
    np.testing.assert_array_equal(out.loss[unheld], np.inf)
    np.testing.assert_array_equal(np.asarray(gradient)[~unheld], 0.0)
    np.testing.assert_array_equal(out.clipped, held)


@pytest.mark.parametrize(
    "implementation", [slow_unless(x in ("xla", "reference"), x) for x in IMPLEMENTATIONS]
)
def test_what_is_no_answer_is_nan_where_it_counts(implementation, monkeypatch):
    """In the loss and its whole row of the gradient; of an ignored token nothing matters."""
    gpu_form_by_name(monkeypatch)

    @jax.jit
    def f(z, r, y, w, a, old):
        def total(z):
            out = loss(z, implementation, r=r, y=y, w=w, a=a, old=old, kl_coefficient=0.1)
            return out.loss.sum(), out

        return jax.value_and_grad(total, has_aux=True)(z)

    good = {"z": Z, "r": R, "y": Y, "w": W, "a": A, "old": OLD}
    (_, plain), d_plain = f(**good)
    first, counts = np.arange(T) < 6, W != 0
    for name, fault in (
        ("z", np.nan), ("z", np.inf), ("r", np.nan), ("y", -1), ("y", V), ("w", -1.0),
        ("a", np.nan), ("a", np.inf), ("old", np.nan), ("old", -np.inf),
    ):  # fmt: skip
        spoilt = good[name].copy()
        # Of a row one entry; no weight of an ignored token, which it would not be any more.
        at = (first, 7) if name in "zr" else first & counts if name == "w" else first
        spoilt[at] = fault
        (_, out), dz = f(**good | {name: spoilt})
        lost = first & counts
        np.testing.assert_array_equal(np.isnan(out.loss), lost, err_msg=name)
        np.testing.assert_array_equal(np.isnan(dz).all(-1), lost, err_msg=name)
        np.testing.assert_array_equal(np.isnan(dz).any(-1), lost, err_msg=name)
        kept = ~first  # (a TPU's block with NaN takes another way, which rounds otherwise)
        close((out.loss[kept], dz[kept]), (plain.loss[kept], d_plain[kept]))
        np.testing.assert_array_equal(np.asarray(out.loss)[~counts], 0.0, err_msg=name)
        np.testing.assert_array_equal(np.asarray(dz)[~counts], 0.0, err_msg=name)
        for part in out:
            assert np.isfinite(part[~lost]).all(), name


def test_without_a_kl_in_the_loss_a_spoilt_reference_shows_in_the_kl_alone():
    r = R.copy()
    r[0] = np.nan
    for implementation in ("xla", "reference"):
        out, gradient = outcome(implementation, "loss", r=r)
        np.testing.assert_array_equal(np.isnan(out.kl), np.arange(T) == 0)
        assert np.isfinite(out.loss).all()
        assert np.isfinite(gradient).all()


def test_nothing_flows_to_what_a_token_brings():
    def total(r, w, a, old):
        return loss(Z, r=r, w=w, a=a, old=old, kl_coefficient=0.1).loss.sum()

    for x in jax.jit(jax.grad(total, (0, 1, 2, 3)))(*map(jnp.asarray, (R, W, A, OLD))):
        np.testing.assert_array_equal(x, 0.0)


def test_nothing_is_computed_that_nobody_asks_for():
    """The sums by what is given: of the reference none without one, and what has no coefficient
    is no part of the gradient."""
    c = objectives.Settings("policy_gradient", V, clip=CLIP)
    assert objectives.reference_of(c) is None
    assert objectives.differentiable(c, ("loss",)) == ("s", "zy")


@pytest.mark.slow
def test_skipped_tokens():
    kept = W != 0

    @functools.partial(jax.jit, static_argnums=1)
    def f(z, skip):
        def total(z):
            out = loss(z, kl_coefficient=0.1, skip_ignored=skip)
            return out.loss.sum(), out

        return jax.value_and_grad(total, has_aux=True)(z)

    (_, want), d_want = f(Z, False)
    (_, got), d_got = f(jnp.where(kept[:, None], Z, jnp.nan), True)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, np.where(kept, b, 0), rtol=1e-5, atol=1e-6)
    close(d_got, d_want)


def weighed(out):
    """Every part with a cotangent of its own for each token."""
    factors = (np.cos(np.arange(T) * k) for k in range(1, 6))
    return sum((f * getattr(out, name)).sum() for name, f in zip(PARTS, factors, strict=True))


@pytest.mark.parametrize(
    ("linear", "by_jax"),
    [slow_unless(often, linear, by_jax)
     for linear, by_jax, often in ((True, False, True), (False, True, False),
                                   (False, False, False), (True, True, False))],
)  # fmt: skip
def test_a_split_vocabulary(linear, by_jax):
    """Inside a shard_map or by JAX under a mesh: parts and gradients are those of one device."""
    h, k = (RNG.standard_normal(s).astype(np.float32) for s in ((T, D), (D, V)))
    options = {"clip": CLIP, "kl": "k3", "kl_coefficient": 0.1, "entropy_coefficient": 0.2}

    def total(z, k, r, rk, **where):
        tokens = (Y, W, A, OLD)
        if linear:
            out = tk.linear_policy_gradient_loss(
                z, k, r, rk, *tokens, softcap=3.0, **options, **where
            )
        else:
            out = tk.policy_gradient_loss(k, rk, *tokens, **options, **where)
        return weighed(out)

    arguments = (h, k, h + 0.1, k) if linear else (None, Z, None, R)
    of = (0, 1) if linear else 1
    alone = functools.partial(total, implementation="reference")
    want = jax.jit(jax.value_and_grad(alone, of))(*arguments)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    if by_jax:
        with jax.set_mesh(mesh):
            close(jax.jit(jax.value_and_grad(total, of))(*arguments), want)
        return
    split = jax.P(None, "model")
    inside = jax.shard_map(
        functools.partial(total, vocab_axis="model"), mesh=mesh,
        in_specs=(jax.P(), split, jax.P(), split), out_specs=jax.P(),
    )  # fmt: skip
    close(jax.jit(jax.value_and_grad(inside, of))(*arguments), want)


@pytest.mark.slow
def test_vmap_with_advantages_of_each():
    a = np.stack([A, -A, 2 * A])
    gradient = jax.jit(jax.grad(lambda z, one: weighed(loss(z, a=one))))
    each = jnp.stack([gradient(Z, one) for one in a])
    close(jax.vmap(gradient, (None, 0))(Z, a), each)


@pytest.mark.slow
def test_bfloat16_numbers_and_logits():
    low = jnp.bfloat16
    z, r, a, old = (jnp.asarray(x).astype(low) for x in (Z, R, A, OLD))
    out = loss(z, r=r, a=a, old=old, kl_coefficient=0.1)
    assert {x.dtype.name for x in out} == {"float32", "bool"}
    wide = [np.asarray(x, np.float32) for x in (z, r, a, old)]
    want = loss(wide[0], r=wide[1], a=wide[2], old=wide[3], kl_coefficient=0.1)
    close(out.loss, want.loss)
