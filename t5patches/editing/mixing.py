"""Several files of examples in one run: how often each, and which example comes when.

Rates go by size with a cap, by size with a temperature, or are given, as T5 and FLAN mix tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def mixing_rates(
    sizes: Sequence[int],
    *,
    cap: int | None = None,
    temperature: float = 1.0,
    rates: Sequence[float] | None = None,
) -> tuple[float, ...]:
    r"""How often each of several sets of examples is drawn from.

    :math:`r_k \propto \min(n_k, \mathrm{cap})^{1 / T}` (Raffel et al. 2020, section 3.5.2). At
    temperature 1 and without a cap all examples are equally likely; a large temperature makes all
    sets equally likely.

    Args:
        sizes: examples in each set.
        cap: a larger set counts as this many; None for no cap. T5 took 2**21, FLAN 3000.
        temperature: T, at least 1.
        rates: given instead, in any unit.

    Returns:
        One rate for each set; they sum to 1.

    Raises:
        ValueError: a set is empty, a number is out of range, or rates are given beside a cap or a
            temperature.

    Example:
        >>> mixing_rates([100, 300])
        (0.25, 0.75)
        >>> mixing_rates([100, 300], cap=100)
        (0.5, 0.5)
        >>> mixing_rates([100, 400], temperature=2)
        (0.3333333333333333, 0.6666666666666666)
        >>> mixing_rates([100, 300], rates=[4, 1])
        (0.8, 0.2)
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"the sizes are {list(sizes)}: at least one set, and no empty one")
    if rates is not None:
        shares = _given(rates, len(sizes), cap, temperature)
    else:
        if cap is not None and cap < 1:
            raise ValueError(f"the cap is {cap}: at least 1 example is needed")
        if not 1 <= temperature < math.inf:
            raise ValueError(f"the temperature is {temperature}: a number from 1 is needed")
        shares = [min(size, cap or size) ** (1 / temperature) for size in sizes]
    return tuple(share / math.fsum(shares) for share in shares)


def with_share(rates: Sequence[float], share: float) -> tuple[float, ...]:
    """Makes room for one more set, whatever its size.

    Args:
        rates: of the other sets, which sum to 1.
        share: of the one more.

    Returns:
        The rates of the others and of this one; they sum to 1.

    Raises:
        ValueError: the share leaves nothing for it or for the others.

    Example:
        >>> with_share([0.25, 0.75], 0.5)
        (0.125, 0.375, 0.5)
    """
    if not 0 < share < 1:
        raise ValueError(
            f"keep_share is {share}: above 0 and below 1 is needed, for both what is kept and what "
            "is marked are to be drawn"
        )
    return (*((1 - share) * rate for rate in rates), share)


def _given(
    rates: Sequence[float], sets: int, cap: int | None, temperature: float
) -> Sequence[float]:
    if cap is not None or temperature != 1:
        raise ValueError(
            "rates are given, and a cap or a temperature too: rates leave nothing for these to do"
        )
    if len(rates) != sets:
        raise ValueError(f"got {len(rates)} rates for {sets} sets of examples: one each is needed")
    if not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"the rates are {list(rates)}: each must be above 0")
    return rates


def mixture_order(
    sizes: Sequence[int], rates: Sequence[float], count: int, seed: int
) -> np.ndarray:
    """Which examples come when in a run over several sets of them.

    Each place draws its set by the rates; a set is walked through in a fresh permutation each time
    it comes round. A longer run begins as a shorter one does.

    Args:
        sizes: examples in each set; the sets lie one after the other in the same arrays.
        rates: of the sets, see `mixing_rates`.
        count: how many places, of all batches together.
        seed: of the draws and the permutations.

    Returns:
        [count] int64, rows of the arrays.

    Example:
        >>> rows = mixture_order([4, 1000], [0.5, 0.5], 640, seed=0)
        >>> int((rows < 4).sum()), sorted(set(rows[rows < 4].tolist()))
        (295, [0, 1, 2, 3])
    """
    drawn = np.random.default_rng(seed).random(count)
    chosen = np.searchsorted(np.cumsum(rates[:-1]), drawn, side="right")
    order = np.empty(count, np.int64)
    start = 0
    for number, size in enumerate(sizes):
        places = np.flatnonzero(chosen == number)
        for epoch, first in enumerate(range(0, len(places), size)):
            now = places[first : first + size]
            rows = np.random.default_rng([seed, number, epoch]).permutation(size)
            order[now] = start + rows[: len(now)]
        start += size
    return order
