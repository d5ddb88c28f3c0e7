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
``zs``    ``e^(z - m)``       log ratio    the reverse divergence, with ``rs`` known before
========= =================== ============ ==========================================

That table is all there is to write: how a tile is summed (`first_look`), how two tiles merge
(`merge`) and the derivative by ``z_j`` (`gradient`) all follow from the two columns. Sums are kept
apart from their maxima because the pair is far more accurate than one log-sum-exp (60 times on rows
whose target leads, `objectives.md`).

Two sums need the row's normalisers first and so a second look (`second_look`): ``rkl``, the reverse
divergence, whose smoothing sits inside a logarithm, and ``sls``, the negated entropy of a smoothed
target. With the row in fast memory the second look costs no traffic. Where it does, only the
reference is looked at first: with ``rs`` known, ``log s(q)`` is known at every entry, and ``rkl``
follows from the sum ``zs`` of log ratios relative to the maxima (`entries`).

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
import math
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Numbers = dict[str, Array]  # name -> [R, 1]

# At or below this a logit is masked. Finite, so that a product with 0 is 0.
FLOOR = -1e30
# A sum of values above this has no part of a masked entry in it, unclamped, that would matter.
_UNCLAMPED = -1e15


class Functions(NamedTuple):
    """What entries go through. A driver may have better ones for its device.

    ``exp`` is given numbers of at most 0, ``log`` positive ones.
    """

    exp: Callable[[Array], Array] = jnp.exp
    log: Callable[[Array], Array] = jnp.log


_XLAS = Functions()


class Sum(NamedTuple):
    """A streamed statistic: the sum of `weight` times `value` over a row."""

    weight: str | None  # "z": e^(z - m), "r": e^(r - rm), None: 1 where z is unmasked
    value: str | None  # "z": z - m, "r": r - rm, "ratio": the two's log ratio, None: 1


SUMS: Mapping[str, Sum] = {
    "s": Sum("z", None),
    "pz": Sum("z", "z"),
    "pr": Sum("z", "r"),
    "rs": Sum("r", None),
    "qz": Sum("r", "z"),
    "qr": Sum("r", "r"),
    "sum_z": Sum(None, "z"),
    "n": Sum(None, None),
    "zs": Sum("z", "ratio"),
}
SECOND_LOOK = ("rkl", "sls")
MAXIMA = ("m", "rm")
MAXIMUM = {"z": "m", "r": "rm"}
_NORMALISER = {"z": "s", "r": "rs", None: "n"}
OF_REFERENCE = ("rs", "qr")  # the sums that read the reference alone
# Which maximum a value is relative to.
_MOVES: Mapping[str | None, str] = {"z": "z", "r": "r", "ratio": "z"}


def with_normalisers(names: frozenset[str]) -> frozenset[str]:
    """Adds the sums that merging or the second look of `names` relies on."""
    needed = {_NORMALISER[SUMS[name].weight] for name in names if name in SUMS}
    if names & set(SECOND_LOOK):
        needed |= {"s", "rs"}
    return names | needed


def _relative(x: Array, maximum: Array) -> Array:
    return jnp.maximum(x - maximum, FLOOR)


# The weights and values of a tile by kind and name: ("weight", "z") is e^(z - m).
Parts = dict[tuple[str, str | None], Array]


class _Tile:
    """The weights and values of one tile, each computed at most once.

    `known` holds those that an earlier look has computed; what is computed here is added to it.
    `unmasked` says that the caller knows every entry of the model to be above `FLOOR`.
    """

    def __init__(
        self,
        z: Array | None,
        r: Array | None,
        numbers: Mapping[str, Array],
        known: Parts | None = None,
        unmasked: bool = False,
        functions: Functions = _XLAS,
    ):
        self._unmasked = unmasked
        self.functions = functions
        self._logits = {of: x for of, x in (("z", z), ("r", r)) if x is not None}
        self._numbers = numbers
        self._cache: Parts = {} if known is None else known

    def _cached(self, key, compute):
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def part(self, kind: str, of: str | None) -> Array:
        return self.value(of) if kind == "value" and of else self.weight(of)

    def value(self, of: str) -> Array:
        x, maximum = self._logits[of], self._numbers[MAXIMUM[of]]
        whole = of == "z" and self._unmasked  # nothing to clamp
        return self._cached(("value", of), lambda: x - maximum if whole else _relative(x, maximum))

    def weight(self, of: str | None) -> Array:
        if of is None:
            return self.weighed(None, jnp.ones_like(self._numbers["m"]))
        # exp(-1e30) is 0, so the clamp of value() would change nothing here.
        maximum = self._numbers[MAXIMUM[of]]
        return self._cached(("weight", of), lambda: self.functions.exp(self._logits[of] - maximum))

    def weighed(self, weight: str | None, x: Array) -> Array:
        """`x` times a weight."""
        if weight is not None:
            return self.weight(weight) * x
        if self._unmasked:
            return x
        return jnp.where(self._logits["z"] > FLOOR, x, jnp.zeros_like(x))  # 0 * FLOOR is not small

    def product(self, sum_: Sum) -> Array:
        if sum_.value is None:
            return self.weight(sum_.weight)
        return self.weighed(sum_.weight, self.value(sum_.value))


