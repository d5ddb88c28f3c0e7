"""Rows of like length go together, in few shapes, and no result depends on it."""

import numpy as np
import pytest
from editing_samples import example, tiny_model, tiny_params, tokenizer

from t5patches.editing.annotate import pattern, speak
from t5patches.editing.batches import example_batches
from t5patches.model import generate as generate_module
from t5patches.model.batches import by_length

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.mark.parametrize(
    ("lengths", "batch_size", "shapes"),
    [
        ([], 4, []),
        ([3], 4, [(4, 3)]),
        ([20] * 100, 64, [(64, 20), (64, 20)]),
        ([20] * 70, 64, [(64, 20), (8, 20)]),  # a last batch of 6
        ([100, 9, 10, 30, 12, 11], 4, [(4, 16), (4, 100)]),
        ([33, 40, 64, 65], 1, [(1, 64), (1, 64), (1, 64), (1, 65)]),
    ],
)
def test_groups_have_few_shapes(lengths, batch_size, shapes):
    groups = by_length(lengths, batch_size)
    assert [(len(group.filled), group.length) for group in groups] == shapes


def test_every_row_is_in_one_group_that_it_fits():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(0, 200, rng.integers(1, 60))
        groups = by_length(lengths, int(rng.integers(1, 20)))
        assert sorted(i for group in groups for i in group.rows) == list(range(len(lengths)))
        for group in groups:
            assert lengths[group.rows].max() <= group.length <= lengths.max()
            assert set(group.filled) == set(group.rows)
            assert list(group.filled[: len(group.rows)]) == list(group.rows)


def test_examples_come_with_their_own_rows_and_padding_is_little():
    long = example("news " * 20, "a fire in Paris " * 6)
    examples = [example("a", "a fire"), long, example("b", "a flood"), example("c", "Rome")]
    widths = []
    for rows, batch in example_batches(examples, 3, pad_id=0):
        widths.append((batch["inputs"].shape[1], batch["outputs"].shape[1]))
        for row, inputs, outputs in zip(rows, batch["inputs"], batch["outputs"], strict=False):
            assert tuple(np.trim_zeros(inputs, "b")) == examples[row].input_ids
            assert tuple(np.trim_zeros(outputs, "b")) == examples[row].output_ids
    assert max(widths[0]) <= 16
    assert widths[1] == (len(long.input_ids), len(long.output_ids))


def test_inputs_are_padded_to_their_like_and_answered_in_their_order(monkeypatch):
    """Most inputs are short: only the batch with the long one pays for its length."""
    shapes, decode = [], generate_module._decode

    def counted(plan, params, batch, *arguments):
        shapes.append(batch.prompts.shape)
        return decode(plan, params, batch, *arguments)

    monkeypatch.setattr(generate_module, "_decode", counted)
    inputs = ["a", "a fire", "news " * 12, "a flood", "b", "c"]
    rule = pattern(r"\S*[aeo]\S*")
    options = {"max_length": 5, "temperature": 1.0}

    def said(texts, **more):
        return speak(tiny_model(), tiny_params(), texts, rule, tokenizer(), **options, **more)

    together = said(inputs, batch_size=4)
    assert len({width for _, width in shapes}) == 2
    (longest,) = [rows for rows, width in shapes if width == max(w for _, w in shapes)]
    assert longest <= 4
    assert [e.inputs for e in together] == inputs
    assert said(inputs, batch_size=6) == together
