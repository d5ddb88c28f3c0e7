"""The tokens in which two sequences differ, in TensorFlow.

All sequences are one-dimensional, may end in padding (0), and may differ in length. Padding is
never part of a difference. (T5Patches: `t5patches.feature_converters_utils`, whose first difference
may be padding.)
"""

from __future__ import annotations

import tensorflow as tf

ALIGNMENTS = ("positional", "tokens")


def non_padding(sequence: tf.Tensor) -> tf.Tensor:
    """1 at tokens and 0 at padding, whose id is 0.

    Args:
        sequence: ids.

    Returns:
        int32 of the same shape.
    """
    return tf.cast(tf.not_equal(sequence, 0), tf.int32)


def length_without_padding(sequence: tf.Tensor) -> tf.Tensor:
    """The length up to the last token that is not padding.

    Args:
        sequence: [length] ids.

    Returns:
        [] int32.
    """
    return tf.reduce_max(
        tf.concat([[0], non_padding(sequence) * (tf.range(tf.size(sequence)) + 1)], 0)
    )


def check_alignment(alignment: str) -> str:
    """Raises unless `alignment` is one of `ALIGNMENTS`.

    Args:
        alignment: the user's option.

    Returns:
        `alignment`.

    Raises:
        ValueError: it is not one of `ALIGNMENTS`.
    """
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment must be one of {ALIGNMENTS}, got {alignment!r}")
    return alignment


def get_diff_mask(
    seq1: tf.Tensor, seq2: tf.Tensor, alignment: str = "positional", cut: tf.Tensor | bool = False
) -> tf.Tensor:
    """The mask of the tokens of `seq1` that differ from `seq2`.

    Args:
        seq1: [length] ids.
        seq2: [any length] ids.
        alignment: with `"positional"` a token differs unless `seq2` has the same one at the same
            position, so that all tokens after an inserted one differ. With `"tokens"` those
            outside a longest common subsequence differ.
        cut: [] bool: whether the end of `seq2` may have been cut off. Then no token of `seq1` that
            may have been the same as one cut off differs: with `"tokens"` none behind the last
            common one, with `"positional"` none beyond the end of `seq2`. The last token of `seq2`
            is left out, as it may be an EOS that was put behind the cut
            (`seqio.preprocessors.append_eos_after_trim`), with `"positional"` if `seq1` is longer.

    Returns:
        [length] int32 of 0 and 1.

    Raises:
        ValueError: `alignment` is neither.

    Example:
        >>> get_diff_mask([5, 6, 9, 7, 1], [5, 6, 7, 1]).numpy().tolist()
        [0, 0, 1, 1, 1]
        >>> get_diff_mask([5, 6, 9, 7, 1], [5, 6, 7, 1], alignment="tokens").numpy().tolist()
        [0, 0, 1, 0, 0]
        >>> get_diff_mask([5, 9, 7, 8, 1], [5, 2, 2, 7, 8], "tokens", cut=True).numpy().tolist()
        [0, 1, 0, 0, 0]
        >>> get_diff_mask([5, 9, 7, 8, 3], [5, 6, 1], cut=True).numpy().tolist()
        [0, 1, 0, 0, 0]
    """
    seq1, seq2 = tf.convert_to_tensor(seq1, tf.int32), tf.convert_to_tensor(seq2, tf.int32)
    if check_alignment(alignment) == "tokens":
        return _unaligned(seq1, seq2, tf.convert_to_tensor(cut)) * non_padding(seq1)
    same_position = tf.pad(seq2, [[0, tf.size(seq1)]])[: tf.size(seq1)]
    length, other = length_without_padding(seq1), length_without_padding(seq2)
    known = tf.where(tf.convert_to_tensor(cut) & (length > other), other - 1, tf.size(seq1))
    differs = tf.not_equal(seq1, same_position) & (tf.range(tf.size(seq1)) < known)
    return tf.cast(differs, tf.int32) * non_padding(seq1)


