"""Instructions around the inputs: a file of templates, one drawn for each example.

A file holds one template a line, with `{inputs}` where the input goes:

    Summarize: {inputs}
    {inputs} Write a headline for this.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from t5patches.editing.data import Example, read_lines
from t5patches.model.tokenizer import Inputs, Tokenizer

PLACE = "{inputs}"


def read_templates(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Reads a file of templates.

    Args:
        path: one template a line; blank lines are skipped.

    Returns:
        The templates.

    Raises:
        ValueError: a line has no `{inputs}`, or there are no lines. All such lines are named.
    """
    return tuple(read_lines(path, _template, f"templates: write one a line, with {PLACE} in it"))


def with_templates(inputs: Sequence[Inputs], templates: Sequence[str], seed: int) -> list[str]:
    """Puts a template around each input.

    Args:
        inputs: source texts.
        templates: to draw from; every `{inputs}` in one is replaced.
        seed: of the draws.

    Returns:
        As many texts. Which template the input of a number gets depends on the seed and that
        number alone.

    Raises:
        ValueError: there are no templates, or an input is a conversation.

    Example:
        >>> with_templates(["a", "b", "c"], ["Short: {inputs}", "{inputs} TL;DR"], seed=0)
        ['a TL;DR', 'Short: b', 'Short: c']
    """
    if not templates:
        raise ValueError("there are no templates to draw from: at least one is needed")
    texts = [text for text in inputs if isinstance(text, str)]
    if len(texts) < len(inputs):
        raise ValueError(
            f"{len(inputs) - len(texts)} of {len(inputs)} inputs are conversations, and templates "
            "go around texts: leave the templates out"
        )
    drawn = np.random.default_rng(seed).random(len(inputs)) * len(templates)
    return [
        templates[int(number)].replace(PLACE, text)
        for number, text in zip(drawn, texts, strict=True)
    ]


def template_examples(
    examples: Sequence[Example], templates: Sequence[str], tokenizer: Tokenizer, seed: int
) -> list[Example]:
    """Puts a template around the input of each example; outputs and marks stay.

    Args:
        examples: to change.
        templates: see `with_templates`.
        tokenizer: splits the new inputs.
        seed: of the draws.

    Returns:
        As many examples.
    """
    texts = with_templates([example.inputs for example in examples], templates, seed)
    return [
        dataclasses.replace(example, inputs=text, input_ids=tokenizer.encode_prompt(text))
        for example, text in zip(examples, texts, strict=True)
    ]


def _template(line: str) -> str:
    if PLACE not in line:
        raise ValueError(f"{line!r} has no {PLACE}: write it where the input goes")
    return line
