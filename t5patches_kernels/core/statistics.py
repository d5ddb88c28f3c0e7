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
``ss``    ``q + eps``         1            the smoothed reference's mass where ``z`` is unmasked
``sz``    ``q + eps``         ``z - m``    its cross-entropy to the model
``sr``    ``q + eps``         log ratio    its divergence from the model; all three times ``rs``
========= =================== ============ ==========================================

That table is all there is to write: how a tile is summed (`first_pass`), how two tiles merge
(`merge`) and the derivative by ``z_j`` (`gradient`) all follow from the two columns. Sums are kept
apart from their maxima because the pair is far more accurate than one log-sum-exp (60 times on rows
whose target leads).

Three need the row's normalisers first and so a second pass (`second_pass`): ``rkl``, the
reverse divergence, whose smoothing sits inside a logarithm, and for the smoothed reference ``sqz``,
its cross-entropy, and ``sqr``, its divergence. With the row in fast memory the second pass costs no
traffic. Where it does, the first pass reads the reference alone: with ``rs`` known, ``s(q)`` is
known at every entry, and the three follow from sums relative to the maxima (`SECOND_PASS`,
`entries`).

Two are one entry of the row: ``zy`` and ``ry``, the target's logits relative to ``m`` and ``rm``.

**Masked entries.** A logit at or below `FLOOR` (``-inf``, or a mask constant such as ``-1e30``) has
probability 0 and contributes 0 to every sum: values are clamped to `FLOOR`, so that ``0 * -inf`` is
0 and never NaN. Where the *reference* gives such an entry mass that the model masks, the forward
divergence is infinite in exact arithmetic; here it is about ``1e30`` times that mass.

Everything here is a pure function on values, float32 throughout (float64 for float64 input), and
runs on a whole row, in a scan, or inside a Pallas kernel. Per-row statistics have shape ``[R, 1]``,
tiles ``[R, C]``.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Stats = dict[str, Array]  # name -> [R, 1]

# At or below this a logit is masked. Finite, so that a product with 0 is 0.
FLOOR = -1e30
# What is added to a logit to remove it: small enough for a probability of 0 beside any that is
# left, and far above `FLOOR`, also when added more than once, to be told from a masked entry.
REMOVED = -1e26
# A maximum at or below this is of removed entries: nothing else is left of the row.
NOTHING_LEFT = -1e25
# A sum of values above this has no part of a masked entry in it, unclamped, that would matter.
_UNCLAMPED = -1e15


class Functions(NamedTuple):
    """What entries go through. A driver may have better ones for its device.

    ``exp`` is given values of at most 0, ``log`` positive numbers.
    """

    exp: Callable[[Array], Array] = jnp.exp
    log: Callable[[Array], Array] = jnp.log
    per_nat: float = 1.0  # of values, units in a nat: 1 / ln 2 where both are to base 2

    def scaled(self, nats: Array) -> Array:
        """Nats in the unit of values."""
        return nats if self.per_nat == 1.0 else nats * self.per_nat

    def in_nats(self, x: Array) -> Array:
        """The unit of values in nats."""
        return x if self.per_nat == 1.0 else x * (1.0 / self.per_nat)


_XLAS = Functions()


class Sum(NamedTuple):
    """A streamed statistic: the sum of `weight` times `value` over a row."""

    # "z": e^(z - m), "r": e^(r - rm), "s": the latter smoothed, None: 1 where z is unmasked
    weight: str | None
    value: str | None  # "z": z - m, "r": r - rm, "ratio": the two's log ratio, None: 1


