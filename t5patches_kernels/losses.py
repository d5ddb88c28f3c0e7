r"""Losses on logits.

Leading dimensions are free, the vocabulary is last. Logits are float32 or bfloat16; every sum is
float32. A token is *kept* where its weight is positive, *pushed down* where it is negative,
*ignored* where it is 0; an ignored token contributes exactly 0 to loss and gradient, whatever its
logits hold. For any other token, logits of which one is NaN or ``+inf``, or all are masked
(``-inf``), give NaN, in the loss and in its whole row of the gradient; so do such logits of the
reference wherever the objective has one, whether or not the token is of the kind that reads it.
(Where the token's own edits remove ids of a reference and nothing is left, there is an answer: 0.)
Losses are per token: reduce them as you like, with any per-token factor.

All functions are differentiable in `logits` by reverse mode, and in nothing else: nothing flows to
the reference, the targets, the weights, the edits, or what else a token brings. Forward mode and
second order raise. They work under `jax.jit`, `jax.vmap`, `jax.checkpoint` and `jax.shard_map`.
With a mesh in the context (`jax.set_mesh`, or T5X's partitioner) each device runs the kernel on its
part of the tokens and of the vocabulary, and per-token sums are all that moves: `mesh_axes` says
which axes split what. (The deprecated ``with mesh:`` alone, without T5X's ``pjit``, does not tell
JAX of the mesh.)

Arguments that they share:

* ``implementation``: None for the best for the device compiled for; or one of `IMPLEMENTATIONS`:
  ``"pallas_tpu"`` and ``"pallas_gpu"`` (the kernels; interpreted where compiled for a CPU),
  ``"xla"`` (streaming, anywhere), ``"reference"`` (dense, also float64, differentiable any number
  of times); or a `BlockSizes` (the GPU kernel, each row over a cluster of thread blocks). One that
  is asked for and cannot run raises. The GPU kernel reads whole rows, so not a vocabulary that is
  split; gradients by anything but ``loss`` are XLA's form on GPUs.
* ``vocab_axis``: inside `jax.shard_map`, the mesh axis over which the last dimension is split, in
  equal parts. Ids are global.
* ``skip_ignored``: True spares the work for ignored tokens, however many they turn out to be when
  the program runs: all that is returned of them is then 0 or False (``log_prob`` and ``correct``,
  of a `PolicyLoss` also ``ratio``, ``kl`` and ``entropy``), and all else is as it was. On hidden
  states those that count are brought together, and chunks of others are left out. On logits an
  ignored token costs the zeros of its gradient: on CPUs and GPUs row by row (XLA's form on GPUs
  reads the first row in its place, which is in the cache), on TPUs where a block of 8 rows
  (bfloat16: 16) has no other, and from 256 tokens (512) on one of 16 (32) where so many fit.
* ``z_loss``: the coefficient c of ``c * logsumexp(logits)^2``, added to each counting token.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from t5patches_kernels import calls, checks
from t5patches_kernels.backends.pallas_gpu.plan import BlockSizes
from t5patches_kernels.calls import Edits, How, Inputs
from t5patches_kernels.core import objectives
from t5patches_kernels.core.objectives import Settings

Array = jax.Array


class TokenLoss(NamedTuple):
    """What a loss returns, per token.

    Attributes:
      loss: ``[...]`` float32; exactly 0 where the token is ignored; includes the z-loss part.
      z_loss: ``[...]`` float32; the z-loss part alone, for logging.
      log_prob: ``[...]`` float32; ``log p[target]`` of every token (0 for an ignored token that has
        none: a target out of range, or NaN logits).
      correct: ``[...]`` bool; whether the target holds the largest logit: accuracy without another
        pass over the logits.
    """

    loss: Array
    z_loss: Array
    log_prob: Array
    correct: Array


class TokenStatistics(NamedTuple):
    """What `token_statistics` returns, per token.

    Attributes:
      log_prob: ``[...]`` float32, ``log p[target]``.
      ref_log_prob: ``[...]`` float32, ``log q[target]`` of the reference, or None without one.
      entropy: ``[...]`` float32, of the model's distribution, in nats.
      kl: ``[...]`` float32, ``KL(p, q)`` of the model from the reference, or None without one.
      correct: ``[...]`` bool, whether the target holds the largest logit.
    """

    log_prob: Array
    ref_log_prob: Array | None
    entropy: Array
    kl: Array | None
    correct: Array


class PolicyLoss(NamedTuple):
    """What `policy_gradient_loss` returns, per token.

    Where a token is ignored, each part is still its own as far as it has one, and else 0; all are 0
    where its target is out of range, and with ``skip_ignored``.

    Attributes:
      loss: ``[...]`` float32; exactly 0 where the token is ignored.
      log_prob: ``[...]`` float32, ``log p[target]``.
      ratio: ``[...]`` float32, ``p[target] / p_old[target]``, before the clip; 1 on policy.
      clipped: ``[...]`` bool, whether the clip holds the ratio, and so no gradient comes from the
        advantage; False where the token is ignored, or its advantage is 0.
      kl: ``[...]`` float32, the divergence from the reference in nats by the estimator asked for,
        before its coefficient; None without a reference.
      entropy: ``[...]`` float32, of the model's distribution in nats, before its coefficient.
    """

    loss: Array
    log_prob: Array
    ratio: Array
    clipped: Array
    kl: Array | None
    entropy: Array


# --- What the functions on logits and those on hidden states share --------------------------------


def run_loss(
    c: Settings,
    inputs: Inputs,
    how: How,
    targets: Array,
    weights: Array | None = None,
    edits: Edits | None = None,
) -> TokenLoss:
    """Runs an operation whose outputs are those of a loss."""
    outputs, correct = calls.call(c, inputs, how, targets, weights, edits)
    return TokenLoss(correct=correct, **outputs)


def targeted_negative_settings(
    size: int, objective: str, alpha: float, smoothing: float, z_loss: float, divergence: bool
) -> Settings:
    """Checks the options of `targeted_negative_loss`."""
    checks.one_of("objective", objective, objectives.TARGETED_NEGATIVE)
    smoothing = checks.number("smoothing", smoothing, least=0.0)
    entry = objectives.OBJECTIVES[objective]
    if objectives.reverse in (entry.kept, entry.pushed):
        checks.smoothing_for_reverse(smoothing, f"objective={objective!r}")
    return Settings(
        objective=objective,
        vocab_size=size,
        alpha=checks.number("alpha", alpha, least=0.0),
        smoothing=smoothing,
        z_loss=checks.number("z_loss", z_loss, least=0.0),
        divergence=checks.flag("divergence", divergence),
    )


def unlikelihood_settings(size: int, alpha: float, z_loss: float) -> Settings:
    """Checks the options of `unlikelihood_loss`."""
    return Settings(
        objective="ul",
        vocab_size=size,
        alpha=checks.number("alpha", alpha, least=0.0),
        z_loss=checks.number("z_loss", z_loss, least=0.0),
    )


def negative_likelihood_settings(
    size: int, alpha: float, threshold: float, z_loss: float
) -> Settings:
    """Checks the options of `negative_likelihood_loss`."""
    return Settings(
        objective="nl",
        vocab_size=size,
        alpha=checks.number("alpha", alpha, least=0.0),
        threshold=checks.number("threshold", threshold),
        z_loss=checks.number("z_loss", z_loss, least=0.0),
    )


def cross_entropy_settings(size: int, label_smoothing: float, z_loss: float) -> Settings:
    """Checks the options of `cross_entropy_loss`."""
    return Settings(
        objective="ce",
        vocab_size=size,
        label_smoothing=checks.label_smoothing(label_smoothing, size),
        z_loss=checks.number("z_loss", z_loss, least=0.0),
    )


def run_policy_gradient(
    inputs: Inputs,
    how: How,
    targets: Array,
    weights: Array | None,
    advantages: Array,
    old_log_probs: Array | None,
    clip: tuple[float, float],
    kl: str,
    kl_coefficient: float,
    entropy_coefficient: float,
) -> PolicyLoss:
    """`policy_gradient_loss` on checked inputs."""
    clip = checks.clip(clip)
    checks.one_of("kl", kl, tuple(objectives.KLS))
    kl_coefficient = checks.number("kl_coefficient", kl_coefficient, least=0.0)
    checks.reference_for_kl(inputs.reference, f"ref_{inputs.name}", kl_coefficient)
    c = Settings(
        objective="policy_gradient",
        vocab_size=calls.vocab_size(inputs, how.vocab_axis),
        clip=None if old_log_probs is None else clip,
        kl=kl if inputs.reference else None,
        kl_coefficient=kl_coefficient,
        entropy_coefficient=checks.number("entropy_coefficient", entropy_coefficient),
    )
    numbers = {"advantages": advantages}
    if old_log_probs is not None:
        numbers["old_log_probs"] = old_log_probs
    outputs, _ = calls.call(c, inputs, how, targets, weights, numbers=numbers)
    clipped = outputs.pop("clipped") > 0
    return PolicyLoss(clipped=clipped, kl=outputs.pop("kl", None), **outputs)


def run_token_statistics(inputs: Inputs, how: How, targets: Array) -> TokenStatistics:
    """`token_statistics` on checked inputs."""
    name = "pair_statistics" if inputs.reference else "statistics"
    c = Settings(name, calls.vocab_size(inputs, how.vocab_axis))
    outputs, correct = calls.call(c, inputs, how, targets)
    return TokenStatistics(
        log_prob=outputs["log_prob"],
        ref_log_prob=outputs.get("ref_log_prob"),
        entropy=outputs["entropy"],
        kl=outputs.get("kl"),
        correct=correct,
    )


# --- Public functions ---------------------------------------------------------------------------


def targeted_negative_loss(
    logits: Array,
    ref_logits: Array,
    targets: Array,
    weights: Array,
    *,
    objective: str = "tnff",
    alpha: float = 1.0,
    smoothing: float = 1e-6,
    z_loss: float = 0.0,
    divergence: bool = False,
    edits: Edits | None = None,
    skip_ignored: bool = False,
    vocab_axis: str | None = None,
    implementation: str | BlockSizes | None = None,
) -> TokenLoss:
    r"""Targeted negative training: towards the reference with unwanted tokens removed.

    With ``p = softmax(logits)``, ``q`` proportional to ``softmax(ref_logits)`` with the target's
    mass multiplied by ``max(0, 1 + w)`` where it is pushed down, and
    ``s(q) = (q + eps) / (1 + V eps)``:

    =========== ======================== ==================================
    objective   kept token               pushed-down token, times ``alpha``
    =========== ======================== ==================================
    ``tnff``    CE(q, p)                 CE(q, p)
    ``tnrr``    KL(p, s(q))              KL(p, s(q))
    ``tnrf``    CE(s(q), p)              KL(p, s(q))
    ``tnfll``   -log p[y]                CE(q, p)
    ``tnrll``   CE(s(onehot y), p)       KL(p, s(q))
    =========== ======================== ==================================

    A token all of whose target mass has been removed has nothing to move towards: its term is 0,
    with gradient 0.

    Args:
      logits: ``[..., V]`` float32 or bfloat16, of the model being trained.
      ref_logits: ``[..., V]`` float32 or bfloat16, of the frozen original model.
      targets: ``[...]`` integer ids.
      weights: ``[...]``; the sign says kept, pushed down or ignored; -1 removes the target, -0.5
        halves its probability, values below -1 remove it too.
      objective: one of ``tnff tnrr tnrf tnfll tnrll``.
      alpha: the factor on pushed-down tokens, ``>= 0``. (T5Patches' own classes: 1e4.)
      smoothing: eps, ``>= 0``; ``> 0`` where the objective has a reverse divergence. Kept
        tokens move to ``s(q)`` as well, ``V eps / (1 + V eps)`` of whose mass is spread over all
        ids: with T5Patches' default 0.03 at T5's vocabulary and 0.2 at Gemma's. ``1e-3 / V`` keeps
        closer (`t5patches edit` takes that). `tnff` and `tnfll` have none.
      z_loss: see the module.
      divergence: report ``KL(q, p)``, which reaches 0, where the default reports T5Patches'
        ``CE(q, p)``. The gradients are the same.
      edits: replaces the one edit that a weight implies by K ids a token, each with its factor; the
        weights still say kept, pushed down or ignored.
      skip_ignored: see the module.
      vocab_axis: see the module.
      implementation: see the module.

    Returns:
      A `TokenLoss`. A target or edited id out of range, or a weight that is not finite, gives NaN
      for its token if it counts.

    Raises:
      ValueError: shapes that do not fit, an unknown objective, an option out of range.
      TypeError: dtypes that do not fit, a traced option.
      NotImplementedError: `implementation` cannot run this, or a derivative that there is none of.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from t5patches_kernels import targeted_negative_loss
      >>> logits = jnp.array([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
      >>> targets, weights = jnp.array([0, 0]), jnp.array([1.0, -1.0])
      >>> out = targeted_negative_loss(logits, logits, targets, weights, alpha=1.0, divergence=True)
      >>> print(out.loss.round(4))  # the kept token is where it should be, the other is not
      [0.     1.0943]
      >>> loss = lambda z: targeted_negative_loss(z, logits, targets, weights, alpha=1.0).loss.sum()
      >>> [f"{g:.3f}" for g in jax.grad(loss)(logits)[1]]  # p - q
      ['0.665', '-0.486', '-0.179']

    References:
      Eq. 2 and the losses of "Towards Minimal Targeted Updates of Language Models with
      Targeted Negative Training" (Zhang et al., 2024); T5Patches' ``TNFFModel``, ``TNRRModel``,
      ``TNRFModel``, ``TNFLLModel``, ``TNRLLModel``. Differs on purpose: see `t5patches.t5x`.
    """
    inputs = calls.logits_inputs(logits, ref_logits, implementation)
    size = calls.vocab_size(inputs, vocab_axis)
    c = targeted_negative_settings(size, objective, alpha, smoothing, z_loss, divergence)
    how = How(skip_ignored, vocab_axis, implementation)
    return run_loss(c, inputs, how, targets, weights, edits)


def unlikelihood_loss(
    logits: Array,
    targets: Array,
    weights: Array,
    *,
    alpha: float = 1.0,
    z_loss: float = 0.0,
    edits: Edits | None = None,
    skip_ignored: bool = False,
    vocab_axis: str | None = None,
    implementation: str | BlockSizes | None = None,
) -> TokenLoss:
    r"""Unlikelihood: ``-log p[y]`` for kept tokens, ``-alpha log(1 - p[N])`` for pushed-down ones.

    N is the target, or with `edits` the set of a token's ids whose factor is 0. Computed as
    ``lse(z) - lse(z without N)``, whose gradient ``p - softmax(z without N)`` stays right however
    sure the model is; T5Patches clips at ``1 - 1e-7``, where it vanishes.

    Args:
      logits: ``[..., V]`` float32 or bfloat16.
      targets: ``[...]`` integer ids.
      weights: ``[...]``; the sign says kept, pushed down or ignored.
      alpha: the factor on pushed-down tokens, ``>= 0``.
      z_loss: see the module.
      edits: the set N of each token; ids with another factor than 0 are not in it.
      skip_ignored: see the module.
      vocab_axis: see the module.
      implementation: see the module.

    Returns:
      A `TokenLoss`. Where N holds all of the mass there is nothing else to say: the term is 0.

    Raises:
      ValueError, TypeError, NotImplementedError: as for `targeted_negative_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> from t5patches_kernels import unlikelihood_loss
      >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
      >>> out = unlikelihood_loss(logits, jnp.array([0]), jnp.array([-1.0]), alpha=1.0)
      >>> print(out.loss.round(4))
      [0.6931]

    References:
      "Neural Text Generation With Unlikelihood Training" (Welleck et al., 2020); T5Patches'
      ``ULModel``.
    """
    inputs = calls.logits_inputs(logits, None, implementation)
    c = unlikelihood_settings(calls.vocab_size(inputs, vocab_axis), alpha, z_loss)
    how = How(skip_ignored, vocab_axis, implementation)
    return run_loss(c, inputs, how, targets, weights, edits)


def negative_likelihood_loss(
    logits: Array,
    targets: Array,
    weights: Array,
    *,
    alpha: float = 1.0,
    threshold: float = -10.3,
    z_loss: float = 0.0,
    skip_ignored: bool = False,
    vocab_axis: str | None = None,
    implementation: str | BlockSizes | None = None,
) -> TokenLoss:
    r"""Negative likelihood: ``-w log p[y]``, held once a pushed-down token is unlikely enough.

    For a pushed-down token, ``alpha |w| max(log p[y], threshold)``: no gradient once ``log p[y]``
    is below the threshold. (T5Patches' threshold, as written, stops confident *kept* tokens.)

    Args:
      logits: ``[..., V]`` float32 or bfloat16.
      targets: ``[...]`` integer ids.
      weights: ``[...]``; the sign says kept, pushed down or ignored; the size multiplies the loss.
      alpha: the factor on pushed-down tokens, ``>= 0``.
      threshold: the log-probability below which a token is left alone, in nats.
      z_loss: see the module; times ``|w|`` too.
      skip_ignored: see the module.
      vocab_axis: see the module.
      implementation: see the module.

    Returns:
      A `TokenLoss`.

    Raises:
      ValueError, TypeError, NotImplementedError: as for `targeted_negative_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> from t5patches_kernels import negative_likelihood_loss
      >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]] * 2))
      >>> out = negative_likelihood_loss(
      ...     logits, jnp.array([0, 0]), jnp.array([1.0, -1.0]), alpha=1.0)
      >>> print(out.loss.round(4))
      [ 0.6931 -0.6931]

    References:
      T5Patches' ``NLModel``.
    """
    inputs = calls.logits_inputs(logits, None, implementation)
    size = calls.vocab_size(inputs, vocab_axis)
    c = negative_likelihood_settings(size, alpha, threshold, z_loss)
    return run_loss(c, inputs, How(skip_ignored, vocab_axis, implementation), targets, weights)


def cross_entropy_loss(
    logits: Array,
    targets: Array,
    weights: Array | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    skip_ignored: bool = False,
    vocab_axis: str | None = None,
    implementation: str | BlockSizes | None = None,
) -> TokenLoss:
    r"""Cross-entropy ``-w log p[y]``, with label smoothing and z-loss as T5X has them.

    With smoothing l the target is ``1 - l`` at y and ``l / (V - 1)`` elsewhere, and the entropy of
    that target is taken off, so that the least loss is 0. The weight multiplies everything.

    Args:
      logits: ``[..., V]`` float32 or bfloat16.
      targets: ``[...]`` integer ids.
      weights: ``[...]`` factors, or None for all 1.
      label_smoothing: l, in [0, 1).
      z_loss: see the module.
      skip_ignored: see the module.
      vocab_axis: see the module.
      implementation: see the module.

    Returns:
      A `TokenLoss`.

    Raises:
      ValueError, TypeError, NotImplementedError: as for `targeted_negative_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> from t5patches_kernels import cross_entropy_loss
      >>> out = cross_entropy_loss(jnp.zeros((2, 8)), jnp.array([3, 5]), jnp.array([1.0, 0.0]))
      >>> print(out.loss.round(4), out.correct)
      [2.0794 0.    ] [ True  True]

    References:
      T5X's ``losses.compute_weighted_cross_entropy``; the z-loss of "PaLM"
      (Chowdhery et al., 2022).
    """
    inputs = calls.logits_inputs(logits, None, implementation)
    c = cross_entropy_settings(calls.vocab_size(inputs, vocab_axis), label_smoothing, z_loss)
    return run_loss(c, inputs, How(skip_ignored, vocab_axis, implementation), targets, weights)


def kl_divergence(
    logits: Array,
    ref_logits: Array,
    *,
    direction: str = "forward",
    edits: Edits | None = None,
    smoothing: float = 0.0,
    vocab_axis: str | None = None,
    implementation: str | BlockSizes | None = None,
) -> Array:
    r"""``KL(s(q), p)`` (forward) or ``KL(p, s(q))`` (reverse) of two rows of raw logits.

    ``p = softmax(logits)``, ``q`` proportional to ``softmax(ref_logits)`` times the edits' factors,
    ``s(q) = (q + eps) / (1 + V eps)``.

    Args:
      logits: ``[..., V]`` float32 or bfloat16, of the model.
      ref_logits: ``[..., V]`` float32 or bfloat16, of the reference.
      direction: ``"forward"`` or ``"reverse"``.
      edits: changes to q, K ids a token.
      smoothing: eps, ``>= 0``; ``> 0`` for the reverse direction with edits.
      vocab_axis: see the module.
      implementation: see the module.

    Returns:
      ``[...]`` float32, in nats; differentiable in `logits`.

    Raises:
      ValueError, TypeError, NotImplementedError: as for `targeted_negative_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> from t5patches_kernels import kl_divergence
      >>> p, q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
      >>> print(kl_divergence(p, q).round(4), kl_divergence(p, q, direction="reverse").round(4))
      0.3681 0.5108
    """
    inputs = calls.logits_inputs(logits, ref_logits, implementation)
    checks.one_of("direction", direction, checks.DIRECTIONS)
    smoothing = checks.number("smoothing", smoothing, least=0.0)
    if direction == "reverse" and edits is not None:
        checks.smoothing_for_reverse(smoothing, 'direction="reverse" with edits')
    size = calls.vocab_size(inputs, vocab_axis)
    c = Settings(f"kl_{direction}", size, smoothing=smoothing, divergence=True)
    how = How(vocab_axis=vocab_axis, implementation=implementation)
    return run_loss(c, inputs, how, calls.no_targets(inputs), edits=edits).loss


def policy_gradient_loss(
    logits: Array,
    ref_logits: Array | None,
    targets: Array,
    weights: Array | None,
    advantages: Array,
    old_log_probs: Array | None = None,
    *,
    clip: tuple[float, float] = (0.2, 0.2),
    kl: str = "exact",
    kl_coefficient: float = 0.0,
    entropy_coefficient: float = 0.0,
    skip_ignored: bool = False,
    vocab_axis: str | None = None,
    implementation: str | BlockSizes | None = None,
) -> PolicyLoss:
    r"""PPO's and GRPO's clipped objective, with a KL penalty and an entropy bonus, in one pass.

    Of a token y of advantage A, with ``p = softmax(logits)``, ``q = softmax(ref_logits)`` and
    ``rho = exp(log p[y] - old_log_prob)``::

      loss = w (-min(rho A, clip(rho, 1 - clip[0], 1 + clip[1]) A)
                + kl_coefficient KL(p, q) - entropy_coefficient H(p))

    The first part has the gradient ``rho A (p_j - [j = y])``, and none where the clip holds: where
    ``A > 0`` and ``rho > 1 + clip[1]``, or ``A < 0`` and ``rho < 1 - clip[0]``. The divergence is

    ========= =================================== =================================================
    ``kl``    value, ``d = log q[y] - log p[y]``  gradient
    ========= =================================== =================================================
    ``exact`` ``sum_j p_j (log p_j - log q_j)``   ``p_j (log p_j - log q_j - KL)``
    ``k1``    ``-d``                              ``[j = y] - p_j``: 0 on average where y is drawn
                                                  from p, so a number to log, not a penalty
    ``k3``    ``exp(d) - 1 - d``                  ``(1 - exp(d)) ([j = y] - p_j)``
    ========= =================================== =================================================

    All of them and the entropy are returned, whatever their coefficients, and are differentiable.

    Args:
      logits: ``[..., V]`` float32 or bfloat16, of the policy.
      ref_logits: ``[..., V]`` float32 or bfloat16, of the reference, or None: then there is no KL.
      targets: ``[...]`` integer ids, the tokens that were sampled.
      weights: ``[...]`` factors w ``>= 0``, 0 for tokens that are ignored (the prompt, padding), or
        None for all 1. A negative one gives NaN: a token is pushed down by its advantage.
      advantages: ``[...]`` floating point; GRPO's, one for a whole answer, is broadcast to it.
      old_log_probs: ``[...]`` floating point, ``log p[y]`` under the policy that y was sampled
        from. None: that is this policy, as in the first update after sampling; the ratio is then 1
        with the gradient of ``log p[y]``, and nothing is clipped.
      clip: how far the ratio may go below 1, in [0, 1], and above, ``>= 0``.
      kl: ``"exact"``, ``"k1"`` or ``"k3"``.
      kl_coefficient: ``>= 0``; more than 0 needs `ref_logits`. It is compiled in: for one that is
        adapted as training goes on, take 0 and add ``w * beta * kl`` (the logits are then read once
        more for the gradient).
      entropy_coefficient: of the bonus.
      skip_ignored: see the module.
      vocab_axis: see the module.
      implementation: see the module.

    Returns:
      A `PolicyLoss`. A target out of range, or a weight, advantage or old log-probability that is
      not finite, gives NaN for its token if it counts. A ratio beyond float32 (``e^88``) that no
      clip holds, as where ``A < 0``, gives an infinite loss.

    Raises:
      ValueError: also a `kl_coefficient` without `ref_logits`.
      TypeError, NotImplementedError: as for `targeted_negative_loss`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from t5patches_kernels import policy_gradient_loss
      >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25]] * 2))
      >>> y, w, a = jnp.array([0, 1]), jnp.ones(2), jnp.array([1.0, -1.0])
      >>> old = jnp.log(jnp.array([0.4, 0.2]))
      >>> out = policy_gradient_loss(logits, None, y, w, a, old)
      >>> print(out.ratio.round(4), out.clipped, [f"{x:.2f}" for x in out.loss])
      [1.25 1.25] [ True False] ['-1.20', '1.25']
      >>> print(jnp.where(out.clipped, w, 0.0).sum() / w.sum())  # the clipped share
      0.5

    References:
      Eq. 7 of "Proximal Policy Optimization Algorithms" (Schulman et al., 2017); with k3 per token
      eq. 3 and 4 of "DeepSeekMath" (Shao et al., 2024), GRPO; a clip that is wider above is the
      "Clip-Higher" of "DAPO" (Yu et al., 2025); the estimators' names are those of "Approximating
      KL Divergence" (Schulman, 2020).
    """
    inputs = calls.logits_inputs(logits, ref_logits, implementation)
    how = How(skip_ignored, vocab_axis, implementation)
    return run_policy_gradient(
        inputs, how, targets, weights, advantages, old_log_probs, clip, kl, kl_coefficient,
        entropy_coefficient,
    )  # fmt: skip


def token_statistics(
    logits: Array,
    targets: Array,
    ref_logits: Array | None = None,
    *,
    vocab_axis: str | None = None,
    implementation: str | BlockSizes | None = None,
) -> TokenStatistics:
    r"""Log-probabilities, entropy and ``KL(p, q)`` from the reference, in one pass.

    What a policy-gradient trainer with a KL penalty needs of its logits.

    Args:
      logits: ``[..., V]`` float32 or bfloat16, of the model.
      targets: ``[...]`` integer ids.
      ref_logits: ``[..., V]`` of the reference, or None.
      vocab_axis: see the module.
      implementation: see the module.

    Returns:
      A `TokenStatistics`; ``log_prob``, ``entropy`` and ``kl`` are differentiable in `logits`. A
      target out of range gives NaN log-probabilities.

    Raises:
      ValueError, TypeError, NotImplementedError: as for `targeted_negative_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> from t5patches_kernels import token_statistics
      >>> out = token_statistics(jnp.zeros((1, 4)), jnp.array([2]))
      >>> print(out.log_prob.round(4), out.entropy.round(4), out.kl)
      [-1.3863] [1.3863] None
    """
    inputs = calls.logits_inputs(logits, ref_logits, implementation)
    how = How(vocab_axis=vocab_axis, implementation=implementation)
    return run_token_statistics(inputs, how, targets)
