"""Batches of rows of like length, in few shapes: each shape is compiled once.

Padding costs what text costs. Rows go together by length, a batch is as long as its longest row
needs, and a last, small batch has few rows; lengths and numbers of rows are powers of two, or the
largest there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_LEAST = 8


class Group(NamedTuple):
    """Rows to handle at a time.

    Attributes:
        rows: their numbers.
        filled: the same, repeated up to a number of rows that few groups differ in.
        length: of the longest, rounded up.
    """

    rows: np.ndarray
    filled: np.ndarray
    length: int


def round_up(count: int, most: int) -> int:
    """A size that few arrays differ in.

    Args:
        count: what must fit.
        most: the largest size needed.

    Returns:
        A power of two from 8, or `most` where that is less.

    Example:
        >>> [round_up(n, 50) for n in (0, 8, 9, 33)]
        [8, 8, 16, 50]
    """
    return min(most, max(_LEAST, 1 << max(0, count - 1).bit_length()))


def row_lengths(tokens: np.ndarray, pad_id: int) -> np.ndarray:
    """How many tokens each row has before the padding at its end.

    Args:
        tokens: integer [..., L].
        pad_id: fills the ends.

    Returns:
        [...], integers.

    Example:
        >>> row_lengths(np.array([[3, 0, 4, 0], [0, 0, 0, 0]]), pad_id=0).tolist()
        [3, 0]
    """
    position = np.arange(1, tokens.shape[-1] + 1, dtype=np.int32)
    return np.max(np.where(tokens == pad_id, 0, position), axis=-1, initial=0)


def by_length(
    lengths: Sequence[int] | np.ndarray,
    batch_size: int,
    *,
    longest: int | None = None,
    then: np.ndarray | None = None,
) -> list[Group]:
    """Groups rows of like length.

    Args:
        lengths: of the rows.
        batch_size: rows in a group; the last one may have fewer.
        longest: no group is made longer than this; default, the longest row.
        then: [rows], orders those of like length; default, as they come.

    Returns:
        The groups, shortest rows first. Every row is in one of them.

    Example:
        >>> for group in by_length([30, 5, 17, 40, 6], 2):
        ...     print(group.rows, group.filled, group.length)
        [1 4] [1 4] 8
        [0 2] [0 2] 32
        [3] [3 3] 40
    """
    longest = max(lengths, default=0) if longest is None else longest
    rounded = np.array([round_up(int(n), longest) for n in lengths], np.int64)
    order = np.lexsort((np.zeros_like(rounded) if then is None else then, rounded))
    groups = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        filled = np.resize(rows, round_up(len(rows), batch_size))
        groups.append(Group(rows, filled, int(rounded[rows].max())))
    return groups
