r"""Losses on pairs of whole answers, from their sequence log-probabilities: plain `jax.numpy`.

A sequence log-probability is the sum of an answer's ``log p[token]``, which `token_statistics`, or
`linear_token_statistics` without logits in memory, gives differentiably::

  log_prob = linear_token_statistics(hidden, kernel, targets).log_prob       # [..., L]
  log_probs = jnp.where(is_answer, log_prob, 0.0).sum(-1)                    # [...]

Everything is computed in float32 (float64 for float64 input), has the shape of what is given, and
is differentiable any number of times. What is said of the reference is a constant.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from t5patches_kernels import checks, dense

Array = jax.Array

OBJECTIVES = ("dpo", "ipo", "npo")


def _checked(**arrays: Array) -> list[Array]:
    """Arrays of one shape in what is computed in; the first gives the shape."""
    (like_name, like), *_ = arrays.items()
    for name, x in arrays.items():
        checks.floats(name, x, float64=True)
        checks.same_shape(name, x, like_name, like)
    return [jnp.asarray(x, dense.precision_of(*arrays.values())) for x in arrays.values()]


def preference_loss(
    chosen_log_probs: Array | None,
    rejected_log_probs: Array,
    ref_chosen_log_probs: Array | None,
    ref_rejected_log_probs: Array,
    *,
    objective: str = "dpo",
    beta: float = 0.1,
) -> Array:
    r"""DPO, IPO or NPO: away from rejected answers, and but for NPO towards chosen ones.

    With the log-ratios ``h = log p(answer) - log q(answer)`` of the policy p and the reference q:

    ========= ============================================== ===================================
    objective loss                                           derivative
    ========= ============================================== ===================================
    ``dpo``   ``-log sigmoid(beta (h_chosen - h_rejected))`` ``-beta sigmoid(-beta (...))``
    ``ipo``   ``(h_chosen - h_rejected - 1 / (2 beta))^2``   ``2 (h_chosen - h_rejected - ...)``
    ``npo``   ``-2 / beta log sigmoid(-beta h_rejected)``    ``2 sigmoid(beta h_rejected)``
    ========= ============================================== ===================================

    Of ``dpo`` and ``ipo`` it is the one by ``h_chosen``, whose negative is that by ``h_rejected``;
    of ``npo`` by ``h_rejected``, the only one it has.

    Args:
      chosen_log_probs: ``[...]`` float32 or bfloat16, of the answers that are preferred, under the
        policy; None for ``npo``, which has none.
      rejected_log_probs: ``[...]``, of the others.
      ref_chosen_log_probs: ``[...]``, the same answers under the reference; None for ``npo``.
      ref_rejected_log_probs: ``[...]``, as well.
      objective: ``"dpo"``, ``"ipo"`` or ``"npo"``. (IPO is for means over an answer's tokens as
        well as for sums: what is given is what is compared.)
      beta: ``> 0``: how much it costs to leave the reference; IPO's paper calls it tau.

    Returns:
      ``[...]`` float32, the loss of each pair.

    Raises:
      ValueError: shapes that do not fit, an unknown objective, a `beta` that is not positive,
        chosen answers given for ``npo`` or missing for another.
      TypeError: dtypes that do not fit, a traced option.

    Example:
      >>> import jax.numpy as jnp
      >>> from t5patches_kernels import preference_loss
      >>> chosen, rejected = jnp.array([-10.0, -12.0]), jnp.array([-12.0, -10.0])
      >>> ref = jnp.array([-11.0, -11.0])
      >>> [f"{x:.4f}" for x in preference_loss(chosen, rejected, ref, ref, beta=0.5)]
      ['0.3133', '1.3133']
      >>> npo = preference_loss(None, rejected, None, ref, objective="npo", beta=0.5)
      >>> [f"{x:.4f}" for x in npo]
      ['1.8963', '3.8963']

    References:
      Eq. 7 of "Direct Preference Optimization" (Rafailov et al., 2023); eq. 17 of "A General
      Theoretical Paradigm to Understand Learning from Human Preferences" (Azar et al., 2023); eq. 3
      of "Negative Preference Optimization" (Zhang et al., 2024).
    """
    checks.one_of("objective", objective, OBJECTIVES)
    beta = checks.number("beta", beta, least=0.0)
    if beta == 0.0:
        raise ValueError("beta must be > 0, got 0.0: with it no answer would matter.")
    named = {
        "rejected_log_probs": rejected_log_probs,
        "ref_rejected_log_probs": ref_rejected_log_probs,
    }
    chosen = {"chosen_log_probs": chosen_log_probs, "ref_chosen_log_probs": ref_chosen_log_probs}
    given = {name: x for name, x in chosen.items() if x is not None}
    if objective == "npo":
        if given:
            raise ValueError(
                f'objective="npo" has no chosen answers, got {" and ".join(given)}: pass None, or '
                'objective="dpo".'
            )
        rejected, ref_rejected = _checked(**named)
        return -2 / beta * jax.nn.log_sigmoid(-beta * _log_ratio(rejected, ref_rejected))
    if len(given) < 2:
        missing = " and ".join(name for name in chosen if name not in given)
        raise ValueError(
            f"objective={objective!r} compares chosen and rejected answers, got {missing}=None: "
            'pass both, or objective="npo" where there are rejected answers alone.'
        )
    rejected, ref_rejected, chosen_, ref_chosen = _checked(**named, **given)
    margin = _log_ratio(chosen_, ref_chosen) - _log_ratio(rejected, ref_rejected)
    if objective == "ipo":
        return jnp.square(margin - 1 / (2 * beta))
    return -jax.nn.log_sigmoid(beta * margin)


def _log_ratio(log_probs: Array, ref_log_probs: Array) -> Array:
    return log_probs - jax.lax.stop_gradient(ref_log_probs)


def pairwise_reward_loss(chosen_rewards: Array, rejected_rewards: Array) -> Array:
    r"""A reward model's loss, ``-log sigmoid(r_chosen - r_rejected)`` (Bradley and Terry).

    ``d/dr_chosen = -sigmoid(r_rejected - r_chosen)``, and the negative of it by ``r_rejected``. A
    reward may be a model's scalar or a scaled sequence log-probability; for a margin m by which
    answers should differ, give ``chosen_rewards - m``.

    Args:
      chosen_rewards: ``[...]`` float32 or bfloat16, of the answers that are preferred.
      rejected_rewards: ``[...]``, of the others.

    Returns:
      ``[...]`` float32, the loss of each pair.

    Raises:
      ValueError: shapes that do not fit.
      TypeError: dtypes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from t5patches_kernels import pairwise_reward_loss
      >>> loss = pairwise_reward_loss(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]))
      >>> [f"{x:.4f}" for x in loss]
      ['0.3133', '1.3133']

    References:
      Eq. 1 of "Training language models to follow instructions with human feedback" (Ouyang et al.,
      2022); the margin is that of "Llama 2" (Touvron et al., 2023), eq. 2.
    """
    chosen, rejected = _checked(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    return -jax.nn.log_sigmoid(chosen - rejected)
