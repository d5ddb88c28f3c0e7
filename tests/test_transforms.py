"""Gradients under every transform a trainer uses, with any per-token cotangent."""

import functools
import itertools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import MAIN, policy, slow_unless

import t5patches_kernels as tk
from t5patches_kernels import dispatch, t5x_losses
from t5patches_kernels.core.objectives import TARGETED_NEGATIVE

KEYS = jax.random.split(jax.random.key(0), 8)
B, L, V, D = 4, 6, 48, 16
Z = 2 * jax.random.normal(KEYS[0], (B, L, V))
R = Z + jax.random.normal(KEYS[1], (B, L, V))
H, K = jax.random.normal(KEYS[2], (B, L, D)), jax.random.normal(KEYS[3], (D, V))
Y = jax.random.randint(KEYS[4], (B, L), 0, V)
W = jax.random.choice(KEYS[5], jnp.array([1.0, -1.0, 0.0, -0.5]), (B, L))
CT = jax.random.normal(KEYS[6], (B, L))

OPTIONS = {"alpha": 3.0, "z_loss": 1e-2}
POLICY = {"advantage": 3.0, "clip": (0.2, 0.3), "kl_coefficient": 0.1, "entropy_coefficient": 0.5}
LOSSES = {
    name: functools.partial(tk.targeted_negative_loss, objective=name, **OPTIONS)
    for name in TARGETED_NEGATIVE
} | {
    "ul": lambda z, r, y, w, **k: tk.unlikelihood_loss(z, y, w, **OPTIONS, **k),
    "nl": lambda z, r, y, w, **k: tk.negative_likelihood_loss(z, y, w, **OPTIONS, **k),
    "ce": lambda z, r, y, w, **k: tk.cross_entropy_loss(
        z, y, w, label_smoothing=0.1, z_loss=1e-2, **k
    ),
    "policy_gradient": policy(tk.policy_gradient_loss, **POLICY),
}
LINEAR = {
    name: functools.partial(tk.linear_targeted_negative_loss, objective=name, **OPTIONS)
    for name in TARGETED_NEGATIVE
} | {
    "ul": lambda h, k, rh, rk, y, w, **o: tk.linear_unlikelihood_loss(h, k, y, w, **OPTIONS, **o),
    "nl": lambda h, k, rh, rk, y, w, **o: tk.linear_negative_likelihood_loss(
        h, k, y, w, **OPTIONS, **o
    ),
    "ce": lambda h, k, rh, rk, y, w, **o: tk.linear_cross_entropy_loss(h, k, y, w, **o),
    "policy_gradient": policy(tk.linear_policy_gradient_loss, **POLICY),
}


def weighed(out, ct=CT):
    """Every differentiable output, each token with a cotangent of its own."""
    return (out.loss * ct + out.log_prob * ct**2 + out.z_loss * jnp.sin(ct)).sum()


def close(got, want, rtol=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.nanmax(np.abs(b))),
        got,
        want,
    )


@pytest.mark.parametrize("name", [slow_unless(x in MAIN[::2], x) for x in LOSSES])
def test_any_cotangent(name):
    def grad(implementation, z):
        return jax.grad(lambda z: weighed(LOSSES[name](z, R, Y, W, implementation=implementation)))(
            z
        )

    jitted = jax.jit(grad, static_argnums=0)
    want = jitted("reference", Z)
    close(grad("xla", Z), want)
    close(jitted("xla", Z), want)


def test_without_jit():
    def grad(h, k):
        return jax.grad(lambda h, k: LINEAR["ce"](h, k, H, K, Y, W).loss.sum(), (0, 1))(h, k)

    with jax.disable_jit():
        got = grad(H, K)
    close(got, grad(H, K))


@pytest.mark.parametrize("name", [slow_unless(x == "tnrf", x) for x in LOSSES])
def test_vmap_and_remat(name):
    def total(z):
        return weighed(LOSSES[name](z, R[0], Y[0], W[0]), CT[0])

    def all_ways(z):
        yield jax.vmap(jax.grad(total))(z)
        yield jax.grad(lambda z: jax.vmap(total)(z).sum())(z)
        yield jnp.stack([jax.grad(jax.checkpoint(total))(one) for one in z])
        yield jax.lax.map(jax.grad(jax.checkpoint(total)), z)

    want = jnp.stack([jax.grad(total)(z) for z in Z])
    for got in jax.jit(lambda z: list(all_ways(z)))(Z):
        close(got, want)


