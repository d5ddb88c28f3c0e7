"""Losses for targeted negative training, fused: a row of logits is read once where it fits on chip.

See `losses` for what all functions share, and the README for the table of objectives.
"""

from t5patches_kernels.backends.pallas_gpu.plan import BlockSizes
from t5patches_kernels.calls import Edits
from t5patches_kernels.core.objectives import TARGETED_NEGATIVE, TRAINING_OBJECTIVES
from t5patches_kernels.dispatch import IMPLEMENTATIONS
from t5patches_kernels.linear_losses import (
    linear_cross_entropy_loss,
    linear_negative_likelihood_loss,
    linear_policy_gradient_loss,
    linear_targeted_negative_loss,
    linear_token_statistics,
    linear_unlikelihood_loss,
)
from t5patches_kernels.losses import (
    PolicyLoss,
    TokenLoss,
    TokenStatistics,
    cross_entropy_loss,
    kl_divergence,
    negative_likelihood_loss,
    policy_gradient_loss,
    targeted_negative_loss,
    token_statistics,
    unlikelihood_loss,
)
from t5patches_kernels.preferences import pairwise_reward_loss, preference_loss
from t5patches_kernels.sharding import mesh_axes

__all__ = [
    "IMPLEMENTATIONS",
    "TARGETED_NEGATIVE",
    "TRAINING_OBJECTIVES",
    "BlockSizes",
    "Edits",
    "PolicyLoss",
    "TokenLoss",
    "TokenStatistics",
    "cross_entropy_loss",
    "kl_divergence",
    "linear_cross_entropy_loss",
    "linear_negative_likelihood_loss",
    "linear_policy_gradient_loss",
    "linear_targeted_negative_loss",
    "linear_token_statistics",
    "linear_unlikelihood_loss",
    "mesh_axes",
    "negative_likelihood_loss",
    "pairwise_reward_loss",
    "policy_gradient_loss",
    "preference_loss",
    "targeted_negative_loss",
    "token_statistics",
    "unlikelihood_loss",
]
