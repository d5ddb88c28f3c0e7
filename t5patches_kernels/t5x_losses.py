"""T5X's two cross-entropies, with its signatures, numbers and gradients, on the fused losses.

`cross_entropy_with_logits` and `compute_weighted_cross_entropy` stand for those of `t5x.losses`;
what else that module has stays there. Where behaviour differs on purpose: a target out of range
whose weight is not 0 gives NaN (T5X: a plausible number), `z_loss` and `label_smoothing` must be
Python numbers, and the gradient for soft targets that do not sum to 1 is that of the value (T5X:
that for a sum of 1).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from t5patches_kernels import autodiff, calls, checks, dense, losses
from t5patches_kernels.backends.pallas_gpu.plan import BlockSizes
from t5patches_kernels.calls import How
from t5patches_kernels.core.objectives import Settings
from t5patches_kernels.core.statistics import REMOVED

Array = jax.Array


def cross_entropy_with_logits(
    logits: Array,
    targets: Array,
    z_loss: float = 0.0,
    *,
    implementation: str | BlockSizes | None = None,
) -> tuple[Array, Array]:
    """``-sum targets * log_softmax(logits) + z_loss * logsumexp(logits)^2`` per token.

    Args:
      logits: ``[..., V]`` float32 or bfloat16.
      targets: ``[..., V]`` float32 or bfloat16, non-negative; taken as they are, so that
        distributions that bfloat16 rounds to another sum than 1 count as T5X counts them. (One-hot
        targets: use `compute_weighted_cross_entropy`, which never makes them.)
      z_loss: the coefficient, ``>= 0``.
      implementation: see `losses`.

    Returns:
      The total loss and its z-loss part, ``[...]`` float32, differentiable in both arrays.

    Raises:
      ValueError, TypeError, NotImplementedError: as for `losses.cross_entropy_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> from t5patches_kernels import t5x_losses
      >>> loss, _ = t5x_losses.cross_entropy_with_logits(jnp.zeros((1, 4)), jnp.full((1, 4), 0.25))
      >>> print(loss.round(4))
      [1.3863]

    References:
      ``t5x.losses.cross_entropy_with_logits``.
    """
    float64 = implementation == "reference"
    checks.floats("logits", logits, float64=float64)
    checks.floats("targets", targets, float64=float64)
    checks.same_shape("targets", targets, "logits", logits)
    mass = jax.lax.stop_gradient(targets).astype(dense.precision_of(logits, targets))
    log_targets = jnp.maximum(jnp.log(mass), REMOVED)  # a row of zeros has no mass, and is no error
    inputs = calls.logits_inputs(logits, log_targets, implementation)
    c = Settings(
        "soft_ce",
        calls.vocab_size(inputs, None),
        z_loss=checks.number("z_loss", z_loss, least=0.0),
    )
    how = How(implementation=implementation)
    out = losses.run_loss(c, inputs, how, calls.no_targets(inputs))
    if implementation == "reference":  # a 0 that any derivative by the targets goes through
        log_p = dense.log_distribution(logits.astype(out.loss.dtype))
        none = (targets - jax.lax.stop_gradient(targets)).astype(out.loss.dtype)
        return out.loss - jnp.sum(none * log_p, axis=-1), out.z_loss
    return autodiff.with_gradient_to_targets(out.loss, logits, targets), out.z_loss


def compute_weighted_cross_entropy(
    logits: Array,
    targets: Array,
    weights: Array | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    loss_normalizing_factor: float | Array | None = None,
    *,
    implementation: str | BlockSizes | None = None,
) -> tuple[Array, Array, Array | int]:
    """The weighted sum of a batch's cross-entropies.

    Args:
      logits: ``[..., V]`` float32 or bfloat16.
      targets: ``[...]`` integer ids.
      weights: ``[...]`` factors, or None for all 1.
      label_smoothing: mass spread over the other entries, in [0, 1).
      z_loss: coefficient of ``logsumexp(logits)^2``, ``>= 0``.
      loss_normalizing_factor: divides loss and z-loss, or None.
      implementation: see `losses`.

    Returns:
      The total loss, the total z-loss and the sum of the weights (the number of tokens without
      weights), scalars.

    Raises:
      ValueError, TypeError, NotImplementedError: as for `losses.cross_entropy_loss`.

    Example:
      >>> import jax.numpy as jnp
      >>> from t5patches_kernels import t5x_losses
      >>> loss, z_loss, weight = t5x_losses.compute_weighted_cross_entropy(
      ...     jnp.zeros((2, 3, 4)), jnp.zeros((2, 3), jnp.int32))
      >>> print(loss.round(4), z_loss, weight)
      8.3178 0.0 6

    References:
      ``t5x.losses.compute_weighted_cross_entropy``.
    """
    out = losses.cross_entropy_loss(
        logits,
        targets,
        weights,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        implementation=implementation,
    )
    weight_sum = math.prod(jnp.shape(targets)) if weights is None else jnp.sum(weights)
    total, z_part = jnp.sum(out.loss), jnp.sum(out.z_loss)
    if loss_normalizing_factor is not None:
        total, z_part = total / loss_normalizing_factor, z_part / loss_normalizing_factor
    return total, z_part, weight_sum