@pytest.mark.parametrize(
    ("name", "transposed", "softcap"),
    [slow_unless((i + 2 * j) % 4 == 0 and name in MAIN, name, transposed, softcap)
     for i, name in enumerate(LINEAR)
     for j, (transposed, softcap) in enumerate(((False, None), (True, 0.5)))],
)  # fmt: skip
def test_linear(name, transposed, softcap):
    kernel = K.T if transposed else K
    options = {"logit_scale": D**-0.5, "transposed": transposed, "softcap": softcap}
    if name == "ce":
        options["label_smoothing"] = 0.1

    @functools.partial(jax.jit, static_argnums=0)
    def grad(implementation, h, k):
        return jax.value_and_grad(
            lambda h, k: weighed(
                LINEAR[name](h, k, H + 0.1, kernel, Y, W, implementation=implementation, **options)
            ),
            argnums=(0, 1),
        )(h, k)

    close(grad("xla", H, kernel), grad("reference", H, kernel))


def test_linear_of_many_chunks(monkeypatch):
    """A ragged last chunk must not be counted twice in the kernel's gradient."""
    from t5patches_kernels.backends import chunked_linear

    monkeypatch.setattr(chunked_linear, "LEAST_ROWS", 5)
    chunked_linear.run.clear_cache()
    h, y, w, ct = (x.reshape(B * L, *x.shape[2:]) for x in (H, Y, W, CT))
    for name in ("tnff", "tnrf", "ce"):

        def total(h, k, implementation, name=name):
            options = {"chunk_bytes": 5 * 4 * V, "implementation": implementation}
            out = LINEAR[name](h, k, h + 0.1, K, y, w, softcap=3.0, **options)
            return weighed(out, ct)

        got, want = (jax.grad(total, (0, 1))(h, K, i) for i in ("xla", "reference"))
        close(got, want)
    chunked_linear.run.clear_cache()


@pytest.mark.parametrize(
    ("name", "of_model", "of_reference"),
    [slow_unless((i + j) % 8 == 0 and name in MAIN, name, x, y)
     for i, name in enumerate(LOSSES)
     for j, (x, y) in enumerate(itertools.product(("float32", "bfloat16"), repeat=2))
     if name in TARGETED_NEGATIVE or x == y],  # of most others there is no reference
)  # fmt: skip
def test_logits_of_many_blocks(name, of_model, of_reference, monkeypatch):
    """A ragged last block finds gradients where it would read logits, and must not use them."""
    from t5patches_kernels.backends.xla import driver

    z, r = Z.astype(of_model), R.astype(of_reference)
    counts = tuple(np.argwhere(W != 0)[0])
    bad = Y.at[counts].set(-1)
    soft = {}
    if name in (*TARGETED_NEGATIVE, "ul"):
        ids = jnp.stack([Y, (Y + 1) % V], axis=-1)
        soft["edits"] = tk.Edits(ids, jnp.broadcast_to(jnp.array([0.0, 0.3]), ids.shape))

    def run():
        dispatch.programs.clear_cache()
        driver.run.clear_cache()

        def total(z):
            out = LOSSES[name](z, r, bad, W, implementation="xla", **soft)
            return weighed(out), out

        return jax.grad(total, has_aux=True)(z)

    want = run()
    monkeypatch.setattr(driver, "block_rows", lambda columns: 5)
    got = run()
    dispatch.programs.clear_cache()
    driver.run.clear_cache()
    assert np.isnan(np.asarray(want[0], np.float32)).any(-1).sum() == 1
    close(*(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), x) for x in (got, want)))


@pytest.mark.parametrize(("softcap", "wrap"), [(None, lambda f: f), (2.0, jax.checkpoint)])
def test_linear_vmap_and_remat(softcap, wrap):
    def total(h, k):
        out = tk.linear_targeted_negative_loss(h, k, h, K, Y[0], W[0], softcap=softcap, **OPTIONS)
        return weighed(out, CT[0])

    one = jax.jit(jax.grad(total, (0, 1)))
    want = jax.tree.map(lambda *x: jnp.stack(x), *[one(h, K) for h in H])
    close(jax.jit(jax.vmap(jax.grad(wrap(total), (0, 1)), in_axes=(0, None)))(H, K), want)


def test_bfloat16_gradients_keep_their_dtype():
    h, k = H.astype(jnp.bfloat16), K.astype(jnp.bfloat16)
    z = Z.astype(jnp.bfloat16)
    assert jax.grad(lambda z: LOSSES["tnff"](z, R, Y, W).loss.sum())(z).dtype == jnp.bfloat16
    grads = jax.grad(lambda h, k: LINEAR["tnff"](h, k, H, K, Y, W).loss.sum(), (0, 1))(h, k)
    assert [g.dtype for g in grads] == [jnp.bfloat16] * 2
    # A float32 master kernel under bfloat16 activations keeps a float32 gradient.
    mixed = jax.grad(lambda k: LINEAR["tnff"](h, k, H, K, Y, W).loss.sum())(K)
    assert mixed.dtype == jnp.float32


