"""Instructions around the inputs: a file of templates, one drawn for each example.

A file holds one template a line, with `{inputs}` where the input goes:

    Summarize: {inputs}
    {inputs} Write a headline for this.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from t5patches.editing.data import Example, Source, read_lines
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


def template_items(
    items: Sequence[Source | Example], templates: Sequence[str], tokenizer: Tokenizer, seed: int
) -> list[Any]:
    """Puts a template around each input; outputs and marks stay.

    Args:
        items: examples and sources, to change.
        templates: see `with_templates`.
        tokenizer: splits the new inputs.
        seed: of the draws.

    Returns:
        As many of them.
    """
    texts = with_templates([item.inputs for item in items], templates, seed)
    return [
        item._replace(inputs=text)
        if isinstance(item, Source)
        else dataclasses.replace(item, inputs=text, input_ids=tokenizer.encode_prompt(text))
        for item, text in zip(items, texts, strict=True)
    ]


def _template(line: str) -> str:
    if PLACE not in line:
        raise ValueError(f"{line!r} has no {PLACE}: write it where the input goes")
    return line
