r"""Every objective as one line over a row's statistics: only here is `tnrf` known from `tnff`.

A *term* is a function ``(row, settings) -> [R, 1]`` of a row's statistics (`statistics.py`); an
objective says which term a kept token gets and which a pushed-down one. Nothing else is written
per objective: which statistics it needs is read off by running its line once (`needs`), as is what
each token must bring (`numbers`), and its gradient follows from differentiating the line by the
statistics (`derivatives`) and from the statistics' own derivatives. To add an objective, add an
entry to `OBJECTIVES`: `targeted_negative_loss`, its twin on hidden states and `t5patches edit` take
its name, on every backend. The dense text, which is to share nothing with this, has it once
`dense.tn_terms` says it as a textbook would; until then ``implementation="reference"`` raises.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from t5patches_kernels.core import statistics
from t5patches_kernels.core.statistics import FLOOR, NOTHING_LEFT, Array, Stats


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a user chose, hashable: one compiled program per value."""

    objective: str
    vocab_size: int  # of the whole row, over all shards
    alpha: float = 1.0
    smoothing: float = 0.0
    z_loss: float = 0.0
    divergence: bool = False
    label_smoothing: float = 0.0
    threshold: float = 0.0
    clip: tuple[float, float] | None = None  # of a ratio, below and above 1; None: on policy
    kl: str | None = None  # one of `KLS`; None: a policy without a reference
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0


class Row:
    """The statistics of a row and its token's numbers by name, and what terms build from them."""

    def __init__(self, stats: Mapping[str, Array]):
        self._values = stats

    def __getattr__(self, name: str) -> Array:
        return self._values[name]

    @property
    def log_s(self) -> Array:
        """The model's log-normaliser, relative to m."""
        return jnp.log(self.s)

    @property
    def log_prob(self) -> Array:
        """``log p[y]``."""
        return self.zy - self.log_s

    @property
    def ref_log_prob(self) -> Array:
        """``log q[y]``, of a reference that is not edited."""
        return self.ry - jnp.log(self.rs)

    @property
    def entropy_of_q(self) -> Array:
        """``-sum q log q``."""
        return jnp.log(self.rs) - self.qr / self.rs


Term = Callable[[Row, Settings], Array]

# The second row's statistics where that is the model's own logits without the set N: by the name
# that a term reads, what they are called in a row's statistics.
_REST = {"rest_m": "rm", "rest_s": "rs"}
# The numbers that a term over the reference reads.
_OF_REFERENCE = (
    {"rm", "ry"}
    | statistics.SECOND_PASS.keys()
    | {name for name, sum_ in statistics.SUMS.items() if {"r", "s", "ratio"} & set(sum_)}
)


# --- Terms --------------------------------------------------------------------------------------


def of_q(term: Term) -> Term:
    """A term over the target distribution q: 0 where all of q's mass has been removed."""

    @functools.wraps(term)
    def guarded(row: Row, c: Settings) -> Array:
        return jnp.where(row.rm > NOTHING_LEFT, term(row, c), 0.0)

    return guarded


def likelihood(row: Row, c: Settings) -> Array:
    """``LL = -log p_y``; ``d/dz_j = p_j - [j = y]``."""
    return -row.log_prob


@of_q
def forward(row: Row, c: Settings) -> Array:
    """``CE(q, p)``, or ``KL(q, p)`` with `divergence`; ``d/dz_j = p_j - q_j``."""
    cross_entropy = row.log_s - row.qz / row.rs
    return cross_entropy - row.entropy_of_q if c.divergence else cross_entropy


@of_q
def soft_cross_entropy(row: Row, c: Settings) -> Array:
    """``-sum t log p`` for targets ``t = e^r`` of any sum; ``d/dz_j = p_j sum_i t_i - t_j``."""
    return jnp.exp(row.rm) * (row.rs * row.log_s - row.qz)


@of_q
def smoothed_forward(row: Row, c: Settings) -> Array:
    """``CE(s(q), p)``, or ``KL(s(q), p)`` with `divergence`.

    ``d/dz_j = p_j sum_i s(q)_i - s(q)_j``, the sum over the entries that the model does not mask.
    """
    if c.smoothing == 0.0:
        return forward(row, c)
    total, mass = 1 + c.vocab_size * c.smoothing, 1 + c.smoothing * row.n
    if c.divergence:
        return (mass * (row.log_s - jnp.log(row.rs) - math.log(total)) - row.sqr) / total
    return (mass * row.log_s - row.sqz) / total


