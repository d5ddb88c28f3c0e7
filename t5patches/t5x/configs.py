"""The model and the trainer of an objective, as the gin files in `t5patches/configs` name them."""

from __future__ import annotations

from typing import Any

from t5patches.t5x import feature_converters, models, trainer  # first: they say what is missing

# isort: split
from t5x.trainer import Trainer

from t5patches_kernels import TARGETED_NEGATIVE, TRAINING_OBJECTIVES


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
        objective: one of `t5patches_kernels.TRAINING_OBJECTIVES`.
        module: the flax network.
        vocabulary: of inputs and outputs.
        decoder_only: whether the network is one of T5X's decoder-only networks.
        feature_converter_cls: default `NegativeTrainingDiffFeatureConverter`, and
            `CorrectiveTrainingFullFeatureConverter` for `ce`, or their decoder-only variants.
        alpha: the factor on pushed-down tokens; `ce` has none and ignores it.
        original_path: where infer and eval find the original parameters; targeted objectives only.
        **options: the model's other arguments.

    Returns:
        An `EncoderDecoderModel...` or a `DecoderOnlyModel...` of `t5patches.models`.

    Raises:
        ValueError: the objective is unknown, or is not targeted and `original_path` is given.
    """
    if objective not in TRAINING_OBJECTIVES:
        raise ValueError(f"objective must be one of {TRAINING_OBJECTIVES}, got {objective!r}")
    network = "DecoderOnlyModel" if decoder_only else "EncoderDecoderModel"
    suffix = "" if objective == "ce" else objective.upper()
    if feature_converter_cls is None:
        rule = "CorrectiveTrainingFull" if objective == "ce" else "NegativeTrainingDiff"
        prefix = "DecoderOnly" if decoder_only else ""
        feature_converter_cls = getattr(feature_converters, f"{prefix}{rule}FeatureConverter")
    if objective != "ce":
        options["alpha"] = alpha
    if original_path is not None:
        if objective not in TARGETED_NEGATIVE:
            raise ValueError(
                f"original_path={original_path!r} with {objective}, which has no original model: "
                f"leave it out, or use one of {', '.join(TARGETED_NEGATIVE)}"
            )
        options["original_path"] = original_path
    vocabularies = ("vocabulary",) if decoder_only else ("input_vocabulary", "output_vocabulary")
    return getattr(models, network + suffix)(
        module=module,
        feature_converter_cls=feature_converter_cls,
        **dict.fromkeys(vocabularies, vocabulary),
        **options,
    )


def make_trainer(
    model: models.FusedLossModel, *, teacher_cache: str | None = None, **options: Any
) -> Trainer:
    """The trainer of a model: T5X's, or the one that also holds the original parameters.

    Args:
        model: the model to train.
        teacher_cache: directory of a teacher cache, see `SelfDistillationTrainer`.
        **options: the trainer's other arguments; `original_path` is the model's if not given.

    Returns:
        `t5patches.trainer.SelfDistillationTrainer` for a targeted objective, else `Trainer`.

    Raises:
        ValueError: a teacher cache for an objective without an original model.
    """
    if isinstance(model, models.SelfDistillationModel):
        options.setdefault("original_path", model.original_path)
        return trainer.SelfDistillationTrainer(model=model, teacher_cache=teacher_cache, **options)
    if teacher_cache is not None:
        raise ValueError(
            f"teacher_cache={teacher_cache!r} with {type(model).__name__}, which has no original "
            f"model: leave it out, or train with one of {', '.join(TARGETED_NEGATIVE)}"
        )
    return Trainer(model=model, **options)
