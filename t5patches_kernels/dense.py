r"""The oracle: every loss in dense, textbook form, with gradients by autodiff.

Written to be checked by eye and shared with nothing: no statistic, tile or kernel of the other
implementations is used here. Computes in float64 where an input is float64, in float32
otherwise. Holds several ``[T, V]`` arrays; differentiable any number of times, in either mode.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

# A logit at or below this is masked: probability 0, contributes 0.
MASKED = -1e30


def precision_of(*inputs: Array) -> jnp.dtype:
    """What is computed in: float64 where an input is float64, else float32."""
    # The dtype that JAX gives an input: without x64 a float64 of numpy's is float32.
    double = any(jnp.result_type(x) == jnp.float64 for x in inputs)
    return jnp.dtype(jnp.float64 if double else jnp.float32)


def linear_logits(
    hidden: Array, kernel: Array, scale: float, transposed: bool, softcap: float | None
) -> Array:
    """``scale * hidden @ kernel``, exact products of the values as `hidden`'s dtype holds them.

    With a softcap c these are z, and the logits are ``c * tanh(z / c)``.
    """
    dtype = precision_of(hidden)
    matrix = kernel.astype(hidden.dtype).astype(dtype)
    equation = "td,vd->tv" if transposed else "td,dv->tv"
    product = jnp.einsum(
        equation, hidden.astype(dtype), matrix, precision=jax.lax.Precision.HIGHEST
    )
    z = scale * product
    return z if softcap is None else softcap * jnp.tanh(z / softcap)


class Distributions(NamedTuple):
    """A row's distributions written out, ``[T, V]`` each."""

    log_p: Array  # the model
    p: Array
    log_q: Array  # the reference with its edits
    q: Array
    onehot: Array  # the target
    present: Array  # 1 where the model does not mask the entry


def log_distribution(logits: Array) -> Array:
    """``log softmax`` with masked entries at a large negative number instead of ``-inf``."""
    return jax.nn.log_softmax(jnp.maximum(logits, MASKED), axis=-1)


def edit_factors(vocab_size: int, ids: Array, factors: Array) -> Array:
    """What multiplies each entry's mass ``[T, V]``: 1 but for the K edited ids (-1: none)."""
    factor = jnp.ones((ids.shape[0], vocab_size), factors.dtype)
    for k in range(ids.shape[1]):
        chosen = jax.nn.one_hot(ids[:, k], vocab_size, dtype=jnp.bool_)
        factor = jnp.where(chosen, factor * factors[:, k : k + 1], factor)
    return factor


def edited_distribution(logits: Array, factor: Array) -> Array:
    """``log q`` with q proportional to ``softmax(logits) * factor``."""
    log_factor = jnp.where(factor > 0, jnp.log(jnp.where(factor > 0, factor, 1.0)), -jnp.inf)
    return log_distribution(logits + log_factor)


def smoothed(q: Array, eps: float, present: Array) -> Array:
    """``(q + eps) / (1 + V eps)``; nothing is added where the model masks the entry."""
    return (q + eps * present) / (1 + q.shape[-1] * eps)


def cross_entropy(t: Array, d: Distributions) -> Array:
    """``-sum t log p``."""
    return -jnp.sum(jnp.where(t > 0, t * d.log_p, 0.0), axis=-1)


def entropy(t: Array) -> Array:
    """``-sum t log t``."""
    return -jnp.sum(jnp.where(t > 0, t * jnp.log(jnp.where(t > 0, t, 1.0)), 0.0), axis=-1)


def forward(t: Array, d: Distributions, divergence: bool) -> Array:
    """``CE(t, p)``, or ``KL(t, p)`` with `divergence`."""
    out = cross_entropy(t, d)
    return out - entropy(t) if divergence else out