@of_q
def reverse(row: Row, c: Settings) -> Array:
    """``KL(p, s(q))``, a divergence already; ``d/dz_j = p_j (log p_j - log s(q)_j - KL)``.

    Unsmoothed, it needs one pass over the row; smoothed, the reference's normaliser first.
    """
    mean = (row.pz - row.pr) / row.s if c.smoothing == 0.0 else row.rkl
    return mean - row.log_s + jnp.log(row.rs) + math.log1p(c.vocab_size * c.smoothing)


def smoothed_likelihood(row: Row, c: Settings) -> Array:
    """``CE(s(onehot y), p)``, or its divergence.

    ``d/dz_j = p_j sum_i t_i - t_j`` with ``t = s(onehot y)``.
    """
    total = 1 + c.vocab_size * c.smoothing
    out = (c.smoothing * (row.n * row.log_s - row.sum_z) - row.log_prob) / total
    if not c.divergence:
        return out
    on, off = (1 + c.smoothing) / total, c.smoothing / total
    return out + on * math.log(on) + (row.n - 1) * (off * math.log(off) if off else 0.0)


def unlikelihood(row: Row, c: Settings) -> Array:
    """``-log(1 - p[N]) = lse(z) - lse(z without N)``: 0 where N is all there is.

    ``d/dz_j = p_j - softmax(z without N)_j``: bounded, unlike ``p_j / (1 - p[N])``.
    """
    term = (row.m - row.rest_m) + jnp.log(row.s / row.rest_s)
    return jnp.where(row.rest_m > NOTHING_LEFT, term, 0.0)


def negated_likelihood(row: Row, c: Settings) -> Array:
    """``max(log p_y, threshold)``; ``d/dz_j = [j = y] - p_j``, 0 below the threshold."""
    return jnp.maximum(row.log_prob, c.threshold)


def label_smoothed(row: Row, c: Settings) -> Array:
    """T5X's cross-entropy: ``CE(t, p) - H(t)``, t the target with its mass partly spread evenly.

    ``d/dz_j = p_j sum_i t_i - t_j``.
    """
    if c.label_smoothing == 0.0:
        return likelihood(row, c)
    off = c.label_smoothing / (c.vocab_size - 1)
    on = 1 - c.label_smoothing
    entropy = -(on * math.log(on) + (c.vocab_size - 1) * off * math.log(off + 1e-20))
    uniform = row.n * row.log_s - row.sum_z
    return (on - off) * -row.log_prob + off * uniform - entropy


def entropy(row: Row, c: Settings) -> Array:
    """``H(p)``; ``d/dz_j = -p_j (log p_j + H)``."""
    return row.log_s - row.pz / row.s


def _k1(row: Row, c: Settings) -> Array:
    return row.log_prob - row.ref_log_prob


def _k3(row: Row, c: Settings) -> Array:
    return jnp.exp(-_k1(row, c)) - 1 + _k1(row, c)


# ``KL(p, q)`` by the name of its estimator: over the whole row, or from the target alone.
KLS: Mapping[str, Term] = {"exact": reverse, "k1": _k1, "k3": _k3}


def _log_ratio(row: Row, c: Settings) -> Array:
    on_policy = c.clip is None
    return row.log_prob - (jax.lax.stop_gradient(row.log_prob) if on_policy else row.old_log_probs)


def _held(row: Row, c: Settings) -> Array:
    """The log-ratio as far as the clip lets the advantage push it."""
    log_ratio = _log_ratio(row, c)
    if c.clip is None:
        return log_ratio
    low, high = c.clip
    least, most = math.log1p(-low) if low < 1 else -math.inf, math.log1p(high)
    above = jnp.where(log_ratio < least, least, log_ratio)
    below = jnp.where(log_ratio > most, most, log_ratio)
    return jnp.where(row.advantages < 0, above, below)


def policy_gradient(row: Row, c: Settings) -> Array:
    """``-min(rho A, clip(rho) A) + kl_coefficient KL(p, q) - entropy_coefficient H(p)``.

    With ``rho = p[y] / p_old[y]`` the first part is ``-A rho``, ``d/dz_j = A rho (p_j - [j = y])``,
    but where A has pushed rho out of the clip: there it is constant. The clip is one of the
    logarithm, so that where it holds, a ratio beyond float32 is neither infinite nor NaN.
    """
    loss = -row.advantages * jnp.exp(_held(row, c))
    if c.kl is not None and c.kl_coefficient:
        loss += c.kl_coefficient * KLS[c.kl](row, c)
    return loss - c.entropy_coefficient * entropy(row, c) if c.entropy_coefficient else loss


