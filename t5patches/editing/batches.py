"""Batches of examples of like length, for all that reads given outputs without training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from t5patches.editing.data import Batch, Example, to_arrays
from t5patches.model.batches import by_length, round_up


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