def reverse(d: Distributions, eps: float) -> Array:
    """``KL(p, s(q))``."""
    log_s = jnp.log(smoothed(d.q, eps, jnp.ones_like(d.q))) if eps else d.log_q
    return jnp.sum(jnp.where(d.present > 0, d.p * (d.log_p - log_s), 0.0), axis=-1)


def likelihood(d: Distributions) -> Array:
    """``-log p[y]``."""
    return -jnp.sum(jnp.where(d.onehot > 0, d.log_p, 0.0), axis=-1)


def distributions(logits: Array, ref_logits: Array, targets: Array, factor: Array) -> Distributions:
    """Writes a row's distributions out."""
    log_p = log_distribution(logits)
    log_q = edited_distribution(ref_logits, factor)
    return Distributions(
        log_p=log_p,
        p=jnp.exp(log_p),
        log_q=log_q,
        q=jnp.exp(log_q),
        onehot=jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype),
        present=(logits > MASKED).astype(logits.dtype),
    )


def tn_terms(name: str, d: Distributions, eps: float, divergence: bool) -> tuple[Array, Array]:
    """What a kept and a pushed-down token contribute, before alpha."""
    if name == "tnff":
        return forward(d.q, d, divergence), forward(d.q, d, divergence)
    if name == "tnrr":
        return reverse(d, eps), reverse(d, eps)
    if name == "tnrf":
        return forward(smoothed(d.q, eps, d.present), d, divergence), reverse(d, eps)
    if name == "tnfll":
        return likelihood(d), forward(d.q, d, divergence)
    if name == "tnrll":
        target = smoothed(d.onehot, eps, d.present)
        return forward(target, d, divergence), reverse(d, eps)
    raise NotImplementedError(
        f"the dense text has no objective {name!r}: say it in tn_terms of dense.py, or take "
        'another implementation than "reference"'
    )


def unlikelihood(logits: Array, factor: Array) -> Array:
    """``-log(1 - p[N])``, as the normaliser less the normaliser without N."""
    rest = jnp.where(factor > 0, jnp.maximum(logits, MASKED), -jnp.inf)
    return jax.nn.logsumexp(jnp.maximum(logits, MASKED), -1) - jax.nn.logsumexp(rest, -1)


def log_normaliser(logits: Array) -> Array:
    """``log sum exp`` of the logits."""
    return jax.nn.logsumexp(jnp.maximum(logits, MASKED), axis=-1)


def label_smoothed_cross_entropy(d: Distributions, label_smoothing: float) -> Array:
    """T5X's cross-entropy: to the smoothed target, less that target's entropy."""
    size = d.p.shape[-1]
    if label_smoothing == 0.0:
        return likelihood(d)
    off = label_smoothing / (size - 1)
    on = 1.0 - label_smoothing
    target = jnp.where(d.onehot > 0, on, off * d.present)
    constant = -(on * jnp.log(on) + (size - 1) * off * jnp.log(off + 1e-20))
    return cross_entropy(target, d) - constant.astype(d.p.dtype)


