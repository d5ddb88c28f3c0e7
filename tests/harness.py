"""The promise as code: error against float64 no worse than the dense formula's, plus rounding.

Every implementation is held to it on the same batches: each row of a batch is of another kind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

import t5patches_kernels as tk
from t5patches_kernels import dispatch
from t5patches_kernels.backends.xla import gpu_form

EPS32 = float(np.finfo(np.float32).eps)
ALPHA = 100.0
VOCABULARIES = (1, 7, 130, 257, 1000, 2049)
# Compiled as everywhere: the tests' default is to make code quickly (conftest.py).
AS_USERS: dict[str, int | bool] = {"xla_backend_optimization_level": 3}
if jaxlib.__version__.startswith("0.10."):  # conftest.py
    AS_USERS["xla_cpu_use_fusion_emitters"] = True
MAIN = tk.TRAINING_OBJECTIVES


def slow_unless(often: bool, *values):
    """The values of a test that has its turn on every run, or in the slow sweeps alone."""
    return pytest.param(*values, marks=() if often else pytest.mark.slow)


GPU_FORM = "xla_gpu"


def gpu_form_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the form of "xla" for GPUs an implementation, for a CPU to run."""
    honest = dispatch.choose

    def choose(implementation, *rest):
        return gpu_form.run if implementation == GPU_FORM else honest(implementation, *rest)

    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", (*dispatch.IMPLEMENTATIONS, GPU_FORM))
    monkeypatch.setattr(dispatch, "choose", choose)
    # Short parts: a CPU adds a part up entry by entry, where a GPU's threads share it.
    monkeypatch.setattr(gpu_form, "_PART", 16)


class Batch(NamedTuple):
    """Rows of every kind, in numpy."""

    logits: np.ndarray  # [T, V] float32
    ref_logits: np.ndarray
    targets: np.ndarray  # [T]
    weights: np.ndarray
    ids: np.ndarray  # [T, K]
    factors: np.ndarray