SUMS: Mapping[str, Sum] = {
    "zs": Sum("z", "ratio"),  # before "s": that takes the weight as this has made it
    "s": Sum("z", None),
    "pz": Sum("z", "z"),
    "pr": Sum("z", "r"),
    "rs": Sum("r", None),
    "qz": Sum("r", "z"),
    "qr": Sum("r", "r"),
    "sum_z": Sum(None, "z"),
    "n": Sum(None, None),
    "ss": Sum("s", None),
    "sz": Sum("s", "z"),
    "sr": Sum("s", "ratio"),
}
# The numbers that need the row's normalisers, by the sum that they are made from, and by which
# normaliser it is divided.
SECOND_PASS = {"rkl": "zs", "sqz": "sz", "sqr": "sr"}
_PER = {"rkl": "s", "sqz": "rs", "sqr": "rs"}
MAXIMA = ("m", "rm")
MAXIMUM = {"z": "m", "r": "rm"}
_NORMALISER = {"z": "s", "r": "rs", "s": "ss", None: "n"}
OF_REFERENCE = ("rs", "qr")  # the sums that read the reference alone
# Which maximum a value is relative to.
_MOVES: Mapping[str | None, str] = {"z": "z", "r": "r", "ratio": "z"}


def with_normalisers(names: frozenset[str]) -> frozenset[str]:
    """Adds the sums that merging or the second pass of `names` relies on."""
    needed = {_NORMALISER[SUMS[name].weight] for name in names if name in SUMS}
    if names & SECOND_PASS.keys():
        needed |= {"s", "rs"}
    return names | needed


# The weights and values of a tile by kind and name: ("weight", "z") is e^(z - m).
Parts = dict[tuple[str, str | None], Array]  # [R, C]
PRODUCT = ("product", "ratio")  # of the two factors of "zs"
LOG_MASS = ("log", "s")  # log s(q), but for what is the row's


class Tile:
    """A tile of rows with its weights and values, each computed at most once."""

    def __init__(
        self,
        z: Array | None,
        r: Array | None,
        row: Mapping[str, Array],
        smoothing: float = 0.0,
        *,
        known: Parts | None = None,
        unmasked: bool = False,
        functions: Functions = _XLAS,
    ):
        """A tile.

        Args:
          z: model logits ``[R, C]``, or None for sums of the reference alone.
          r: reference logits ``[R, C]``, edited, or None.
          row: the maxima, and what else is known of the rows.
          smoothing: of the reference distribution.
          known: weights and values that an earlier pass has computed; what is computed here is
            added to it.
          unmasked: whether the caller knows every entry of the model to be above `FLOOR`.
          functions: what entries go through.
        """
        self.row = row
        self.smoothing = smoothing
        self.functions = functions
        self._unmasked = unmasked
        self._logits = {of: x for of, x in (("z", z), ("r", r)) if x is not None}
        self._cache: Parts = {} if known is None else known

    def part_or(self, key: tuple[str, str | None], compute: Callable[[], Array]) -> Array:
        """What is known, or is computed and then known."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def part(self, kind: str, of: str | None) -> Array:
        """A weight or a value, by its key in `Parts`."""
        return self.value(of) if kind == "value" and of else self.weight(of)

    def _nats(self, of: str) -> Array:
        return self._logits[of] - self.row[MAXIMUM[of]]

    def value(self, of: str) -> Array:
        """The values of a `Sum`, in the unit of the tile's functions."""
        if of == "ratio":  # log p - log s(q) but for what is the row's, which `reverse` adds
            return self.part_or(("value", of), lambda: self.value("z") - self.log_mass())
        value = self.functions.scaled(self._nats(of))
        if of != "z" or not self._unmasked:
            value = jnp.maximum(value, FLOOR * self.functions.per_nat)
        return self.part_or(("value", of), lambda: value)

    def weight(self, of: str | None) -> Array:
        """The weights of a `Sum`."""
        if of is None:
            return self.weighed(None, jnp.ones_like(self.row["m"]))
        if of == "s":
            even = self.smoothing * self.row["rs"]
            return self.part_or(("weight", of), lambda: self.weight("r") + self.weighed(None, even))

        def power() -> Array:  # exp(-1e30) is 0, so that a value is clamped changes nothing here
            known = self._cache.get(("value", of))
            value = self.functions.scaled(self._nats(of)) if known is None else known
            return self.functions.exp(value)

        return self.part_or(("weight", of), power)

    def log_mass(self) -> Array:
        """``log s(q)`` but for what is the row's: no entry is divided by a normaliser."""
        if self.smoothing == 0.0:
            return self.value("r")
        even = self.smoothing * self.row["rs"]

        def log() -> Array:
            mass = self.weight("s") if self._unmasked else self.weight("r") + even
            return self.functions.log(mass)

        return self.part_or(LOG_MASS, log)

    def weighed(self, weight: str | None, x: Array) -> Array:
        """`x` times a weight."""
        if weight is not None:
            return self.weight(weight) * x
        if self._unmasked:
            return x
        return jnp.where(self._logits["z"] > FLOOR, x, jnp.zeros_like(x))  # 0 * FLOOR is not small

    def weight_of_ratio(self) -> Array:
        """The model's weight where its value is needed too: one is made from the other."""
        self.value("z")
        return self.weight("z")

    def product(self, sum_: Sum) -> Array:
        """What a sum adds up."""
        if sum_.value is None:
            return self.weight(sum_.weight)
        if sum_ == SUMS["zs"]:
            return self.part_or(PRODUCT, lambda: self.weight_of_ratio() * self.value("ratio"))
        return self.weighed(sum_.weight, self.value(sum_.value))