def test_nothing_flows_elsewhere():
    def total(r, w, factors):
        edits = tk.Edits(jnp.broadcast_to(jnp.arange(2), (B, L, 2)), factors)
        return tk.targeted_negative_loss(Z, r, Y, w, edits=edits, **OPTIONS).loss.sum()

    for g in jax.grad(total, (0, 1, 2))(R, W, jnp.full((B, L, 2), 0.5)):
        np.testing.assert_array_equal(g, 0.0)


def test_donated_logits():
    step = jax.jit(
        lambda z, r: jax.grad(lambda z: LOSSES["tnff"](z, r, Y, W).loss.sum())(z),
        donate_argnums=0,
    )
    want = jax.grad(lambda z: LOSSES["tnff"](z, R, Y, W).loss.sum())(Z)
    close(step(Z.copy(), R), want)


def test_value_without_gradient_makes_no_gradient():
    def stages(f):
        return set(re.findall(r"Stage\.[A-Z_]+", str(jax.make_jaxpr(f)(Z))))

    assert stages(lambda z: LOSSES["tnff"](z, R, Y, W).loss.sum()) == {"Stage.STATISTICS"}
    assert "Stage.VALUE_AND_GRAD" in stages(
        jax.grad(lambda z: LOSSES["tnff"](z, R, Y, W).loss.sum())
    )


def test_statistics_are_differentiable():
    def total(z, implementation):
        s = tk.token_statistics(z, Y, R, implementation=implementation)
        return (s.log_prob * CT + s.entropy * CT**2 + s.kl * jnp.sin(CT)).sum(), s

    (_, got), g = jax.value_and_grad(total, has_aux=True)(Z, "xla")
    (_, want), h = jax.value_and_grad(total, has_aux=True)(Z, "reference")
    close(got, want)
    close(g, h)
    linear = tk.linear_token_statistics(H, K, Y, H, K)
    close(linear, tk.token_statistics(H @ K, Y, H @ K), rtol=1e-4)
    assert np.abs(linear.kl).max() == 0.0  # model and reference are the same


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu", "pallas_gpu"])
def test_in_a_program_that_has_float64_elsewhere(implementation):
    z, r = (jnp.concatenate([x] * 4, axis=-1)[:1, :2, :256] for x in (Z, R))
    y, w = Y[:1, :2], W[:1, :2]

    def f(z, r, y, w):
        return LOSSES["tnrf"](z, r, y, w, implementation=implementation).loss.sum()

    f = jax.value_and_grad(f)
    want = jax.jit(f)(z, r, y, w)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        got = jax.jit(f)(z, r, y, w)
    assert {x.dtype for x in got} == {jnp.dtype("float32")}
    close(got, want)


def test_float64_in_the_reference():
    with jax.enable_x64(True):
        z = jnp.asarray(np.asarray(Z, np.float64))
        out = LOSSES["tnrr"](z, z, Y, W.astype(jnp.float64), implementation="reference")
        assert out.loss.dtype == jnp.float64
        assert out.log_prob.dtype == jnp.float64


@pytest.mark.parametrize("double", [0, 1])
def test_one_of_two_models_in_float64(double):
    """All is then computed in it."""

    def losses(z, r):
        yield tk.targeted_negative_loss(
            z, r, Y[0], W[0], alpha=1.0, implementation="reference"
        ).loss
        yield tk.policy_gradient_loss(
            z, r, Y[0], None, CT[0], kl_coefficient=1.0, implementation="reference"
        ).loss
        yield t5x_losses.cross_entropy_with_logits(z, abs(r), implementation="reference")[0]

    with jax.enable_x64(True):
        both = [jnp.asarray(np.asarray(x[0], np.float64)) for x in (Z, R)]
        mixed = [x if i == double else x.astype(jnp.float32) for i, x in enumerate(both)]
        for got, want in zip(losses(*mixed), losses(*both), strict=True):
            assert got.dtype == jnp.float64
            close(got, want, rtol=1e-14)


