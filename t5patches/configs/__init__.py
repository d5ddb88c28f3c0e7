"""Gin files to include in a T5X config, and what they name: an objective's model and trainer."""

from __future__ import annotations

from typing import Any

from t5patches.t5x import feature_converters, models, trainer  # first: they say what is missing

# isort: split
from t5x.trainer import Trainer

OBJECTIVES = ("tnff", "tnrr", "tnrf", "tnfll", "tnrll", "ul", "nl", "ce")


def make_model(
    objective: str,
    *,
    module: Any,
    vocabulary: Any,
    decoder_only: bool = False,
    feature_converter_cls: Any = None,
    alpha: float = 1e4,
    original_path: str | None = None,
    **options: Any,
) -> models.FusedLossModel:
    """The T5X model with the loss of an objective.

    Args:
        objective: one of `OBJECTIVES`.
        module: the network.
        vocabulary: of inputs and outputs.
        decoder_only: the network is one of T5X's decoder-only ones.
        feature_converter_cls: default: `NegativeTrainingDiffFeatureConverter`, and
            `CorrectiveTrainingFullFeatureConverter` for `ce`, or their decoder-only twins.
        alpha: the factor on pushed-down tokens, of which `ce` has none.
        original_path: where infer and eval find the original parameters; for the targeted
            objectives.
        **options: the model's other arguments.

    Returns:
        An `EncoderDecoderModel...` or a `DecoderOnlyModel...` of `t5patches.models`.

    Raises:
        ValueError: there is no such objective, or it has no use for `original_path`.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {OBJECTIVES}, got {objective!r}")
    kind = "DecoderOnlyModel" if decoder_only else "EncoderDecoderModel"
    loss = "" if objective == "ce" else objective.upper()
    if feature_converter_cls is None:
        rule = "CorrectiveTrainingFull" if objective == "ce" else "NegativeTrainingDiff"
        twin = "DecoderOnly" if decoder_only else ""
        feature_converter_cls = getattr(feature_converters, f"{twin}{rule}FeatureConverter")
    if objective != "ce":
        options["alpha"] = alpha
    if original_path is not None:
        if not objective.startswith("tn"):
            raise ValueError(
                f"original_path={original_path!r} with {objective}, which has no original model: "
                "leave it out"
            )
        options["original_path"] = original_path
    names = ("vocabulary",) if decoder_only else ("input_vocabulary", "output_vocabulary")
    return getattr(models, kind + loss)(
        module=module,
        feature_converter_cls=feature_converter_cls,
        **dict.fromkeys(names, vocabulary),
        **options,
    )


def make_trainer(
    model: models.FusedLossModel, *, teacher_cache: str | None = None, **options: Any
) -> Trainer:
    """The trainer that a model needs: T5X's, or the one that keeps the original parameters.

    Args:
        model: to train.
        teacher_cache: of `SelfDistillationTrainer`.
        **options: the trainer's other arguments.

    Returns:
        `t5patches.trainer.SelfDistillationTrainer` for a targeted objective, else `Trainer`.

    Raises:
        ValueError: a teacher cache for an objective without an original model.
    """
    if isinstance(model, models.SelfDistillationModel):
        return trainer.SelfDistillationTrainer(model=model, teacher_cache=teacher_cache, **options)
    if teacher_cache is not None:
        raise ValueError(
            f"teacher_cache={teacher_cache!r} with {type(model).__name__}, which has no original "
            "model: leave it out, or train with one of tnff, tnrr, tnrf, tnfll, tnrll"
        )
    return Trainer(model=model, **options)