# --- Objectives -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Objective:
    """One objective: its terms."""

    kept: Term
    pushed: Term
    # What multiplies a token's loss, by its weight. None: nothing does, and a negative weight says
    # what is left of the target's mass in the second row.
    weigh: Callable[[Array], Array] | None = None
    # Whether `targeted_negative_loss` takes its name; else a public function has it for itself.
    targeted: bool = True
    # Whether a model is trained with it by name.
    for_training: bool = True


_ALONE: Mapping[str, Any] = {"targeted": False, "for_training": False}
OBJECTIVES: Mapping[str, Objective] = {
    "tnff": Objective(forward, forward),
    "tnrr": Objective(reverse, reverse),
    "tnrf": Objective(smoothed_forward, reverse),
    "tnfll": Objective(likelihood, forward),
    "tnrll": Objective(smoothed_likelihood, reverse),
    "ul": Objective(likelihood, unlikelihood, targeted=False),
    "nl": Objective(likelihood, negated_likelihood, weigh=jnp.abs, targeted=False),
    "ce": Objective(label_smoothed, label_smoothed, weigh=lambda w: w, targeted=False),
    "soft_ce": Objective(soft_cross_entropy, soft_cross_entropy, **_ALONE),
    "kl_forward": Objective(smoothed_forward, smoothed_forward, **_ALONE),
    "kl_reverse": Objective(reverse, reverse, **_ALONE),
    "policy_gradient": Objective(
        policy_gradient,
        policy_gradient,
        weigh=lambda w: jnp.where(w < 0, math.nan, w),  # no token is pushed down but by A
        **_ALONE,
    ),
}
# The names to choose from in training, and those of `targeted_negative_loss`: every other list of
# objectives in the repository is made of these two.
TRAINING_OBJECTIVES = tuple(name for name, entry in OBJECTIVES.items() if entry.for_training)
TARGETED_NEGATIVE = tuple(name for name in TRAINING_OBJECTIVES if OBJECTIVES[name].targeted)


def _scale(row: Row, c: Settings) -> Array:
    # A bad id in a token that counts must not pass for a number, in the value or in the gradient.
    weigh = OBJECTIVES[c.objective].weigh or jnp.ones_like
    return jnp.where(row.bad, math.nan, weigh(row.w))


def _z_part(row: Row, c: Settings) -> Array:
    return c.z_loss * jnp.square(row.m + row.log_s) if c.z_loss else jnp.zeros_like(row.s)


def _loss(row: Row, c: Settings) -> Array:
    objective = OBJECTIVES[c.objective]
    kept, pushed = objective.kept(row, c), objective.pushed(row, c)
    term = jnp.where(row.w < 0, c.alpha * pushed, kept)
    return jnp.where(row.w != 0, _scale(row, c) * (term + _z_part(row, c)), 0.0)


def _z_loss(row: Row, c: Settings) -> Array:
    return jnp.where(row.w != 0, _scale(row, c) * _z_part(row, c), 0.0)


def _reported(row: Row, x: Array) -> Array:
    x = jnp.where(row.bad, math.nan, x)
    # An ignored token may have no target and no logits: 0, not NaN.
    return jnp.where((row.w != 0) | jnp.isfinite(x), x, 0.0)


def _log_prob(row: Row, c: Settings) -> Array:
    return _reported(row, row.log_prob)


def _ref_log_prob(row: Row, c: Settings) -> Array:
    return jnp.where(row.bad, math.nan, row.ref_log_prob)


def _ratio(row: Row, c: Settings) -> Array:
    return _reported(row, jnp.exp(_log_ratio(row, c)))


def _clipped(row: Row, c: Settings) -> Array:
    held = (_held(row, c) != _log_ratio(row, c)) & (row.advantages != 0)
    return jnp.where(held & (row.w != 0) & ~row.bad, 1.0, 0.0)


def _kl(row: Row, c: Settings) -> Array:
    assert c.kl is not None
    return _reported(row, KLS[c.kl](row, c))


def _entropy(row: Row, c: Settings) -> Array:
    return _reported(row, entropy(row, c))


_LOSS_LINES: Mapping[str, Term] = {"loss": _loss, "z_loss": _z_loss, "log_prob": _log_prob}
_OTHER_LINES: Mapping[str, Mapping[str, Term]] = {
    "statistics": {"log_prob": _log_prob, "entropy": entropy},
    "pair_statistics": {
        "log_prob": _log_prob,
        "entropy": entropy,
        "ref_log_prob": _ref_log_prob,
        "kl": reverse,
    },
    "policy_gradient": {
        "loss": _loss,
        "log_prob": _log_prob,
        "ratio": _ratio,
        "clipped": _clipped,
        "entropy": _entropy,
    },
}


