"""The streaming form for GPUs, run on the CPU: the same text, another order of sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import (
    CASES,
    GPU_FORM,
    TAKES_EDITS,
    assert_as_good_as_dense,
    batch,
    gpu_form_by_name,
    slow_unless,
)

import t5patches_kernels as tk
from t5patches_kernels import dispatch
from t5patches_kernels.backends.xla import gpu_form, streaming
from t5patches_kernels.core import objectives
from t5patches_kernels.core.objectives import Settings
from t5patches_kernels.core.operation import Operands, Operation, Stage, Tokens


@pytest.fixture(autouse=True)
def _form_by_name(monkeypatch):
    gpu_form_by_name(monkeypatch)


@pytest.mark.parametrize(
    ("name", "size", "dtype"),
    [slow_unless((i + j) % 6 == 0, name, size, dtype)
     for j, name in enumerate(CASES)
     for i, (size, dtype) in enumerate(((256, jnp.float32), (256, jnp.bfloat16), (7, jnp.float32)))]
    + [slow_unless(False, name, 7, jnp.bfloat16) for name in CASES],
)  # fmt: skip
def test_as_good_as_dense(name, size, dtype):
    assert_as_good_as_dense(name, GPU_FORM, batch(size, size, dtype=dtype), dtype)


@pytest.mark.parametrize("name", [slow_unless(i % 2 == 0, x) for i, x in enumerate(TAKES_EDITS)])
def test_sets_of_edits(name):
    assert_as_good_as_dense(name, GPU_FORM, batch(3, 256, edits=5))


def operands(c, rows=8, size=48):
    rng = np.random.default_rng(0)
    z, r = (jnp.asarray(rng.normal(size=(rows, size)), jnp.float32) for _ in range(2))
    y = jnp.asarray(rng.integers(size, size=rows), jnp.int32)
    w = jnp.asarray(np.tile([1.0, -1.0, 0.0, -0.5], rows // 4), jnp.float32)
    edits = (y[:, None], jnp.full((rows, 1), -jnp.inf)) if objectives.reference_of(c) else ()
    tokens = Tokens(y, w, jnp.zeros(rows, bool), *edits)
    return Operands((z,), (r,) if objectives.reference_of(c) == "given" else ()), tokens


@pytest.mark.parametrize(
    "name", [slow_unless(x in ("tnrf", "ul"), x) for x in ("tnff", "tnrf", "ul", "ce")]
)
def test_every_stage_is_that_of_the_other_form(name):
    c = Settings(name, 48, alpha=3.0, smoothing=1e-6 if name == "tnrf" else 0.0)
    op = Operation(c)
    rows, tokens = operands(c)
    of_cpus = streaming.form("cpu")
    fused = of_cpus(op, Stage.VALUE_AND_GRAD, rows, tokens)
    d_stats = objectives.derivatives(fused.stats, c, {"loss": jnp.ones_like(fused.stats["m"])})
    for stage in Stage:
        if stage is Stage.SECOND_PASS and not objectives.needs_second_pass(c):
            continue
        given = (
            (fused.stats, d_stats) if stage in (Stage.SECOND_PASS, Stage.GRADIENT) else (None, None)
        )
        want, got = (run(op, stage, rows, tokens, *given) for run in (of_cpus, gpu_form.run))
        assert set(want.stats) <= set(got.stats)
        for key, x in want.stats.items():
            np.testing.assert_allclose(got.stats[key], x, rtol=2e-5, atol=2e-5, err_msg=key)
        assert (want.gradient is None) == (got.gradient is None)
        if want.gradient is not None:
            np.testing.assert_allclose(got.gradient[0], want.gradient[0], rtol=2e-5, atol=2e-5)


def test_equal_parts():
    for size in (1, 16, 17, 48, 251, 32128):
        assert size % gpu_form.parts_of(size) == 0
    assert gpu_form.parts_of(48) == 3


def test_a_cpu_gets_the_form_for_cpus():
    c = Settings("tnff", 48)
    rows, tokens = operands(c)
    run = jax.jit(dispatch.driver(None, linear=False), static_argnums=(0, 1))
    text = run.lower(Operation(c), Stage.VALUE_AND_GRAD, rows, tokens).as_text()
    assert "optimization_barrier" not in text


@pytest.mark.parametrize(
    "cotangent", ["ones", "half", slow_unless(False, "per-token"), "zeros", "none counts"]
)
def test_a_head_s_gradient_is_scaled_or_made_again(cotangent):
    rng = np.random.default_rng(0)
    h, k = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((12, 8), (8, 48)))
    y = jnp.asarray(rng.integers(48, size=12))
    w = jnp.asarray(np.tile([1.0, -1.0, 0.0, -0.5], 3), jnp.float32)
    w = w * 0 if cotangent == "none counts" else w
    # An ignored token's cotangent, whatever it is, is no reason to make the logits again.
    ct = {
        "ones": jnp.ones(12),
        "half": jnp.where(w == 0, 7.0, 0.5),
        "zeros": jnp.zeros(12),
    }.get(cotangent, jnp.arange(12.0))

    def loss(implementation, h, k):
        out = tk.linear_targeted_negative_loss(
            h, k, h + 0.1, k, y, w, objective="tnrf", alpha=3.0, implementation=implementation
        )
        return (out.loss * ct).sum()

    want, got = (jax.grad(loss, (1, 2))(i, h, k) for i in ("reference", "xla"))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