def _row_sum(x: Array) -> Array:
    return jnp.sum(x, axis=-1, keepdims=True)


def row_max(x: Array) -> Array:
    """The maxima of rows, `FLOOR` where all of one is masked."""
    return jnp.maximum(jnp.max(x, axis=-1, keepdims=True), FLOOR)


def maxima(z: Array, r: Array | None) -> Stats:
    """The maxima of a tile."""
    return {"m": row_max(z)} | ({} if r is None else {"rm": row_max(r)})


def row_sums(terms: Stats) -> Stats:
    """The sums of terms over a row."""
    return {name: _row_sum(x) for name, x in terms.items()}


def first_pass(
    z: Array,
    r: Array | None,
    names: frozenset[str],
    functions: Functions = _XLAS,
    known: Mapping[str, Array] = types.MappingProxyType({}),
) -> Stats:
    """The maxima of a tile and its sums among `names`. Maxima may be among what is `known`."""
    tops = {m: known.get(m, x) for m, x in maxima(z, r).items()}
    tile = Tile(z, r, tops, functions=functions)
    if names & SECOND_PASS.keys():
        tile.weight_of_ratio()  # as the second pass computes it: XLA then does it once
    return tops | row_sums(terms(tile, names - SECOND_PASS.keys()))


def terms(
    tile: Tile, names: frozenset[str], parts: Collection[tuple[str, str | None]] = ()
) -> Stats:
    """What sums add up ``[R, C]``.

    Args:
      tile: of rows of which as much is known as the sums need.
      names: the sums.
      parts: weights and values to leave in what is known, whether or not the sums need them.
    """
    out = {name: tile.product(sum_) for name, sum_ in SUMS.items() if name in names}
    for kind, of in parts:
        tile.part(kind, of)
    return out


def in_nats(sums: Stats, functions: Functions) -> Stats:
    """Sums of values in nats, as every line reads them."""
    return {
        name: functions.in_nats(x) if name in SUMS and SUMS[name].value else x
        for name, x in sums.items()
    }


def rebase(
    stats: Stats,
    maxima: Stats,
    decay: Mapping[str, Array] | None = None,
    functions: Functions = _XLAS,
) -> Stats:
    """The same sums relative to other maxima.

    Args:
      stats: sums, with the maxima that they are relative to. A maximum that is not among them is
        known beforehand and does not change.
      maxima: by name, the new ``m``, and ``rm`` where there is a reference.
      decay: by name of the maximum, ``e^(old - new)``, where the caller has it already.
      functions: what entries go through; sums of values are in its unit.
    """
    shift = {of: functions.scaled(stats[m] - maxima[m]) for of, m in MAXIMUM.items() if m in stats}
    if decay is None:
        decay = {MAXIMUM[of]: functions.exp(x) for of, x in shift.items()}
    out = dict(stats) | maxima
    for name, (weight, value) in SUMS.items():
        if name not in stats:
            continue
        total = stats[name]
        moved = _MOVES.get(value)
        if moved in shift:
            total = total + stats[_NORMALISER[weight]] * shift[moved]
        if weight in shift:
            total = total * decay[MAXIMUM[weight]]
        out[name] = total
    return out