def lines_of(c: Settings) -> Mapping[str, Term]:
    """What an operation returns for a row: its lines by name."""
    lines = _OTHER_LINES.get(c.objective, _LOSS_LINES)
    return lines if c.kl is None else {**lines, "kl": _kl}


@functools.lru_cache(maxsize=1024)
def reference_of(c: Settings) -> str | None:
    """What the second row is, by what the lines read of it.

    Returns:
      "given": the frozen model's logits. "self": the model's own logits with entries removed, whose
      normaliser therefore carries a gradient too. None: there is no second row.

    Raises:
      NotImplementedError: one term needs the one, another the other.
    """
    read = _reads_of(_all_lines(c, tuple(lines_of(c))))
    of_self, given = read & _REST.keys(), read & _OF_REFERENCE
    if of_self and given:
        raise NotImplementedError(
            f"objective {c.objective!r} reads {sorted(given)} of the reference and "
            f"{sorted(of_self)} of the model's own logits without some ids, and there is one "
            "second row: leave out `unlikelihood` or the terms over q."
        )
    return "self" if of_self else "given" if given else None


# --- What follows from the lines ------------------------------------------------------------------


class _Recorder(dict):
    """Numbers that note which of them a line reads."""

    def __init__(self):
        super().__init__()
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Array:
        self.read.add(name)
        return jnp.ones((1, 1), jnp.bool_ if name == "bad" else jnp.float32)


def _reads_of(line: Callable[[Row], Any]) -> frozenset[str]:
    recorder = _Recorder()
    jax.eval_shape(lambda: line(Row(recorder)))
    return frozenset(recorder.read)


def _all_lines(c: Settings, outputs: tuple[str, ...]) -> Callable[[Row], Any]:
    return lambda row: [lines_of(c)[name](row, c) for name in outputs]


@functools.lru_cache(maxsize=1024)
def _read_by(c: Settings, outputs: tuple[str, ...]) -> frozenset[str]:
    return frozenset(_REST.get(name, name) for name in _reads_of(_all_lines(c, outputs)))


def reads(c: Settings) -> frozenset[str]:
    """Every statistic that the lines of an operation read."""
    return _read_by(c, tuple(lines_of(c)))


@functools.lru_cache(maxsize=1024)
def numbers(c: Settings) -> tuple[str, ...]:
    """What the lines of an operation read of a token besides its weight and its ids, sorted."""
    of_row = statistics.SUMS.keys() | statistics.SECOND_PASS.keys() | {*statistics.MAXIMA}
    return tuple(sorted(reads(c) - of_row - {"zy", "ry", "w", "bad"}))


@functools.lru_cache(maxsize=1024)
def needs(c: Settings) -> frozenset[str]:
    """The statistics that the lines of an operation read, with what those rely on."""
    summed = frozenset(statistics.SUMS) | statistics.SECOND_PASS.keys()
    return statistics.with_normalisers(reads(c) & summed)


def needs_second_pass(c: Settings) -> bool:
    """Whether an operation needs the row's normalisers before it can finish its sums."""
    return bool(needs(c) & statistics.SECOND_PASS.keys())


@functools.lru_cache(maxsize=1024)
def unread(c: Settings, *, pushed: bool) -> frozenset[str]:
    """What a pushed-down token's loss does not read, or a kept one's: the other's term alone."""
    objective = OBJECTIVES.get(c.objective)
    if objective is None:
        return frozenset()
    of_pushed = _reads_of(lambda row: objective.pushed(row, c))
    of_kept = _reads_of(lambda row: objective.kept(row, c))
    own, other = (of_pushed, of_kept) if pushed else (of_kept, of_pushed)
    return frozenset(_REST.get(name, name) for name in other - own)


@functools.lru_cache(maxsize=1024)
def needs_of(c: Settings, *, pushed: bool) -> frozenset[str]:
    """What rows of one kind need: `needs` without what only the other kind's term reads.

    Both have the normalisers, which tell whether a row has an answer.
    """
    others = tuple(name for name in lines_of(c) if name != "loss")
    less = unread(c, pushed=pushed) - _read_by(c, others) - {"s", "rs"}
    return statistics.with_normalisers(needs(c) - less)


def differentiable(c: Settings, outputs: tuple[str, ...]) -> tuple[str, ...]:
    """The numbers that some outputs read and that depend on the model's logits, sorted.

    q and the shape of the row do not.
    """
    of_model = {name for name, sum_ in statistics.SUMS.items() if "z" in sum_}
    own = {"rs"} if reference_of(c) == "self" else set()
    return tuple(sorted(_read_by(c, outputs) & (of_model | own | {"zy", "rkl", "sqz", "sqr"})))