def test_numpys_float64_without_x64():
    """As JAX takes it: float32, and nothing is said of a dtype that nobody asked for."""
    z, y = np.asarray(Z, np.float64), np.asarray(Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = tk.cross_entropy_loss(z, y), tk.cross_entropy_loss(z, y, implementation="reference")
        pair = tk.pairwise_reward_loss(z, z)
        soft = [
            t5x_losses.cross_entropy_with_logits(z, z**2, implementation=i)
            for i in ("xla", "reference")
        ]
    assert {x.dtype for x in jax.tree.leaves((got, pair, soft))} == {
        jnp.dtype("float32"),
        jnp.dtype(bool),
    }


# --- The drop-in for T5X --------------------------------------------------------------------------


def t5x_cross_entropy(logits, soft_targets, z_loss):
    """What t5x.losses computes, in its own terms."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    loss = -jnp.sum(soft_targets * (logits - log_z[..., None]), axis=-1)
    return loss + z_loss * log_z**2, z_loss * log_z**2


def test_cross_entropy_with_logits_is_that_of_t5x():
    soft = jax.nn.softmax(R)
    for z_loss in (0.0, 1e-2):
        for targets in (soft, jax.nn.one_hot(Y, V)):
            f = functools.partial(t5x_losses.cross_entropy_with_logits, z_loss=z_loss)
            want = functools.partial(t5x_cross_entropy, z_loss=z_loss)
            close(f(Z, targets), want(Z, targets))
            grads = [
                jax.grad(lambda z, t, f=f: (f(z, t)[0] * CT).sum(), (0, 1))(Z, targets)
                for f in (f, want)
            ]
            close(*grads)


def test_soft_targets_that_all_devices_hold():
    """Inside `jax.shard_map`, where the logits alone differ: their gradient is a sum over it."""
    mesh = jax.make_mesh((B,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    soft = jax.nn.softmax(R[0])

    def total(z, soft):
        return (t5x_losses.cross_entropy_with_logits(z, soft)[0] * CT[0]).sum()

    def of_each(z, soft):
        return jax.lax.psum(total(z[0], soft), "data")

    rows = jax.P("data")
    call = jax.shard_map(of_each, mesh=mesh, in_specs=(rows, jax.P()), out_specs=jax.P())
    want = jax.grad(lambda z, soft: sum(total(x, soft) for x in z), (0, 1))(Z, soft)
    close(jax.jit(jax.grad(call, (0, 1)))(Z, soft), want)


def test_soft_targets_in_forward_mode():
    def f(z, soft, implementation):
        return t5x_losses.cross_entropy_with_logits(z, soft, implementation=implementation)[0]

    z, soft = Z[0, 0], jax.nn.softmax(R[0, 0])
    got = jax.jit(jax.hessian(f, (0, 1)), static_argnums=2)(z, soft, "reference")
    wanted = jax.hessian(lambda z, soft: t5x_cross_entropy(z, soft, 0.0)[0], (0, 1))
    close(got, jax.jit(wanted)(z, soft))
    with pytest.raises(NotImplementedError, match=r'forward-mode.*"reference"'):
        jax.jvp(lambda soft: f(z, soft, "xla"), (soft,), (soft,))


@pytest.mark.parametrize(
    ("z_loss", "of_logits", "implementation"),
    [slow_unless((i + j + k) % 2 == 0, z_loss, of_logits, implementation)
     for i, z_loss in enumerate((0.0, 1e-2))
     for j, of_logits in enumerate(("float32", "bfloat16"))
     for k, implementation in enumerate(("xla", "reference"))],
)  # fmt: skip
def test_soft_targets_in_bfloat16_are_taken_as_they_are(z_loss, of_logits, implementation):
    """Against float64: neither their logarithm nor their sum is rounded."""
    spread = jax.nn.softmax(R[0])
    soft = jnp.stack([spread, jnp.where(jax.nn.one_hot(Y[0], V) > 0, 0.9, 0.1 / (V - 1))])
    soft = soft.at[0, 0].set(0.0).astype(jnp.bfloat16)  # nothing to move towards
    z = Z[:2].astype(of_logits)

    def total(z, soft):
        loss, z_part = t5x_losses.cross_entropy_with_logits(
            z, soft, z_loss, implementation=implementation
        )
        return (loss * CT[:2]).sum(), (loss, z_part)

    (_, got), gradient = jax.value_and_grad(total, has_aux=True)(z, soft)
    with jax.enable_x64(True):
        x, t, ct = (jnp.asarray(np.asarray(a, np.float64)) for a in (z, soft, CT[:2]))
        close(got, t5x_cross_entropy(x, t, z_loss), rtol=1e-6)
        want = jax.grad(lambda x: (t5x_cross_entropy(x, t, z_loss)[0] * ct).sum())(x)
    close(np.asarray(gradient, np.float64), want, rtol=2e-6 if of_logits == "float32" else 2**-8)


def test_compute_weighted_cross_entropy_is_that_of_t5x():
    smoothing, z_loss = 0.1, 1e-2
    on, off = 1 - smoothing, smoothing / (V - 1)
    soft = jnp.where(jax.nn.one_hot(Y, V) > 0, on, off)
    constant = -(on * np.log(on) + (V - 1) * off * np.log(off + 1e-20))
    total, z_part = t5x_cross_entropy(Z, soft, z_loss)
    got = t5x_losses.compute_weighted_cross_entropy(Z, Y, W, smoothing, z_loss, 2.0)
    want = (((total - constant) * W).sum() / 2, (z_part * W).sum() / 2, W.sum())
    close(got, want)
    assert t5x_losses.compute_weighted_cross_entropy(Z, Y)[2] == B * L