def _row_sum(x: Array) -> Array:
    return jnp.sum(x, axis=-1, keepdims=True)


def row_max(x: Array) -> Array:
    """The maxima of rows, `FLOOR` where all of one is masked."""
    return jnp.maximum(jnp.max(x, axis=-1, keepdims=True), FLOOR)


def maxima(z: Array, r: Array | None) -> Numbers:
    """The maxima of a tile."""
    return {"m": row_max(z)} | ({} if r is None else {"rm": row_max(r)})


def row_sums(terms: Numbers) -> Numbers:
    """The sums of terms over a row."""
    return {name: _row_sum(x) for name, x in terms.items()}


def first_terms(
    z: Array | None,
    r: Array | None,
    row: Numbers,
    names: frozenset[str],
    known: Parts | None = None,
    unmasked: bool = False,
    parts: Collection[tuple[str, str | None]] = (),
    functions: Functions = _XLAS,
) -> Numbers:
    """What the sums among `names` add up ``[R, C]``, given the row's maxima.

    Args:
      z: model logits ``[R, C]``, or None for sums of the reference alone.
      r: reference logits ``[R, C]``, edited, or None.
      row: the maxima.
      names: the sums.
      known: see `_Tile`.
      unmasked: see `_Tile`.
      parts: weights and values to leave in `known` whether or not the sums need them.
      functions: what entries go through.
    """
    tile = _Tile(z, r, row, known, unmasked, functions)
    terms = {name: tile.product(sum_) for name, sum_ in SUMS.items() if name in names}
    for kind, of in parts:
        tile.part(kind, of)
    return terms


def first_look(
    z: Array, r: Array | None, names: frozenset[str], functions: Functions = _XLAS
) -> Numbers:
    """The maxima of a tile and its sums among `names`."""
    tops = maxima(z, r)
    return tops | row_sums(first_terms(z, r, tops, names, functions=functions))


def rebase(numbers: Numbers, maxima: Numbers, decay: Mapping[str, Array] | None = None) -> Numbers:
    """The same sums relative to other maxima.

    Args:
      numbers: sums, with the maxima that they are relative to. A maximum that is not among them is
        known beforehand and does not change.
      maxima: by name, the new ``m``, and ``rm`` where there is a reference.
      decay: by name of the maximum, ``e^(old - new)``, where the caller has it already.
    """
    shift = {of: numbers[m] - maxima[m] for of, m in MAXIMUM.items() if m in numbers}
    out = dict(numbers) | maxima
    for name, (weight, value) in SUMS.items():
        if name not in numbers:
            continue
        total = numbers[name]
        moved = _MOVES.get(value)
        if moved in shift:
            total = total + numbers[_NORMALISER[weight]] * shift[moved]
        if weight in shift:
            by = jnp.exp(shift[weight]) if decay is None else decay[MAXIMUM[weight]]
            total = total * by
        out[name] = total
    return out


def merge(a: Numbers, b: Numbers) -> Numbers:
    """The numbers of two tiles of a row taken together: associative and commutative."""
    maxima = {m: jnp.maximum(a[m], b[m]) for m in MAXIMA if m in a}
    # One of the two is relative to the new maximum already, so one exponential serves both.
    gap = {m: jnp.exp(jnp.minimum(a[m], b[m]) - maxima[m]) for m in maxima}
    one = {m: jnp.ones_like(gap[m]) for m in maxima}
    a, b = (
        rebase(x, maxima, {m: jnp.where(x[m] < maxima[m], gap[m], one[m]) for m in maxima})
        for x in (a, b)
    )
    return {name: a[name] if name in maxima else a[name] + b[name] for name in a}


def _log_mass(tile: _Tile, row: Mapping[str, Array], smoothing: float) -> Array:
    """``log s(q)`` of an entry but for what is the row's: no entry is divided by a normaliser."""
    if smoothing == 0.0:
        return tile.value("r")
    return tile.functions.log(tile.weight("r") + smoothing * row["rs"])