def get_first_diff_mask(
    seq1: tf.Tensor, seq2: tf.Tensor, alignment: str = "positional", cut: tf.Tensor | bool = False
) -> tf.Tensor:
    """The mask of the first token of `seq1` that differs from `seq2`.

    Args:
        seq1: [length] ids.
        seq2: [any length] ids.
        alignment: see `get_diff_mask`.
        cut: see there.

    Returns:
        [length] int32 of 0 and at most one 1.

    Raises:
        ValueError: `alignment` is not one of `ALIGNMENTS`.
    """
    differs = get_diff_mask(seq1, seq2, alignment, cut)
    return differs * tf.cast(tf.equal(tf.cumsum(differs), 1), tf.int32)


def _unaligned(seq1: tf.Tensor, seq2: tf.Tensor, cut: tf.Tensor) -> tf.Tensor:
    """1 at the tokens of `seq1` outside a longest common subsequence with `seq2`."""
    first, second = (s[: length_without_padding(s)] for s in (seq1, seq2))
    second = second[: tf.size(second) - tf.cast(cut, tf.int32)]
    # A common prefix and suffix, most of an edited text, need no table.
    head = _common_start(first, second)
    first, second = first[head:], second[head:]
    # A text that was cut ends anywhere: a common suffix may be a chance.
    tail = tf.where(cut, 0, _common_start(first[::-1], second[::-1]))
    size = tf.size(first) - tail
    # An empty table has no last row to trace back from.
    changed = tf.cond(
        size > 0,
        lambda: _unaligned_middle(first[:size], second[: tf.size(second) - tail], cut),
        lambda: tf.zeros([0], tf.int32),
    )
    return tf.pad(changed, [[head, tf.size(seq1) - head - size]])


def _common_start(first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
    size = tf.minimum(tf.size(first), tf.size(second))
    same = tf.cast(tf.equal(first[:size], second[:size]), tf.int32)
    return tf.reduce_sum(tf.math.cumprod(same))


def _unaligned_middle(first: tf.Tensor, second: tf.Tensor, cut: tf.Tensor) -> tf.Tensor:
    """1 outside a longest common subsequence of N and M tokens: the textbook table, traced back."""
    same = tf.equal(first[:, None], second[None, :])  # [N, M]
    columns = tf.range(tf.size(second))

    def next_row(above: tf.Tensor, same_row: tf.Tensor) -> tf.Tensor:
        longer = tf.maximum(above[1:], above[:-1] + tf.cast(same_row, tf.int32))
        # The running maximum along the row.
        best = tf.reduce_max(tf.where(columns[None] <= columns[:, None], longer[None], 0), axis=1)
        return tf.concat([[0], best], 0)

    # [N, M + 1]: the longest length for the first n + 1 and the first m tokens.
    table = tf.scan(next_row, same, initializer=tf.zeros([tf.size(second) + 1], tf.int32))
    above = tf.concat([tf.zeros_like(table[:1]), table[:-1]], 0)
    # With `cut`, no token counts behind the shortest start that has the longest length.
    counts = (above[:, -1] < table[-1, -1]) | ~cut

    def match(
        state: tuple[tf.Tensor, tf.Tensor], row: tuple[tf.Tensor, tf.Tensor, tf.Tensor]
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Matches a token to the last column left of those in use that keeps the length."""
        used, _ = state
        same_row, row_above, row_here = row
        fits = same_row & (columns < used) & (row_above[:-1] + 1 == row_here[used])
        column = tf.reduce_max(tf.where(fits, columns, -1))
        return tf.where(column < 0, used, column), tf.cast(column < 0, tf.int32)

    _, unmatched = tf.scan(
        match,
        (same & counts[:, None], above, table),
        initializer=(tf.size(second), 0),
        reverse=True,
    )
    return unmatched * tf.cast(counts, tf.int32)


def encode_zeros(values: tf.Tensor) -> tf.Tensor:
    """Maps 0, 1, 2, ... to 1, 2, 3, ...: seqio's packing takes a 0 for the end of a sequence.

    Args:
        values: int32 of any shape, without the largest int32. Negative values stay.

    Returns:
        int32 of the same shape, none of them 0.
    """
    return values + tf.cast(values >= 0, tf.int32)


def decode_zeros(codes: tf.Tensor) -> tf.Tensor:
    """The inverse of `encode_zeros`; the 0 of padding stays 0.

    Args:
        codes: int32 of any shape.

    Returns:
        int32 of the same shape.
    """
    return codes - tf.cast(codes > 0, tf.int32)
