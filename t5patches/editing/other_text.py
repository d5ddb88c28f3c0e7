"""Other text, whose likelihood is kept while a model is trained towards a score (PPO-ptx).

A file whose name ends in `.jsonl` or `.ndjson` has {"inputs": "...", "outputs": "..."} a line,
where `messages` may stand for `inputs`: the outputs' likelihood counts. Any other file has one text
a line, which begins where the model begins, with nothing before it; some of these may be told with
their middle last (`t5patches.editing.fim`).
"""

from __future__ import annotations

import os

import numpy as np

from t5patches.editing.data import (
    Example,
    fields_of,
    inputs_of,
    is_json_lines,
    make_example,
    names_of,
    read_lines,
    text_of,
    with_end,
)
from t5patches.editing.fim import FillInTheMiddle
from t5patches.model.tokenizer import TokenizedText, Tokenizer


def read_other_text(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    plain: Tokenizer,
    most: int,
    fim: FillInTheMiddle | None = None,
    seed: int = 0,
) -> list[Example]:
    """Reads other text.

    Args:
        path: of the file, see the module.
        tokenizer: the model's, with its chat template where the run has that.
        plain: the same without a chat template, for texts that answer nothing.
        most: tokens; a longer text is cut there, and then has no end token.
        fim: which texts are told with their middle last; None for none.
        seed: of that.

    Returns:
        Examples with nothing marked, for `t5patches.editing.data.to_arrays`.

    Raises:
        ValueError: some lines are bad (the first are named, by number and reason), or there are
            none; the tokenizer lacks a sentinel, or there are answers and no texts to transform.
    """
    answers, rng = is_json_lines(path), np.random.default_rng(seed)
    if fim is not None:
        fim.ids(plain)
        if answers:
            raise ValueError(
                f"{path}: answers have no middle to tell last; give plain text to --fim"
            )

    def answer(line: str) -> Example:
        fields = fields_of(line)
        if names_of(fields) != {"inputs", "outputs"}:
            raise ValueError(
                f"got the fields {sorted(names_of(fields))}; needed are 'inputs' (or 'messages') "
                "and 'outputs'; other things go under 'meta'"
            )
        said = _cut(text_of(fields, "outputs"), tokenizer, most)
        return make_example(inputs_of(fields), said, [], tokenizer)

    def text(line: str) -> Example:
        ids = None if fim is None else fim.tokens(line, plain, most, rng)
        told = _cut(line, plain, most) if ids is None else _without_characters(ids)
        return make_example("", told, [], plain)

    return read_lines(path, answer if answers else text, "text: write one a line")


def _without_characters(ids: tuple[int, ...]) -> TokenizedText:
    return TokenizedText("", ids, ((0, 0),) * len(ids))


def _cut(text: str, tokenizer: Tokenizer, most: int) -> TokenizedText:
    whole = with_end(tokenizer.encode(text), tokenizer)
    return TokenizedText(whole.text, whole.ids[:most], whole.spans[:most])