def merge(a: Stats, b: Stats) -> Stats:
    """The statistics of two tiles of a row taken together: associative and commutative."""
    maxima = {m: jnp.maximum(a[m], b[m]) for m in MAXIMA if m in a}
    # One of the two is relative to the new maximum already, so one exponential serves both.
    gap = {m: jnp.exp(jnp.minimum(a[m], b[m]) - maxima[m]) for m in maxima}
    one = {m: jnp.ones_like(gap[m]) for m in maxima}
    a, b = (
        rebase(x, maxima, {m: jnp.where(x[m] < maxima[m], gap[m], one[m]) for m in maxima})
        for x in (a, b)
    )
    return {name: a[name] if name in maxima else a[name] + b[name] for name in a}


def second_terms(tile: Tile, names: frozenset[str]) -> Stats:
    """What the statistics of the second pass in `names` add up ``[R, C]``."""
    asked = names & SECOND_PASS.keys()
    found = terms(tile, frozenset(SECOND_PASS[name] for name in asked))
    return {name: found[SECOND_PASS[name]] for name in asked}


def finish_second_pass(
    sums: Stats, row: Mapping[str, Array], functions: Functions = _XLAS
) -> Stats:
    """The statistics of the second pass from sums over whole rows."""
    return {name: functions.in_nats(x) / row[_PER[name]] for name, x in sums.items()}


def second_pass(tile: Tile, names: frozenset[str]) -> Stats:
    """The statistics among `SECOND_PASS` in `names`, of a tile of rows whose sums are known."""
    return finish_second_pass(row_sums(second_terms(tile, names)), tile.row, tile.functions)


class _Entries(Tile):
    """Every entry as a tile of its own, relative to itself, or to a `reference` that is known."""

    def __init__(
        self,
        z: Array | None,
        r: Array | None,
        reference: Stats,
        smoothing: float,
        floor: Array | float,
    ):
        own = {m: jnp.maximum(x, floor) for m, x in (("m", z), ("rm", r)) if x is not None}
        self.maxima = {m: x for m, x in own.items() if m not in reference}
        self.floor = floor
        super().__init__(z, r, own | reference, smoothing)

    def _own(self, of: str) -> bool:
        """Whether entries are relative to themselves: masked or not is all there is to them."""
        return MAXIMUM.get(of) in self.maxima

    def weight(self, of: str | None) -> Array:
        if of is None or not self._own(of):
            return super().weight(of)
        # Not by a comparison: on an H100 XLA stored that for the other sums. 1e-20 times what is
        # between `FLOOR` and the next float32 above it is more than 1.
        above = 1e-20 * (self.maxima[MAXIMUM[of]] - self.floor)
        return self.part_or(("weight", of), lambda: jnp.clip(above, 0.0, 1.0))

    def weighed(self, weight: str | None, x: Array) -> Array:
        if weight is None and self._own("z"):
            return self.weight("z") * x
        return super().weighed(weight, x)

    def value(self, of: str) -> Array:
        if not self._own(of):
            return super().value(of)
        return self.part_or(("value", of), lambda: FLOOR * (1.0 - self.weight(of)))

    def product(self, sum_: Sum) -> Array:
        if sum_.value and sum_.value == (sum_.weight or "z") and self._own(sum_.value):
            return jnp.zeros_like(self._logits[sum_.value])
        return super().product(sum_)