def _smoothed_entropy(tile: _Tile, row: Mapping[str, Array], smoothing: float, size: int) -> Array:
    """``s(q) log s(q)`` where the model does not mask, ``s(q) = (q + eps) / (1 + size eps)``."""
    log_total = jnp.log(row["rs"]) + math.log1p(size * smoothing)
    log_s = _log_mass(tile, row, smoothing) - log_total
    # Not e^(log s): its rounding is the same in every entry of a flat row, and adds up.
    per_mass = 1.0 / (row["rs"] * (1.0 + size * smoothing))
    s = (tile.weight("r") + smoothing * row["rs"]) * per_mass
    return tile.weighed(None, s * log_s)


class _SecondTile(_Tile):
    """A tile of a row whose reference's normaliser is known, and with it the log ratio.

    ``log p - log s(q)`` but for what is the same in all of a row, which `objectives.reverse` adds.
    """

    def __init__(
        self,
        z: Array | None,
        r: Array | None,
        row: Numbers,
        smoothing: float,
        known: Parts | None = None,
        unmasked: bool = False,
        functions: Functions = _XLAS,
    ):
        super().__init__(z, r, row, known, unmasked, functions)
        self._smoothing = smoothing

    def value(self, of: str) -> Array:
        if of != "ratio":
            return super().value(of)
        return self._cached(("value", of), self._ratio)

    def _ratio(self) -> Array:
        return super().value("z") - _log_mass(self, self._numbers, self._smoothing)


def terms_beside(
    z: Array,
    r: Array | None,
    row: Numbers,
    names: frozenset[str],
    smoothing: float,
    size: int,
    known: Parts | None = None,
    unmasked: bool = False,
    parts: Collection[tuple[str, str | None]] = (),
    functions: Functions = _XLAS,
) -> Numbers:
    """What sums add up ``[R, C]`` where the reference's are known: ``zs`` and ``sls`` too.

    Takes what `first_terms` takes.
    """
    tile = _SecondTile(z, r, row, smoothing, known, unmasked, functions)
    terms = {name: tile.product(sum_) for name, sum_ in SUMS.items() if name in names}
    if "sls" in names:
        terms["sls"] = _smoothed_entropy(tile, row, smoothing, size)
    for kind, of in parts:
        tile.part(kind, of)
    return terms


def second_terms(
    z: Array,
    r: Array | None,
    row: Numbers,
    names: frozenset[str],
    smoothing: float,
    size: int,
    known: Parts | None = None,
    unmasked: bool = False,
    functions: Functions = _XLAS,
) -> Numbers:
    """What the sums among `SECOND_LOOK` in `names` add up ``[R, C]``, before `second_sums`."""
    sums = {"rkl": "zs", "sls": "sls"}
    asked = frozenset(sums[name] for name in names if name in sums)
    terms = terms_beside(z, r, row, asked, smoothing, size, known, unmasked, functions=functions)
    return {name: terms[sums[name]] for name in sums if name in names}


def finish_second(sums: Numbers, row: Numbers) -> Numbers:
    """The sums of the second look over whole rows, with those that are a mean made one."""
    return sums | ({"rkl": sums["rkl"] / row["s"]} if "rkl" in sums else {})


def second_sums(terms: Numbers, row: Numbers) -> Numbers:
    """The sums among `SECOND_LOOK`, from their terms. They add up across tiles."""
    return finish_second(row_sums(terms), row)


def second_look(
    z: Array,
    r: Array | None,
    row: Numbers,
    names: frozenset[str],
    smoothing: float,
    size: int,
    functions: Functions = _XLAS,
) -> Numbers:
    """The sums among `SECOND_LOOK` in `names`, given the numbers of the whole row."""
    terms = second_terms(z, r, row, names, smoothing, size, functions=functions)
    return second_sums(terms, row)


class _Entries(_SecondTile):
    """Every entry as a tile of its own, relative to itself, or to a `reference` that is known."""

    def __init__(self, z: Array | None, r: Array | None, reference: Numbers, smoothing: float):
        own = {m: jnp.maximum(x, FLOOR) for m, x in (("m", z), ("rm", r)) if x is not None}
        self.maxima = {m: x for m, x in own.items() if m not in reference}
        super().__init__(z, r, own | reference, smoothing)

    def _own(self, of: str | None) -> bool:
        """Whether entries are relative to themselves: masked or not is all there is to them."""
        return of is None or MAXIMUM.get(of) in self.maxima

    def _present(self, of: str | None, then: float, otherwise: float) -> Array:
        logits = self._logits[of or "z"]
        yes, no = (jnp.asarray(x, logits.dtype) for x in (then, otherwise))
        return jnp.where(logits > FLOOR, yes, no)

    def weight(self, of: str | None) -> Array:
        if not self._own(of):
            return super().weight(of)
        return self._cached(("weight", of), lambda: self._present(of, 1.0, 0.0))

    def value(self, of: str) -> Array:
        if not self._own(of):
            return super().value(of)
        return self._cached(("value", of), lambda: self._present(of, 0.0, FLOOR))

    def product(self, sum_: Sum) -> Array:
        if sum_.value == (sum_.weight or "z") and self._own(sum_.value):
            return jnp.zeros_like(self._logits[sum_.value])
        return super().product(sum_)