def _row(kind: str, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Model logits, reference logits and target of one row."""
    target = int(rng.integers(size))
    name, _, number = kind.partition(":")
    scale = float(number) if name == "scale" else 2.0
    z = scale * rng.standard_normal(size)
    r = z + 0.3 * scale * rng.standard_normal(size)
    if name == "lead":  # the original model is sure of the target, the model nearly so
        r[target] = np.delete(r, target).max(initial=0.0) + float(number)
        z[target] = np.delete(z, target).max(initial=0.0) + 0.8 * float(number)
    elif name == "equal":
        r = z.copy()
    elif name == "offset":
        z, r = z + float(number), r - float(number)
    elif name == "constant":  # a phantom column of logit 0 would show here
        z, r = np.full(size, 0.5), np.full(size, 0.5)
    elif name == "masked" and size > 2:
        hidden = rng.permutation(np.delete(np.arange(size), target))[: max(1, size // 4)]
        z[hidden] = r[hidden] = -np.inf if number == "inf" else -1e31
    return z.astype(np.float32), r.astype(np.float32), target


KINDS = (
    *(f"scale:{s}" for s in ("1e-3", "1e-1", "1", "10", "100", "1e3")),
    *(f"lead:{n}" for n in (5, 20, 60, 90, 200)),
    "equal",
    "offset:50",
    "offset:1000",
    "constant",
    "masked:inf",
    "masked:finite",
)


def batch(seed: int, size: int, *, edits: int = 0, dtype=np.float32) -> Batch:
    """Three rows of each kind: kept, pushed down, ignored or half pushed down."""
    rng = np.random.default_rng(seed)
    rows = [_row(kind, rng, size) for kind in KINDS for _ in range(3)]
    z, r, y = (np.stack([row[i] for row in rows]) for i in range(3))
    weights = np.tile([1.0, -1.0, 0.0], len(KINDS))
    weights[rng.integers(len(rows), size=6)] = -0.5
    ids = np.full((len(rows), edits), -1)
    factors = rng.choice([0.0, 0.0, 0.25, 3.0], size=(len(rows), edits))
    for t in range(len(rows)):
        # Distinct, and never all of a small vocabulary; at the edges of tiles as often as not.
        edges = [i for i in (0, 127, 128, 255, 256, size - 1) if i < size]
        pool = np.unique(np.concatenate([edges, rng.integers(size, size=edits), [y[t]]]))
        chosen = rng.permutation(pool)[: min(edits, max(size - 1, 0))]
        ids[t, : len(chosen)] = chosen
    z, r = (np.asarray(jnp.asarray(x, dtype).astype(jnp.float32)) for x in (z, r))
    return Batch(z, r, y, weights.astype(np.float32), ids, factors.astype(np.float32))


def one_of_each(b: Batch) -> Batch:
    """A third of a batch: a row of every kind, of every weight in turn."""
    kinds = np.arange(len(KINDS))
    return Batch(*(x[3 * kinds + kinds % 3] for x in b))


Case = Callable[..., tk.TokenLoss]


def _tn(name: str, **options) -> Case:
    def case(z, r, y, w, edits, implementation):
        return tk.targeted_negative_loss(
            z, r, y, w, objective=name, alpha=ALPHA, edits=edits,
            implementation=implementation, **options,
        )  # fmt: skip

    return case


def _own(function, **options) -> Case:
    def case(z, r, y, w, edits, implementation):
        extra = {"edits": edits} if function is tk.unlikelihood_loss else {}
        return function(z, y, w, implementation=implementation, **options, **extra)

    return case


def _kl(direction: str, smoothing: float) -> Case:
    def case(z, r, y, w, edits, implementation):
        kl = tk.kl_divergence(
            z, r, direction=direction, smoothing=smoothing, edits=edits,
            implementation=implementation,
        )  # fmt: skip
        return tk.TokenLoss(kl, jnp.zeros_like(kl), jnp.zeros_like(kl), jnp.zeros(kl.shape, bool))

    return case


def policy(function, *, advantage: float, **fixed):
    """A policy-gradient loss in the form of the others: a weight's sign is that of the advantage.

    On rows that are sure of their target the ratio is above the clip, on most others below.
    """

    def loss(*arguments, **options):
        *model, y, w = arguments
        advantages = jnp.where(w < 0, -advantage, 1.0)
        old = -0.4 - 0.5 * (y % 3).astype(w.dtype)
        out = function(*model, y, jnp.abs(w), advantages, old, **fixed, **options)
        parts = out.ratio + out.entropy + (0.0 if out.kl is None else out.kl)
        return tk.TokenLoss(out.loss, parts, out.log_prob, out.clipped)

    return loss


def _policy(**fixed) -> Case:
    loss = policy(tk.policy_gradient_loss, advantage=ALPHA, **fixed)
    return lambda z, r, y, w, edits, implementation: loss(z, r, y, w, implementation=implementation)


# By the name under which an objective is found everywhere.
CASES: dict[str, Case] = {
    **{name: _tn(name) for name in tk.TARGETED_NEGATIVE},
    "tnff-divergence": _tn("tnff", divergence=True),
    "tnrf-divergence": _tn("tnrf", divergence=True),
    "tnrll-divergence": _tn("tnrll", divergence=True, z_loss=1e-2),
    "tnrr-z_loss": _tn("tnrr", z_loss=1e-2),
    "ul": _own(tk.unlikelihood_loss, alpha=ALPHA),
    "nl": _own(tk.negative_likelihood_loss, alpha=ALPHA),
    "ce": _own(tk.cross_entropy_loss),
    "ce-smoothed": _own(tk.cross_entropy_loss, label_smoothing=0.1, z_loss=1e-3),
    "kl_forward": _kl("forward", 0.0),
    "kl_reverse": _kl("reverse", 1e-6),
    "kl_reverse-unsmoothed": _kl("reverse", 0.0),
    "policy_gradient": _policy(clip=(0.2, 0.3), kl_coefficient=0.1, entropy_coefficient=0.01),
}
TAKES_EDITS = (*tk.TARGETED_NEGATIVE, "ul", "kl_forward", "kl_reverse")


class Outcome(NamedTuple):
    loss: np.ndarray  # [T]
    z_loss: np.ndarray
    log_prob: np.ndarray
    correct: np.ndarray
    gradient: np.ndarray  # [T, V], of the sum of the losses


@functools.cache
def _compiled(name: str, implementation: str, with_edits: bool):
    def total(z, r, y, w, ids, factors):
        edits = tk.Edits(ids, factors) if with_edits else None
        out = CASES[name](z, r, y, w, edits, implementation)
        return jnp.sum(out.loss), out

    # For the others a CPU only stands in, or they are what all are held to.
    options = AS_USERS if implementation == "xla" or jax.default_backend() != "cpu" else {}
    return jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=options)


def run(name: str, implementation: str, b: Batch, dtype) -> Outcome:
    """A case on a batch, its logits given in `dtype`; everything back in float64."""
    double = dtype == np.float64
    with jax.enable_x64(double):
        logits = [jnp.asarray(x, dtype) for x in (b.logits, b.ref_logits)]
        w, factors = (jnp.asarray(x, np.float64 if double else np.float32)
                      for x in (b.weights, b.factors))  # fmt: skip
        rest = (jnp.asarray(b.targets, jnp.int32), w, jnp.asarray(b.ids, jnp.int32), factors)
        call = _compiled(name, implementation, b.ids.shape[1] > 0)
        (_, out), gradient = call(*logits, *rest)
        return Outcome(*(np.asarray(x, np.float64) for x in (*out, gradient)))


def assert_as_good_as_dense(name: str, implementation: str, b: Batch, dtype=np.float32) -> None:
    """Holds an implementation to the promise on a batch."""
    exact = run(name, "reference", b, np.float64)
    dense = run(name, "reference", b, np.float32)
    ours = run(name, implementation, b, dtype)
    np.testing.assert_array_equal(ours.correct, dense.correct)
    # Rounding of what is added up: the terms of a sum are as large as a row's logits are apart.
    with np.errstate(invalid="ignore"):
        spread = [np.ptp(np.where(x > -1e30, x, x.max(-1, keepdims=True)), axis=-1)
                  for x in (b.logits, b.ref_logits)]  # fmt: skip
    size = 1 + np.maximum(*spread)
    if "divergence" in name:  # a cross-entropy less an entropy, each up to log V
        size = size + np.log(b.logits.shape[-1])
    weight = np.where(b.weights < 0, ALPHA, 1.0)
    for field in ("loss", "z_loss", "log_prob", "gradient"):
        want, got, base = (getattr(o, field) for o in (exact, ours, dense))
        assert got.shape == want.shape
        error, dense_error = np.abs(got - want), np.abs(base - want)
        rounding = 8 * EPS32 * weight * size + 4 * EPS32 * np.abs(exact.loss)
        if field == "gradient":
            error, dense_error = error.max(-1), dense_error.max(-1)
            rounding = 16 * EPS32 * (weight + np.abs(exact.loss))
            if dtype == jnp.bfloat16:  # it leaves in the dtype of the logits
                rounding = rounding + 2**-8 * np.abs(want).max(-1)
        wrong = ~(error <= dense_error + rounding)
        kinds = [KINDS[t // 3 % len(KINDS)] for t in np.flatnonzero(wrong)]
        assert not wrong.any(), (
            f"{name} {implementation} {field}: rows {np.flatnonzero(wrong)} of kinds "
            f"{kinds}: error {error[wrong]} against the "
            f"dense formula's {dense_error[wrong]} and rounding {rounding[wrong]}"
        )
