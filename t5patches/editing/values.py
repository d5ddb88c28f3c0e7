r"""A value head: what an output is going to score, said before each of its tokens.

The value of a token is :math:`V_t = w \cdot h_t`, where h is the hidden state of the model in
training that predicts it. A token's advantage is by how much more than that comes of it,

.. math:: \delta_t = r_t + \gamma V_{t+1} - V_t, \qquad
    A_t = \delta_t + \gamma \lambda A_{t+1},

with the score as the reward r of the last token, nothing before, and no value after (generalized
advantage estimation). The head learns :math:`R_t = A_t + V_t`, by a squared error that stops where
a value has gone far enough within a step:

.. math:: \frac{1}{2} \max\left[(V_t - R_t)^2,
    (V'_t + \mathrm{clip}(V_t - V'_t, -c, c) - R_t)^2\right]

V' is the value as the output was sampled. Scores are counted from the mean of the first step's, in
their standard deviations: a head that starts at zero has not far to go, whatever scores are like.

Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation", 2016,
arXiv:1506.02438; Schulman et al., 2017, arXiv:1707.06347; Ziegler et al., 2019, arXiv:1909.08593
(scores of mean 0 and variance 1 of the original's outputs). Ouyang et al., 2022, arXiv:2203.02155,
have a second model for the values; here they come from the states of the one in training, as in
TRL.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class ValueHead:
    """How a value head learns, and what advantages are made of it.

    Attributes:
        coefficient: what the loss of the values, a mean over tokens, counts beside the policy's. It
            trains what is below the head too.
        clip: how far a value may go within a step, in standard deviations of the score.
        gamma: what a token later counts, of one now.
        lam: lambda; 1 compares what came with the value, 0 one value with the next.
    """

    coefficient: float = 0.1
    clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95

    def __post_init__(self) -> None:
        """Refuses settings that cannot be trained with."""
        for name in ("coefficient", "clip"):
            number = getattr(self, name)
            if not (math.isfinite(number) and number > 0):
                raise ValueError(f"the value head's {name} is {number}: a number above 0 is needed")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"the value head's {name} is {getattr(self, name)}: a number from 0 to 1 is "
                    "needed"
                )


def generalized_advantages(
    rewards: np.ndarray, values: np.ndarray, weights: np.ndarray, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages of tokens, and what their values are to become, see the module.

    Args:
        rewards: [N], of whole outputs.
        values: [N, L], of their tokens.
        weights: [N, L], above 0 for the tokens of each, which come first.
        gamma: see `ValueHead`.
        lam: see there.

    Returns:
        Both [N, L] float64, 0 behind an output's end.

    Example:
        >>> values, weights = np.array([[0.5, 1.0, 7.0]]), np.array([[1, 1, 0]])
        >>> advantages, returns = generalized_advantages(np.array([2.0]), values, weights, 1.0, 0.5)
        >>> advantages.tolist(), returns.tolist()
        ([[1.0, 1.0, 0.0]], [[1.5, 2.0, 0.0]])
    """
    counts = weights > 0
    values = np.where(counts, values, 0).astype(np.float64)
    gained = gamma * np.pad(values[:, 1:], ((0, 0), (0, 1))) - values
    gained[np.arange(len(values)), counts.sum(1) - 1] += np.where(counts.any(1), rewards, 0)
    advantages = np.zeros_like(values)
    later = np.zeros(len(values))
    for t in reversed(range(values.shape[1])):
        later = gained[:, t] + gamma * lam * later
        advantages[:, t] = later
    return advantages, advantages + values


def whitened(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Numbers of tokens with mean 0 and variance 1 over those that count.

    Args:
        x: [N, L].
        weights: [N, L], above 0 for tokens that count.

    Returns:
        [N, L] float32, 0 where a token does not count; all of them are 0 if all are equal.

    Example:
        >>> whitened(np.array([[1.0, 3.0, 9.0]]), np.array([[1, 1, 0]])).round(2).tolist()
        [[-1.0, 1.0, 0.0]]
    """
    counts = weights > 0
    own = x[counts]
    above = np.where(counts, x - own.mean(), 0)
    return np.asarray(above * (np.ptp(own) > 0) / (own.std() + 1e-4), np.float32)


def explained_variance(values: np.ndarray, returns: np.ndarray, weights: np.ndarray) -> float:
    """The share of what came that was known before it came.

    Args:
        values: [N, L].
        returns: [N, L].
        weights: [N, L], above 0 for tokens that count.

    Returns:
        ``1 - Var(returns - values) / Var(returns)``: 1 for values that are right, 0 for one that is
        the same everywhere, below 0 for worse ones; 0 where nothing varies.

    Example:
        >>> returns = np.array([[1.0, 2.0, 3.0]])
        >>> explained_variance(returns + 5, returns, returns), explained_variance(
        ...     0 * returns, returns, returns)
        (1.0, 0.0)
    """
    counts = weights > 0
    whole = float(returns[counts].var())
    return 1 - float((returns - values)[counts].var()) / whole if whole > 0 else 0.0


def value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, clip: float
) -> jax.Array:
    """The clipped squared error, see the module.

    Args:
        values: [...], as the head has them now.
        old_values: [...], as it had them when the outputs were sampled.
        returns: [...].
        clip: see `ValueHead`.

    Returns:
        [...].
    """
    held = old_values + jnp.clip(values - old_values, -clip, clip)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(held - returns))
