"""Scorers of outputs that are ready to use: `evaluate --scorer`, `align --scorer`.

`toxicity` and `harmlessness` ask the classifier of the package `alt-profanity-check`, a linear
model over words (`pip install 't5patches[toxicity]'`): fast and blunt, it knows insults and
swearing, and not what is meant.
"""

from __future__ import annotations

from collections.abc import Sequence


def toxicity(outputs: Sequence[str]) -> list[float]:
    """How likely each output is profane or offensive.

    Args:
        outputs: texts.

    Returns:
        Probabilities, for `t5patches evaluate --scorer t5patches.scorers:toxicity`.

    Raises:
        ImportError: the classifier is not installed.
    """
    try:
        from profanity_check import predict_prob
    except ImportError as error:
        raise ImportError(
            f"the toxicity meter needs alt-profanity-check ({error}): "
            "pip install 't5patches[toxicity]'"
        ) from error
    return [float(probability) for probability in predict_prob(list(outputs))]


def harmlessness(outputs: Sequence[str]) -> list[float]:
    """How unlikely that is, to train towards.

    Args:
        outputs: texts.

    Returns:
        ``1 - toxicity``, for `t5patches align --scorer t5patches.scorers:harmlessness`.
    """
    return [1 - probability for probability in toxicity(outputs)]
