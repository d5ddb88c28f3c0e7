"""Scores of whole outputs: a function of yours, or a reward model, asked and checked in one way.

A scorer is given a list of outputs and gives as many numbers, higher for what is scored for. One
that has a parameter named `inputs` is also given what the model was given for each of them: a
text, or the messages of a conversation::

    def mentions(outputs, inputs):
        return [float(text.split()[0] in output) for output, text in zip(outputs, inputs)]

An output may be empty: a model can end at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from t5patches.editing.rules import exits_are_errors
from t5patches.model.tokenizer import Inputs, input_text

Scorer = Callable[..., Iterable[float]]


class ScorerError(ValueError):
    """A scorer raises, or gives something else than a finite number for each output."""


def score(scorer: Scorer, outputs: Sequence[str], inputs: Sequence[Inputs]) -> np.ndarray:
    """Asks a scorer.

    Args:
        scorer: see the module.
        outputs: what a model said, N texts.
        inputs: what it was given for each; may be left empty where the scorer does not ask.

    Returns:
        [N] float64, all finite in float32.

    Raises:
        ScorerError: saying what the scorer raised, how many numbers it gave, or for which output
            it gave none that is finite.

    Example:
        >>> score(lambda outputs: [len(text) for text in outputs], ["a", "", "abc"], [])
        array([1., 0., 3.])
    """
    more = {"inputs": list(inputs)} if _asks_for_inputs(scorer) else {}
    try:
        with exits_are_errors():
            numbers = np.array(list(scorer(list(outputs), **more)), np.float64)
    except Exception as error:
        raise ScorerError(
            f"the scorer failed on {len(outputs)} outputs: {type(error).__name__}: {error}"
        ) from error
    if numbers.shape != (len(outputs),):
        raise ScorerError(
            f"the scorer gave {_counted(numbers.shape)} for {len(outputs)} outputs: a finite one "
            "for each is needed"
        )
    # Means and squares of larger ones are not finite.
    odd = np.flatnonzero(~(np.abs(numbers) <= np.finfo(np.float32).max))
    if len(odd):
        first = int(odd[0])
        to = f" to the input {input_text(inputs[first])!r:.200}" if len(inputs) else ""
        raise ScorerError(
            f"the scorer gave {len(numbers)} numbers, {len(odd)} of them not finite in float32, "
            f"for {len(outputs)} outputs: {numbers[first]} for number {first + 1}, "
            f"{outputs[first]!r:.200}{to}; a finite one for each is needed"
        )
    return numbers


def try_out(scorer: Scorer, name: str) -> None:
    """Asks a scorer for what it must be able to give, before anything long is begun.

    Args:
        scorer: see the module.
        name: of the scorer, for the error.

    Raises:
        ValueError: it fails, on an empty output for one.
    """
    try:
        score(scorer, _SAMPLES, ["What is this?"] * len(_SAMPLES))
    except ScorerError as error:
        cause = error.__cause__ or error
        kind = type(error.__cause__ or ValueError()).__name__
        raise ValueError(
            f"{name} fails on a sample: {kind}: {cause}; the outputs were {_SAMPLES}"
        ) from error


_SAMPLES = ["This is a sample.", "And another one, which is a little longer.", ""]


def _asks_for_inputs(scorer: Scorer) -> bool:
    try:
        return "inputs" in inspect.signature(scorer).parameters
    except (TypeError, ValueError):  # of a function in C, which says nothing of its parameters
        return False


def _counted(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} numbers" if len(shape) == 1 else f"numbers of the shape {shape}"