def loss(
    objective: str,
    logits: Array,
    ref_logits: Array | None,
    targets: Array,
    weights: Array,
    factor: Array | None,
    *,
    alpha: float,
    smoothing: float,
    z_loss: float,
    divergence: bool,
    label_smoothing: float,
    threshold: float,
) -> tuple[Array, Array]:
    """The loss and its z-loss part ``[T]`` of any objective, before bad ids are marked."""
    no_factor = jnp.ones_like(logits) if factor is None else factor
    base = logits if ref_logits is None else ref_logits
    d = distributions(logits, base, targets, no_factor)
    scale = jnp.ones_like(weights)
    reads_q = (False, False)
    if objective == "ul":
        kept, pushed = likelihood(d), unlikelihood(logits, no_factor)
        reads_q = (False, True)
    elif objective == "nl":
        kept, pushed = likelihood(d), jnp.maximum(-likelihood(d), threshold)
        scale = jnp.abs(weights)
    elif objective == "ce":
        kept = pushed = label_smoothed_cross_entropy(d, label_smoothing)
        scale = weights
    elif objective == "soft_ce":
        kept = pushed = cross_entropy(jnp.exp(base), d)
        reads_q = (True, True)
    elif objective == "kl_forward":
        target = smoothed(d.q, smoothing, d.present) if smoothing else d.q
        kept = pushed = forward(target, d, divergence)
        reads_q = (True, True)
    elif objective == "kl_reverse":
        kept = pushed = reverse(d, smoothing)
        reads_q = (True, True)
    else:
        kept, pushed = tn_terms(objective, d, smoothing, divergence)
        reads_q = (objective not in ("tnfll", "tnrll"), True)
    # With all of q's mass removed there is nothing to move towards.
    empty = jnp.all((no_factor == 0) | (base <= MASKED), axis=-1)
    empty &= jnp.any(base > MASKED, axis=-1)  # else the row itself has no answer
    kept = jnp.where(empty & reads_q[0], 0.0, kept)
    pushed = jnp.where(empty & reads_q[1], 0.0, pushed)
    z_part = z_loss * jnp.square(log_normaliser(logits))
    total = jnp.where(weights < 0, alpha * pushed, kept) + z_part
    return jnp.where(weights == 0, 0.0, scale * total), jnp.where(weights == 0, 0.0, scale * z_part)


def token_statistics(logits: Array, ref_logits: Array | None, targets: Array) -> dict[str, Array]:
    """``log_prob`` and ``entropy``; with a reference ``ref_log_prob`` and ``kl`` too, ``[T]``."""
    ones = jnp.ones_like(logits)
    d = distributions(logits, logits if ref_logits is None else ref_logits, targets, ones)
    out = {
        "log_prob": -likelihood(d),
        "entropy": -jnp.sum(jnp.where(d.present > 0, d.p * d.log_p, 0.0), axis=-1),
    }
    if ref_logits is not None:
        out["ref_log_prob"] = jnp.sum(jnp.where(d.onehot > 0, d.log_q, 0.0), axis=-1)
        out["kl"] = reverse(d, 0.0)
    return out


def policy_gradient(
    of_tokens: dict[str, Array],
    weights: Array,
    advantages: Array,
    old_log_probs: Array | None = None,
    *,
    clip: tuple[float, float] | None,
    kl: str | None,
    kl_coefficient: float,
    entropy_coefficient: float,
) -> dict[str, Array]:
    """PPO's clipped objective with its parts ``[T]``, from `token_statistics`.

    ``min(rho A, clip(rho) A)`` is ``A min(rho, 1 + high)`` where ``A >= 0`` and
    ``A max(rho, 1 - low)`` where ``A < 0``.
    """
    log_prob = of_tokens["log_prob"]
    old = jax.lax.stop_gradient(log_prob) if old_log_probs is None else old_log_probs
    log_ratio = held = log_prob - old
    if clip is not None:
        low, high = jnp.log1p(-clip[0]), jnp.log1p(clip[1])
        held = jnp.where(advantages < 0, jnp.maximum(log_ratio, low), jnp.minimum(log_ratio, high))
    term = -advantages * jnp.exp(held) - entropy_coefficient * of_tokens["entropy"]
    out = {"log_prob": log_prob, "entropy": of_tokens["entropy"], "ratio": jnp.exp(log_ratio)}
    if kl is not None:
        difference = of_tokens["ref_log_prob"] - log_prob
        out["kl"] = {
            "exact": of_tokens["kl"],
            "k1": -difference,
            "k3": jnp.exp(difference) - 1 - difference,
        }[kl]
        if kl_coefficient:
            term += kl_coefficient * out["kl"]
    counts = weights != 0
    clipped = counts & (advantages != 0) & (held != log_ratio)
    weight = jnp.where(weights < 0, jnp.nan, weights)
    return out | {
        "loss": jnp.where(counts, weight * term, 0.0),
        "clipped": clipped.astype(log_prob.dtype),
    }