def entries(
    z: Array | None,
    r: Array | None,
    names: frozenset[str],
    reference: Stats | None = None,
    smoothing: float = 0.0,
    floor: Array | float = FLOOR,
) -> Stats:
    """The statistics of each entry by itself ``[R, C]``: what a reduction by `merge` starts from.

    Args:
      z: model logits ``[R, C]``.
      r: reference logits ``[R, C]``, edited, or None.
      names: the sums; with `reference` also those that `SECOND_PASS` is made from.
      reference: the finished ``rm`` and ``rs`` of the whole rows, where they are known.
      smoothing: of the reference distribution.
      floor: `FLOOR`, or an array of it.
    """
    reference = reference or {}
    tile = _Entries(z, r, reference, smoothing, floor)
    return tile.maxima | terms(tile, names)


def reads_logits(name: str) -> bool:
    """Whether a masked entry of the model would show in a number."""
    made_from = SUMS.get(SECOND_PASS.get(name, name))
    return made_from is not None and made_from.value in ("z", "ratio")


def hold_unmasked(sums: Stats) -> Array:
    """Where sums taken as if nothing were masked are right: they show no masked entry and no NaN.

    Args:
      sums: of whole rows, or of the part of them that is summed; with ``s``.
    """
    right = sums["s"] < jnp.inf
    for name, x in sums.items():
        if reads_logits(name):
            right &= x > _UNCLAMPED
    return right & (sums["rs"] < jnp.inf) if "rs" in sums else right


# By what is multiplied: a weight times a value, or "zy", the target's.
Coefficients = dict[Sum | str, Array]


def coefficients(
    row: Mapping[str, Array],
    d_stats: Mapping[str, Array],
    functions: Functions = _XLAS,
) -> Coefficients:
    """The gradient as a table: what multiplies each weight * value, by the product rule.

    Args:
      row: the statistics of the whole row.
      d_stats: the derivative of the line by each statistic of the row it reads.
      functions: what entries go through.
    """
    table: Coefficients = {}

    def add(weight: str | None, value: str | None, factor: Array) -> None:
        key = Sum(weight, value)
        factor = factor if value is None else functions.in_nats(factor)
        table[key] = table[key] + factor if key in table else factor

    for name, factor in d_stats.items():
        if name == "zy":
            table["zy"] = factor
        elif name == "rkl":
            per_mass = factor / row["s"]
            add("z", "ratio", per_mass)
            add("z", None, per_mass * (1.0 - row["rkl"]))
        elif name in ("sqz", "sqr"):
            add("s", None, factor / row["rs"])
        elif name in SUMS:
            weight, value = SUMS[name]
            if weight == "z":
                add("z", value, factor)
            if value == "z" or (weight, value) == ("r", None):
                add(weight, None, factor)
    asked = any_asked(d_stats)  # other rows may hold NaN, and 0 * NaN is not 0
    return {key: jnp.where(asked, x, jnp.zeros_like(x)) for key, x in table.items()}


def any_asked(d_stats: Mapping[Any, Array]) -> Array:
    """The rows that have a cotangent ``[R, 1]``."""
    return functools.reduce(jnp.logical_or, [factor != 0 for factor in d_stats.values()])


def gradient(
    tile: Tile, table: Coefficients, is_target: Array | None, finite: bool = False
) -> Array:
    """The gradient of a row's line by its logits: a handful of columns times per-row factors.

    Args:
      tile: of rows all of whose numbers are known.
      table: the coefficients of the rows.
      is_target: ``[R, C]``, true at the row's target, or None where that is not among the columns.
      finite: whether the caller sees to rows of which nothing is asked: they may hold NaN.

    Returns:
      ``[R, C]`` in the dtype of the numbers.
    """
    columns = []
    for key, factor in table.items():
        if isinstance(key, Sum) and key.value is None:
            columns.append(tile.weighed(key.weight, factor))
        elif isinstance(key, Sum):  # by what a sum has added up, which is there or held
            columns.append(tile.product(key) * factor)
    if is_target is not None and "zy" in table:
        columns.append(jnp.where(is_target, table["zy"], jnp.zeros_like(table["zy"])))
    dz = sum(columns[1:], columns[0])
    return dz if finite else jnp.where(any_asked(table), dz, jnp.zeros_like(dz))