def entries(
    z: Array | None,
    r: Array | None,
    names: frozenset[str],
    reference: Numbers | None = None,
    smoothing: float = 0.0,
    size: int = 0,
) -> Numbers:
    """The numbers of every entry by itself ``[R, C]``: what a reduction with `merge` starts from.

    Args:
      z: model logits ``[R, C]``.
      r: reference logits ``[R, C]``, edited, or None.
      names: the sums; with `reference` also ``zs`` and ``sls``.
      reference: the finished ``rm`` and ``rs`` of the whole rows, where they are known.
      smoothing: of the reference distribution.
      size: entries in the whole row.
    """
    reference = reference or {}
    tile = _Entries(z, r, reference, smoothing)
    numbers = tile.maxima | {
        name: tile.product(sum_) for name, sum_ in SUMS.items() if name in names
    }
    if "sls" in names:
        numbers["sls"] = _smoothed_entropy(tile, reference, smoothing, size)
    return numbers


def stand(sums: Numbers) -> Array:
    """Where sums taken as if nothing were masked are right: no masked entry, no NaN shows in them.

    Args:
      sums: of whole rows, or of all that is looked at of them; with ``s``.
    """
    right = sums["s"] < jnp.inf
    for name, x in sums.items():
        value = "ratio" if name == "rkl" else SUMS[name].value if name in SUMS else None
        if value in ("z", "ratio"):
            right &= x > _UNCLAMPED
    return right & (sums["rs"] < jnp.inf) if "rs" in sums else right


def _coefficients(row: Numbers, by: Mapping[str, Array]) -> dict[Sum, Array]:
    """The gradient as a table: what multiplies each weight * value, by the product rule."""
    table: dict[Sum, Array] = {}

    def add(weight: str | None, value: str | None, factor: Array) -> None:
        key = Sum(weight, value)
        table[key] = table[key] + factor if key in table else factor

    for name, factor in by.items():
        if name == "rkl":
            per_mass = factor / row["s"]
            add("z", "ratio", per_mass)
            add("z", None, per_mass * (1.0 - row["rkl"]))
        elif name in SUMS:
            weight, value = SUMS[name]
            if weight == "z":
                add("z", value, factor)
            if value == "z" or (weight, value) == ("r", None):
                add(weight, None, factor)
    return table


def gradient(
    z: Array,
    r: Array | None,
    row: Numbers,
    by: Mapping[str, Array],
    is_target: Array | None,
    smoothing: float,
    known: Parts | None = None,
    unmasked: bool = False,
    finite: bool = False,
    functions: Functions = _XLAS,
) -> Array:
    """The gradient of a row's line by its logits: a handful of columns times per-row factors.

    Args:
      z: model logits ``[R, C]``.
      r: reference logits ``[R, C]``, edited, or None.
      row: the numbers of the whole row.
      by: the derivative of the line by each number of the row it reads.
      is_target: ``[R, C]``, true at the row's target, or None where that is not among the columns.
      smoothing: of the reference distribution in ``rkl``.
      known: see `_Tile`.
      unmasked: see `_Tile`.
      finite: whether the caller sees to rows of which nothing is asked (`only_asked`).
      functions: what entries go through.

    Returns:
      ``[R, C]`` in the dtype of the numbers.
    """
    tile = _SecondTile(z, r, row, smoothing, known, unmasked, functions)
    of_weight: dict[str | None, Array] = {}
    for (weight, value), factor in _coefficients(row, by).items():
        more = factor if value is None else factor * tile.value(value)
        of_weight[weight] = of_weight[weight] + more if weight in of_weight else more
    columns = [tile.weighed(weight, factor) for weight, factor in of_weight.items()]
    if is_target is not None and "zy" in by:
        columns.append(jnp.where(is_target, by["zy"], jnp.zeros_like(by["zy"])))
    dz = sum(columns[1:], columns[0])
    return dz if finite else only_asked(dz, by)


def asked(by: Mapping[str, Array]) -> Array:
    """The rows that have a cotangent ``[R, 1]``."""
    return functools.reduce(jnp.logical_or, [factor != 0 for factor in by.values()])


def only_asked(dz: Array, by: Mapping[str, Array]) -> Array:
    """0 for a row without a cotangent: it may hold NaN, and 0 * NaN is not 0."""
    return jnp.where(asked(by), dz, jnp.zeros_like(dz))
