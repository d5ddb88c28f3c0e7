"""Batches of examples of like length, for all that reads given outputs without training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from t5patches.editing.data import Batch, Example, to_arrays
from t5patches.model.batches import Group, by_length, round_up


def example_batches(
    examples: Sequence[Example], batch_size: int, pad_id: int
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Cuts examples into batches of few shapes.

    Args:
        examples: in any order.
        batch_size: examples at a time.
        pad_id: the model's.

    Yields:
        Which examples, and their arrays; these may have more rows, copies of the first ones.
    """
    longest = max((len(example.output_ids) for example in examples), default=0)
    for group in by_length([len(example.input_ids) for example in examples], batch_size):
        chosen = [examples[i] for i in group.filled]
        output_length = round_up(max(len(example.output_ids) for example in chosen), longest)
        yield (
            group.rows,
            to_arrays(
                chosen, pad_id=pad_id, input_length=group.length, output_length=output_length
            ),
        )


def largest(groups: Sequence[Group]) -> Group:
    """The group that takes most memory: attention grows with the square of the length.

    Args:
        groups: of `by_length`.

    Returns:
        One of them.
    """
    return max(groups, key=lambda group: len(group.filled) * group.length**2)


def largest_shapes(
    input_lengths: Sequence[int], batch_size: int, output_length: int
) -> dict[str, Any]:
    """The shapes of the largest batch that `example_batches` may give, before there are outputs.

    Args:
        input_lengths: in tokens, of the examples.
        batch_size: examples at a time.
        output_length: the most tokens that an output may have.

    Returns:
        `jax.ShapeDtypeStruct`s, named as the arrays.
    """
    group = largest(by_length(input_lengths, batch_size))
    rows = len(group.filled)
    return {
        "inputs": jax.ShapeDtypeStruct((rows, group.length), np.int32),
        "outputs": jax.ShapeDtypeStruct((rows, output_length), np.int32),
        "weights": jax.ShapeDtypeStruct((rows, output_length), np.float32),
    }
