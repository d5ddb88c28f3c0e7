r"""Row statistics: everything an objective may ask of a row of logits, streamed tile by tile.

A row holds the model's logits ``z`` and, where an objective needs them, the reference's logits
``r`` (already edited: removed entries are at ``-inf``). Every statistic is a sum of a *weight*
times a *value* over the row's entries, relative to the row maxima ``m = max z`` and ``rm = max r``:

========= =================== ============ ==========================================
name      weight              value        reads as
========= =================== ============ ==========================================
``s``     ``e^(z - m)``       1            the model's normaliser; ``p = e^(z - m) / s``
``pz``    ``e^(z - m)``       ``z - m``    entropy of ``p``
``pr``    ``e^(z - m)``       ``r - rm``   cross-entropy of ``p`` to the reference
``rs``    ``e^(r - rm)``      1            the reference's normaliser; ``q = e^(r - rm) / rs``
``qz``    ``e^(r - rm)``      ``z - m``    cross-entropy of ``q`` to the model
``qr``    ``e^(r - rm)``      ``r - rm``   entropy of ``q``
``sum_z`` 1 if unmasked       ``z - m``    the uniform part of a smoothed target
``n``     1 if unmasked       1            how many entries the model does not mask
========= =================== ============ ==========================================

That table is all there is to write: how a tile is summed (`first_look`), how two tiles merge
(`merge`) and the derivative by ``z_j`` (`gradient`) all follow from the two columns. Sums are kept
apart from their maxima because the pair is far more accurate than one log-sum-exp (60 times on rows
whose target leads, `objectives.md`).

Two sums need the row's normalisers first and so a second look (`second_look`): ``rkl``, the reverse
divergence, whose smoothing sits inside a logarithm, and ``sls``, the negated entropy of a smoothed
target. With the row in fast memory the second look costs no traffic.

Two numbers are one entry of the row: ``zy`` and ``ry``, the target's logits relative to ``m`` and
``rm``.

**Masked entries.** A logit at or below `FLOOR` (``-inf``, or a mask constant such as ``-1e30``) has
probability 0 and contributes 0 to every sum: values are clamped to `FLOOR`, so that ``0 * -inf`` is
0 and never NaN. Where the *reference* gives such an entry mass that the model masks, the forward
divergence is infinite in exact arithmetic; here it is about ``1e30`` times that mass.

Everything here is a pure function on values, float32 throughout (float64 for float64 input), and
runs on a whole row, in a scan, or inside a Pallas kernel. Per-row numbers have shape ``[R, 1]``,
tiles ``[R, C]``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Numbers = dict[str, Array]  # name -> [R, 1]

# At or below this a logit is masked. Finite, so that a product with 0 is 0.
FLOOR = -1e30


class Sum(NamedTuple):
    """A streamed statistic: the sum of `weight` times `value` over a row."""

    weight: str | None  # "z": e^(z - m), "r": e^(r - rm), None: 1 where z is unmasked
    value: str | None  # "z": z - m, "r": r - rm, None: 1


SUMS: Mapping[str, Sum] = {
    "s": Sum("z", None),
    "pz": Sum("z", "z"),
    "pr": Sum("z", "r"),
    "rs": Sum("r", None),
    "qz": Sum("r", "z"),
    "qr": Sum("r", "r"),
    "sum_z": Sum(None, "z"),
    "n": Sum(None, None),
}
SECOND_LOOK = ("rkl", "sls")
MAXIMA = ("m", "rm")
_MAXIMUM = {"z": "m", "r": "rm"}
_NORMALISER = {"z": "s", "r": "rs", None: "n"}


def with_normalisers(names: frozenset[str]) -> frozenset[str]:
    """Adds the sums that merging or the second look of `names` relies on."""
    needed = {_NORMALISER[SUMS[name].weight] for name in names if name in SUMS}
    if names & set(SECOND_LOOK):
        needed |= {"s", "rs"}
    return names | needed


def _relative(x: Array, maximum: Array) -> Array:
    return jnp.maximum(x - maximum, FLOOR)


class _Tile:
    """The weights and values of one tile, each computed at most once."""

    def __init__(self, z: Array, r: Array | None, numbers: Mapping[str, Array]):
        self._logits = {"z": z} if r is None else {"z": z, "r": r}
        self._numbers = numbers
        self._cache: dict[tuple[str, str | None], Array] = {}

    def _cached(self, key, compute):
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def value(self, of: str) -> Array:
        maximum = self._numbers[_MAXIMUM[of]]
        return self._cached(("value", of), lambda: _relative(self._logits[of], maximum))

    def weight(self, of: str | None) -> Array:
        if of is None:
            return self._cached(
                ("weight", of),
                lambda: (self._logits["z"] > FLOOR).astype(self._numbers["m"].dtype),
            )
        # exp(-1e30) is 0, so the clamp of value() would change nothing here.
        maximum = self._numbers[_MAXIMUM[of]]
        return self._cached(("weight", of), lambda: jnp.exp(self._logits[of] - maximum))

    def product(self, sum_: Sum) -> Array:
        if sum_.value is None:
            return self.weight(sum_.weight)
        if sum_.weight is None:  # 1 * FLOOR is no rounding error: select
            value = self.value(sum_.value)
            return jnp.where(self._logits["z"] > FLOOR, value, jnp.zeros_like(value))
        return self.weight(sum_.weight) * self.value(sum_.value)


def _row_sum(x: Array) -> Array:
    return jnp.sum(x, axis=-1, keepdims=True)


def _row_max(x: Array) -> Array:
    return jnp.maximum(jnp.max(x, axis=-1, keepdims=True), FLOOR)


def first_look(z: Array, r: Array | None, names: frozenset[str]) -> Numbers:
    """The maxima of a tile and its sums among `names`."""
    numbers: Numbers = {"m": _row_max(z)}
    if r is not None:
        numbers["rm"] = _row_max(r)
    tile = _Tile(z, r, numbers)
    for name, sum_ in SUMS.items():
        if name in names:
            numbers[name] = _row_sum(tile.product(sum_))
    return numbers


def rebase(numbers: Numbers, maxima: Numbers) -> Numbers:
    """The same sums relative to other maxima (``m``, and ``rm`` where there is a reference)."""
    shift = {of: numbers[m] - maxima[m] for of, m in _MAXIMUM.items() if m in numbers}
    out = dict(numbers) | maxima
    for name, (weight, value) in SUMS.items():
        if name not in numbers:
            continue
        total = numbers[name]
        if value is not None:
            total = total + numbers[_NORMALISER[weight]] * shift[value]
        out[name] = total if weight is None else total * jnp.exp(shift[weight])
    return out


def merge(a: Numbers, b: Numbers) -> Numbers:
    """The numbers of two tiles of a row taken together: associative and commutative."""
    maxima = {m: jnp.maximum(a[m], b[m]) for m in MAXIMA if m in a}
    a, b = rebase(a, maxima), rebase(b, maxima)
    return {name: a[name] if name in maxima else a[name] + b[name] for name in a}


def _log_smoothed(tile: _Tile, row: Mapping[str, Array], smoothing: float, size: int) -> Array:
    """``log s(q)`` with ``s(q) = (q + smoothing) / (1 + size * smoothing)``."""
    if smoothing == 0.0:
        return tile.value("r") - jnp.log(row["rs"])
    q = tile.weight("r") / row["rs"]
    return jnp.log(q + smoothing) - jnp.log1p(jnp.asarray(size * smoothing, q.dtype))


def _log_ratio(tile: _Tile, row: Mapping[str, Array], smoothing: float, size: int) -> Array:
    """``log p - log s(q)``, the value whose mean under ``p`` is the reverse divergence."""
    return tile.value("z") - jnp.log(row["s"]) - _log_smoothed(tile, row, smoothing, size)


def second_look(
    z: Array, r: Array | None, row: Numbers, names: frozenset[str], smoothing: float, size: int
) -> Numbers:
    """The sums among `SECOND_LOOK` in `names`, given the numbers of the whole row.

    They add up across tiles.
    """
    tile = _Tile(z, r, row)
    numbers = {}
    if "rkl" in names:
        ratio = _log_ratio(tile, row, smoothing, size)
        numbers["rkl"] = _row_sum(tile.weight("z") * ratio) / row["s"]
    if "sls" in names:
        log_s = _log_smoothed(tile, row, smoothing, size)
        numbers["sls"] = _row_sum(jnp.where(z > FLOOR, jnp.exp(log_s) * log_s, 0.0))
    return numbers


def gradient(
    z: Array,
    r: Array | None,
    row: Numbers,
    by: Mapping[str, Array],
    is_target: Array,
    smoothing: float,
    size: int,
) -> Array:
    """The gradient of a row's line by its logits: a handful of columns times per-row factors.

    Args:
      z: model logits ``[R, C]``.
      r: reference logits ``[R, C]``, edited, or None.
      row: the numbers of the whole row.
      by: the derivative of the line by each number of the row it reads.
      is_target: ``[R, C]``, true at the row's target.
      smoothing: of the reference distribution in ``rkl``.
      size: entries in the whole row.

    Returns:
      ``[R, C]`` in the dtype of the numbers.
    """
    tile = _Tile(z, r, row)
    of_p: list[Array] = []  # what multiplies e^(z - m)
    columns: list[Array] = []
    for name, factor in by.items():
        if name == "zy":
            columns.append(jnp.where(is_target, factor, jnp.zeros_like(factor)))
        elif name == "rkl":
            ratio = _log_ratio(tile, row, smoothing, size)
            of_p.append(factor / row["s"] * (ratio - row["rkl"]))
        elif name in SUMS:
            # The product rule on weight * value.
            weight, value = SUMS[name]
            if weight == "z":
                of_p.append(factor if value is None else factor * tile.value(value))
                if value == "z":
                    of_p.append(factor)
            elif value == "z" or value is None:
                columns.append(factor * tile.weight(weight))
    if of_p:
        columns.insert(0, tile.weight("z") * sum(of_p[1:], of_p[0]))
    dz = sum(columns[1:], columns[0])
    # A row without a cotangent may hold NaN, and 0 * NaN is not 0.
    asked = functools.reduce(jnp.logical_or, [factor != 0 for factor in by.values()])
    return jnp.where(asked, dz, jnp.zeros_like(dz))
