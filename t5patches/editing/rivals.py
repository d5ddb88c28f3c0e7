r"""Other methods to make a model stop saying something, as objectives to train with.

For a row of logits z of the model, and r of the original, p = softmax(z), q = softmax(r), and y the
token that was said. What a method does not speak of, it does nothing about: where nothing of an
output is pushed down, `npo` and `undial` stay close to the original, and the others do nothing.

`undial`, `ceu` and `unilogit` are `targeted_negative_loss` under other names; `npo` and `dpo` are
of whole outputs; `ftpo` is a margin between logits, and two tethers.

The loss of an output is that of each of its tokens, so that outputs count by their tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from t5patches.model.protocol import OutputHead
from t5patches_kernels import (
    Edits,
    TokenLoss,
    linear_targeted_negative_loss,
    linear_token_statistics,
    linear_unlikelihood_loss,
    preference_loss,
)

Array = jax.Array


class Chosen(NamedTuple):
    """The corrections of a batch, for `dpo`.

    Attributes:
        targets: [B, L].
        weights: [B, L]; 0 where they do not count.
        hidden: [B, L, D] of the model.
        original_hidden: of the original.
    """

    targets: Array
    weights: Array
    hidden: Array
    original_hidden: Array


class Given(NamedTuple):
    """What a loss reads of a batch.

    Attributes:
        hidden: [B, L, D] of the model.
        head: of the model.
        original_hidden: of the original; the model's own for a method without one.
        original_head: as well.
        targets: [B, L].
        weights: [B, L].
        edits: the sets of the pushed-down tokens; None where it is the token that was said.
        alpha: multiplies the loss of what is pushed down.
        beta: of `undial`, `npo` and `dpo`.
        options: of the linear losses.
        chosen: the corrections; None where nothing asks for them.
    """

    hidden: Array
    head: OutputHead
    original_hidden: Array
    original_head: OutputHead
    targets: Array
    weights: Array
    edits: Edits | None
    alpha: float
    beta: float
    options: Mapping[str, Any]
    chosen: Chosen | None = None


def undial(given: Given) -> TokenLoss:
    """UNDIAL: ``CE(q', p)`` where pushed down, q' of ``r - beta [j = y]``; ``CE(q, p)`` where kept.

    It is `tnff` with a factor ``exp(-beta)`` in the place of 0.
    Dong et al. 2024 (NAACL 2025, arXiv 2402.10052), whose beta is 3, 10 or 30.

    Args:
        given: of the batch.

    Returns:
        The loss of each token.
    """
    left = math.exp(-given.beta)
    edits = given.edits
    if edits is not None:
        edits = Edits(edits.ids, jnp.full_like(edits.factors, left))
    # What a weight leaves of the target is 1 plus the weight.
    weights = jnp.where(given.weights < 0, jnp.float32(left - 1), given.weights)
    return _targeted(given, weights, edits, objective="tnff")


def ceu(given: Given) -> TokenLoss:
    """CE-U: ``CE(p', p)`` where pushed down, p' the model's own p without y, a constant.

    It is `tnff` with the model itself for its original. Yang 2025 (arXiv 2503.01224).

    Args:
        given: of the batch.

    Returns:
        The loss of each token.
    """
    pushed = jnp.minimum(given.weights, 0)
    return _targeted(given, pushed, given.edits, objective="tnff")


def unilogit(given: Given) -> TokenLoss:
    """Unilogit: ``KL(p, p')`` where pushed down, p' the model's own p with ``p'[y] = 1 / V``.

    p' is a constant; with f the factor on y's mass, ``f p[y] / (f p[y] + 1 - p[y]) = 1 / V``. The
    forget loss of Vasilev et al. 2025 (ACL Findings, arXiv 2505.06027).

    Args:
        given: of the batch.

    Returns:
        The loss of each token.
    """
    pushed, kernel = jnp.minimum(given.weights, 0), given.head.kernel
    size = kernel.shape[0 if given.head.transposed else 1]
    options: dict[str, Any] = {**given.options, "z_loss": 0.0}  # the odds are read off the loss
    now = linear_unlikelihood_loss(
        given.hidden, kernel, given.targets, pushed, alpha=1.0, **options
    )
    # log((1 - p[y]) / p[y]), right also where p[y] is near 1; float32 ends at exp(88).
    odds = jax.lax.stop_gradient(-now.loss - now.log_prob)
    factors = jnp.where(pushed < 0, jnp.exp(jnp.minimum(odds, 80)) / (size - 1), 1.0)
    edits = Edits(given.targets[..., None], factors[..., None])
    # Nothing is removed, so nothing needs smoothing: this much is none in float32.
    return _targeted(given, pushed, edits, objective="tnrr", smoothing=1e-30)


def npo(given: Given) -> TokenLoss:
    """NPO: ``-2 / beta log sigmoid(-beta h)`` of an output with anything pushed down.

    h is the sum of ``log p[y] - log q[y]`` over all of it; tokens of other outputs have
    ``KL(q, p)``. Eq. 3 of Zhang et al. 2024 (arXiv 2404.05868), with their KL for what is retained.

    Args:
        given: of the batch.

    Returns:
        The loss of each token.
    """
    own, original = _own_statistics(given), _original_statistics(given)
    counts, rejected = given.weights != 0, _rejected(given)
    of_output = preference_loss(
        None,
        jnp.where(counts, own.log_prob, 0).sum(-1),
        None,
        jnp.where(counts, original.log_prob, 0).sum(-1),
        objective="npo",
        beta=given.beta,
    )
    retained = jnp.where(rejected, 0, given.weights)
    kept = _targeted(given, retained, None, objective="tnff", divergence=True).loss
    loss = jnp.where(rejected, given.alpha * of_output[:, None], kept)
    return _of_tokens(given, loss, own)


def dpo(given: Given) -> TokenLoss:
    """DPO: ``-log sigmoid(beta (h' - h))``, h of an output with anything pushed down.

    h is the sum of ``log p[y] - log q[y]`` over it, h' that over its correction. Eq. 7 of Rafailov
    et al. 2023 (arXiv 2305.18290).

    Args:
        given: of the batch.

    Returns:
        The loss of each token.
    """
    if given.chosen is None:
        raise ValueError("dpo compares with corrections, and the arrays have none (`chosen`)")
    corrected = given._replace(**given.chosen._asdict())
    own = _own_statistics(given)
    sums = [
        jnp.where(of.weights != 0, found.log_prob, 0).sum(-1)
        for of, found in (
            (corrected, _own_statistics(corrected)),
            (given, own),
            (corrected, _original_statistics(corrected)),
            (given, _original_statistics(given)),
        )
    ]
    of_pair = preference_loss(*sums, objective="dpo", beta=given.beta)
    loss = jnp.where(_rejected(given), given.alpha * of_pair[:, None], 0.0)
    return _of_tokens(given, loss, own)


PREFERRED, MIN_P = 8, 0.05
"""`ftpo` prefers so many tokens at most, each at least so likely as the first of them."""

MARGIN, GRACE = 2.0, 1.0
TETHER, TETHER_OF_TARGETS = 0.4, 0.05


def ftpo(given: Given) -> TokenLoss:
    r"""Final token preference optimization: a margin of logits, and a tether to the original's.

    At a pushed-down token y, with chosen tokens C and :math:`\Delta_c = z_c - z_y`,

    .. math::
        \frac{\sum_{c \in C} w_c\, \mathrm{softplus}(\epsilon - \Delta_c)}{\sum_{c \in C} w_c}
        + \lambda\, \overline{(z_j - r_j)^2}_{j \notin C \cup \{y\}}
        + \lambda_t\, \overline{\max(|z_j - r_j| - \tau, 0)^2}_{j \in C \cup \{y\}},
        \qquad w_c = \mathrm{clip}((\epsilon - \Delta_c) / \epsilon, 0, 1)

    (all w 1 where they are all 0), each of the three over all such tokens of the batch together,
    with the defaults of the authors' trainer: epsilon 2, tau 1, lambda 0.4, lambda_t 0.05. Theirs
    are chosen by a sampler that went on from them; here C are the original's likeliest tokens
    outside the set that the data names, at most `PREFERRED`, each at least `MIN_P` times as likely
    as the first of them. Logits are made one output at a time. Paech et al. 2025, "Antislop" (arXiv
    2510.15061).

    Args:
        given: of the batch.

    Returns:
        The loss of each token.
    """
    size = given.head.kernel.shape[0 if given.head.transposed else 1]
    ids = given.targets[..., None] if given.edits is None else given.edits.ids
    forbidden = jnp.concatenate([given.targets[..., None], ids], -1)

    @jax.checkpoint
    def of_output(row: tuple[Array, ...]) -> tuple[Array, ...]:
        hidden, original, targets, forbidden, weights = row
        z = given.head.logits(hidden)
        r = jax.lax.stop_gradient(given.original_head.logits(original))
        at = jnp.arange(len(targets))[:, None]
        ids = jnp.where(forbidden < 0, size, forbidden)  # -1 is no id, and not the last one
        allowed, chosen = jax.lax.top_k(r.at[at, ids].set(-jnp.inf, mode="drop"), PREFERRED)
        is_chosen = (allowed >= allowed[:, :1] + math.log(MIN_P)) & jnp.isfinite(allowed)
        pushed = (weights < 0)[:, None]
        gap = MARGIN - (z[at, chosen] - z[at, targets[:, None]])
        share = jnp.where(is_chosen, jnp.clip(gap / MARGIN, 0, 1), 0.0)
        none = share.sum(-1, keepdims=True) < 1e-12
        share = jnp.where(none, is_chosen.astype(share.dtype), share)
        # A masked logit is masked in both models.
        moved = jnp.where(jnp.isfinite(z) & jnp.isfinite(r), z - r, 0.0)
        free = jnp.concatenate([chosen, targets[:, None]], -1)
        is_free = jnp.concatenate([is_chosen, jnp.ones_like(pushed)], -1)
        of_free = jnp.where(is_free, moved[at, free], 0.0)
        excess = jnp.maximum(jnp.abs(of_free) - GRACE, 0.0)
        others = jnp.square(moved).sum(-1) - jnp.square(of_free).sum(-1)
        parts = (
            (share * jax.nn.softplus(gap)).sum(-1),
            share.sum(-1),
            others,
            size - is_free.sum(-1, dtype=jnp.float32),
            jnp.square(excess).sum(-1),
            is_free.sum(-1, dtype=jnp.float32),
        )
        return tuple(jnp.where(pushed[:, 0], part, 0.0).sum() for part in parts)

    rows = (given.hidden, given.original_hidden, given.targets, forbidden, given.weights)
    sums = [part.sum() for part in jax.lax.map(of_output, rows)]
    means = [a / jnp.maximum(b, 1e-12) for a, b in zip(sums[::2], sums[1::2], strict=True)]
    loss = means[0] + TETHER * means[1] + TETHER_OF_TARGETS * means[2]
    of_pushed = jnp.where(given.weights < 0, given.alpha * loss, 0.0)
    return _of_tokens(given, of_pushed, _own_statistics(given))


def _targeted(given: Given, weights: Array, edits: Edits | None, **changes: Any) -> TokenLoss:
    """The loss that some of the methods are other names of; nothing flows to the original."""
    return linear_targeted_negative_loss(
        given.hidden,
        given.head.kernel,
        given.original_hidden,
        given.original_head.kernel,
        given.targets,
        weights,
        alpha=given.alpha,
        edits=edits,
        **given.options,
        **changes,
    )


def _own_statistics(given: Given) -> Any:
    return _statistics(given, given.hidden, given.head.kernel)


def _original_statistics(given: Given) -> Any:
    return _statistics(given, given.original_hidden, given.original_head.kernel)


def _statistics(given: Given, hidden: Array, kernel: Array) -> Any:
    of_losses = ("z_loss", "skip_ignored")
    options: dict[str, Any] = {k: x for k, x in given.options.items() if k not in of_losses}
    return linear_token_statistics(hidden, kernel, given.targets, **options)


def _rejected(given: Given) -> Array:
    """Which outputs have anything pushed down, [B, 1]."""
    return (given.weights < 0).any(-1, keepdims=True)


def _of_tokens(given: Given, loss: Array, own: Any) -> TokenLoss:
    """A loss as the kernels return theirs: nothing of ignored tokens."""
    counts = given.weights != 0
    return TokenLoss(
        loss=jnp.where(counts, loss, 0.0),
        z_loss=jnp.zeros_like(loss),
        log_prob=jnp.where(counts, own.log_prob, 0.0),
        correct=counts & own.correct,
    )


class Rival(NamedTuple):
    """A method, and what it goes with.

    Attributes:
        loss: of a batch.
        beta: its default; None where it has none.
        original: whether it needs the original.
        keeps: whether it learns from outputs of which nothing is pushed down.
        sets: whether sets of negatives change it.
        z_loss: whether a z-loss is a part of it.
    """

    loss: Callable[[Given], TokenLoss]
    beta: float | None = None
    original: bool = True
    keeps: bool = False
    sets: bool = True
    z_loss: bool = False


RIVALS: Mapping[str, Rival] = {
    "undial": Rival(undial, beta=10.0, keeps=True, z_loss=True),
    "ceu": Rival(ceu, original=False, z_loss=True),
    "unilogit": Rival(unilogit, original=False, sets=False, z_loss=True),
    "npo": Rival(npo, beta=0.1, keeps=True, sets=False),
    "dpo": Rival(dpo, beta=0.1, sets=False),
    "ftpo": Rival(ftpo),
}