def _unanswered(stats: Stats, c: Settings, output: str) -> Array:
    """Where a token counts and an output has no answer for it ``[R, 1]``.

    An id that the output reads is out of range, or a row that it reads holds NaN or ``+inf`` or has
    nothing unmasked. (What the token's own edits have removed is not masked: see `of_q`.)
    """

    def broken(maximum: Array, total: Array) -> Array:
        # Of NaN a maximum may not tell, of one ``+inf`` a sum: it is 1. NaN compares false.
        return ~((maximum > FLOOR) & (maximum < math.inf) & (total < math.inf))

    read = _read_by(c, (output,))
    out = broken(stats["m"], stats["s"])
    if reference_of(c) == "given" and read & _OF_REFERENCE:
        out |= broken(stats["rm"], stats["rs"])
    if "bad" in read:
        out |= stats["bad"]
    return out & (stats["w"] != 0)


def evaluate(stats: Stats, c: Settings, output: str) -> Array:
    """One output of an operation, from the finished statistics of its rows."""
    rest = {name: stats[of] for name, of in _REST.items() if of in stats}
    value = lines_of(c)[output](Row(stats | rest), c)
    return jnp.where(_unanswered(stats, c, output), math.nan, value)


def derivatives(stats: Stats, c: Settings, cotangents: Mapping[str, Array]) -> Stats:
    """The derivative of the outputs, weighed by their cotangents, by each statistic they read.

    Args:
      stats: the finished statistics of the rows.
      c: the settings.
      cotangents: by output, ``[R, 1]``; outputs left out have none.

    Returns:
      By statistic, ``[R, 1]``: what `statistics.gradient` multiplies the columns by. Exactly 0 for
      a row that no cotangent asks about, whatever its logits hold; NaN where there is no answer.
    """
    inside = {name: stats[name] for name in differentiable(c, tuple(sorted(cotangents)))}

    def outputs(inside: Stats) -> Stats:
        return {name: evaluate({**stats, **inside}, c, name) for name in cotangents}

    (d_stats,) = jax.vjp(outputs, inside)[1](dict(cotangents))
    # A loss does not ask about an ignored row; the log-probability of one may be asked for.
    asked = unanswered = jnp.zeros_like(stats["bad"])
    for name, ct in cotangents.items():
        of_loss = name in ("loss", "z_loss")
        asked |= (ct != 0) & (stats["w"] != 0) if of_loss else ct != 0
        unanswered |= (ct != 0) & _unanswered(stats, c, name)
    if not {*cotangents} <= {"loss", "z_loss"}:
        # Of an ignored row whose logits are no numbers 0 is reported, see `_reported`.
        for x in d_stats.values():
            asked &= (stats["w"] != 0) | (jnp.abs(x) < jnp.inf)
    return {
        name: jnp.where(asked, jnp.where(unanswered, math.nan, x), 0.0)
        for name, x in d_stats.items()
    }


# --- From a tile to finished statistics: what every driver calls ----------------------------------


def finish_reference(stats: Stats) -> Stats:
    """The reference's own ``rm`` and ``rs``, from its sums over whole rows."""
    return {"rm": stats["rm"], "rs": jnp.where(stats["rm"] <= FLOOR, 1.0, stats["rs"])}


def finish(stats: Stats, of_tokens: Stats) -> Stats:
    """Joins the sums of whole rows with what belongs to their tokens.

    Args:
      stats: the sums over the whole row, with ``zy`` (and ``ry`` where there is a reference) the
        target's own logits as they are, as far as they are read; ``[R, 1]`` each.
      of_tokens: the weights ``w``, whether a token has no answer ``bad``, and its `numbers`;
        ``[R, 1]`` each.

    Returns:
      The numbers that every line can be evaluated on. A row with nothing unmasked is bad; a
      reference with no mass left gets a harmless normaliser (`of_q` sees to its terms).
    """
    empty = stats["m"] <= FLOOR
    out = stats | of_tokens | {"bad": of_tokens["bad"] | empty}
    out["s"] = jnp.where(empty, 1.0, stats["s"])
    out["zy"] = jnp.maximum(stats["zy"] - stats["m"], FLOOR)
    if "rm" in stats:
        out |= finish_reference(stats)
        if "ry" in stats:
            out["ry"] = jnp.maximum(stats["ry"] - stats["rm"], FLOOR)
    made_from = {name: sum_ for name, sum_ in statistics.SECOND_PASS.items() if sum_ in stats}
    found = {name: out.pop(sum_) for name, sum_ in made_from.items()}
    out.pop("ss", None)  # it has served to move "sz" from maximum to maximum
    return out | statistics.finish_second_pass(found, out)
