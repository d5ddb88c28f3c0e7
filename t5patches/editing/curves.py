"""Closeness against what is left: every method a curve over its strengths, and who wins where."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from t5patches.editing.evaluate import Measure, difference, differs, ratio

Measures = Mapping[str, Measure]
LEFT, AWAY = "prevalence_sampled", "kl"
AT = (10.0, 5.0, 2.0)
"""% of sampled outputs with something unwanted, at which methods are compared."""


def nearest(curve: Sequence[Measures]) -> int:
    """Which strength of a method leaves most nearly the least of `AT`.

    Args:
        curve: measures of its strengths.

    Returns:
        Its number.
    """
    distances = [abs(measures[LEFT].value - AT[-1]) for measures in curve]
    return distances.index(min(distances))


def kl_at(curve: Sequence[Measures], prevalence: float, away: str = AWAY) -> Measure | None:
    r"""The least KL of a curve where no more than a share of its sampled outputs is unwanted.

    It is that of a point, or lies between two neighbouring ones, :math:`(x, y)` and
    :math:`(u, v)`, at :math:`\log y + s \log (v / y)` with :math:`s = (p - x) / (u - x)`.

    Args:
        curve: measures of a method's strengths, from weak to strong.
        prevalence: p, in percent.
        away: the measure that is the KL.

    Returns:
        The KL; its error is of its linear part in the four numbers, over the same examples or
        seeds (the delta method). None where the curve does not come so low.
    """
    points = [(measures[LEFT], measures[away]) for measures in curve]
    found = [kl for left, kl in points if left.value <= prevalence]
    for (x, y), (u, v) in itertools.pairwise(points):
        if min(x.value, u.value) < prevalence < max(x.value, u.value):
            found.append(_between(x, y, u, v, prevalence))
    return min(found, key=lambda measure: measure.value, default=None)


def _between(x: Measure, y: Measure, u: Measure, v: Measure, prevalence: float) -> Measure:
    if not (y.value > 0 and v.value > 0):  # no logarithm: the worse of both
        return max(y, v, key=lambda measure: measure.value)
    width, slope = u.value - x.value, math.log(v.value / y.value)
    share = (prevalence - x.value) / width
    value = y.value * math.exp(share * slope)
    # The derivatives of the value by each of the four numbers.
    parts = [
        (x, -value * (1 - share) * slope / width),
        (u, -value * share * slope / width),
        (y, value * (1 - share) / y.value),
        (v, value * share / v.value),
    ]
    changes = [d * (m.samples - m.value) for m, d in parts if m.samples is not None]
    if len({len(change) for change in changes}) != 1 or len(changes) < len(parts):
        return Measure(value, math.hypot(*(d * m.error for m, d in parts)))
    return ratio(value + np.sum(changes, axis=0))


def who_is_closest(
    curves: Mapping[str, Sequence[Measures]], ours: Collection[str] = (), away: str = AWAY
) -> list[str]:
    """Says which method stays closest where as much is left, and by how much.

    Args:
        curves: by the methods' names.
        ours: methods of one kind; the closest one is also compared with the best of the other.
        away: the measure that is the KL.

    Returns:
        A sentence for each of `AT`, those that say the same as one. A difference is told as
        `t5patches.editing.evaluate.differs` has it, not corrected for the number of comparisons.
    """
    said: dict[str, list[str]] = {}
    for prevalence in AT:
        found = {name: kl_at(curve, prevalence, away) for name, curve in curves.items()}
        reached = {name: kl for name, kl in found.items() if kl is not None}
        said.setdefault(_comparison(reached, ours, len(curves)), []).append(f"{prevalence:g}")
    return [
        f"Where at most {listed(at, 'or')}% of the sampled outputs may have something unwanted, "
        f"{text}."
        for text, at in said.items()
    ]


def _comparison(reached: Mapping[str, Measure], ours: Collection[str], count: int) -> str:
    if not reached:
        return "no method does"
    first, *others = sorted(reached, key=lambda name: reached[name].value)
    parts = [f"{first} is closest to the original: KL {_number(reached[first])}"]
    rival = [name for name in others if (name in ours) != (first in ours)][:1]
    for name in dict.fromkeys([*others[:1], *rival]):
        further = difference(reached[name], reached[first])
        verdict = "" if differs(reached[name], reached[first]) else ", no telling them apart"
        parts.append(f"{name} is {_number(further)} further away{verdict}")
    if len(reached) < count:
        parts.append(f"{count - len(reached)} of {count} methods leave more")
    return "; ".join(parts)


def listed(parts: Sequence[str], word: str = "and") -> str:
    """Puts several things into a sentence.

    Example:
        >>> listed("abc"), listed("ab", "or"), listed("a")
        ('a, b and c', 'a or b', 'a')
    """
    return f" {word} ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _number(measure: Measure) -> str:
    error = "" if math.isnan(measure.error) else f" ± {measure.error:.4f}"
    return f"{measure.value:.4f}{error}"
