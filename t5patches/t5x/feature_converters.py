"""seqio feature converters: from outputs and their corrections to what the models take.

The task has `inputs`, `negative_targets` (what the model said) and `corrected_targets` (the same
with something else in place of what it should not have said). Ten converters have T5Patches' names
and, on valid data, its results:

* `NegativeTraining{First,Diff,Full}FeatureConverter` train on the negative text and push down the
  first token that the correction does not repeat, every such token, or all tokens: weight -1
  there, 1 elsewhere.
* `CorrectiveTraining{First,Diff,Full}FeatureConverter` train on the correction: weight 1 at the
  first token that the negative text does not have, at every such token, or at all; 0 elsewhere.
* `NegativeAndPositiveTraining{First,Diff,Full}FeatureConverter` (and their base) take the longer of
  the two texts, the other one being a dummy: a negative text as the `NegativeTraining` converter
  of that name does, a corrected one as `CorrectiveTrainingFullFeatureConverter`.

Two more are told what to push down: `NegativeSpansFeatureConverter` and
`NegativeSetsFeatureConverter`. Each has a twin for decoder-only models: `DecoderOnly` and the name.

Differs from T5Patches on purpose: padding never has a weight; `pack=True` works;
`alignment="tokens"` aligns the two texts, so that one token more does not mark all that follow.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

try:
    import gin
    import seqio
    import tensorflow as tf
except ImportError as error:
    raise ImportError(
        f"t5patches.feature_converters needs seqio, which is not here ({error}): "
        "pip install 't5patches[t5x]'"
    ) from error

from t5patches.t5x import feature_converters_utils as utils

Features = dict[str, tf.Tensor]
Lengths = Mapping[str, int]

_Spec = seqio.FeatureConverter.FeatureSpec
_IDS = _Spec(dtype=tf.int32)
_PACKING = ("segment_ids", "positions")


class _Sides(NamedTuple):
    """The length of what the encoder reads and of what the decoder writes."""

    encoder: int
    decoder: int

    def of(self, names: Iterable[str]) -> dict[str, int]:
        return {n: self.encoder if n.startswith("encoder") else self.decoder for n in sorted(names)}


class NegativeTrainingFeatureConverterBase(seqio.FeatureConverter, abc.ABC):
    """What all converters share: three questions for a subclass, then padding or packing.

    Args:
        pack: puts several examples into one row.
        use_custom_packing_ops: as in seqio.
        apply_length_check: raises where an example is longer than its feature may be; without it
            examples are cut.
        bos_id: the decoder's first input.
        passthrough_features: as in seqio; not with `pack`.

    T5Patches: the class of the same name.
    """

    TASK_FEATURES: Mapping[str, Any] = {
        "inputs": _IDS,
        "negative_targets": _IDS,
        "corrected_targets": _IDS,
    }
    MODEL_FEATURES: Mapping[str, Any] = {
        "encoder_input_tokens": _IDS,
        "decoder_target_tokens": _IDS,
        "decoder_input_tokens": _IDS,
        "decoder_loss_weights": _IDS,
    }
    PACKING_FEATURE_DTYPES: Mapping[str, Any] = {
        f"{side}_{what}": tf.int32 for side in ("encoder", "decoder") for what in _PACKING
    }

    @abc.abstractmethod
    def get_decoder_weights(self, features: Features) -> tf.Tensor:
        """The weight of each of the tokens to train on.

        Args:
            features: the task's features of one example, each padded to its length.

        Returns:
            [length] int32: positive kept, negative pushed down, 0 ignored. What it says of padding
            does not count.
        """

    @abc.abstractmethod
    def get_decoder_target_tokens(self, features: Features) -> tf.Tensor:
        """The tokens to train on.

        Args:
            features: as for `get_decoder_weights`.

        Returns:
            [length] int32.
        """

    @abc.abstractmethod
    def get_decoder_length(self, task_feature_lengths: Lengths) -> int:
        """The length of what `get_decoder_target_tokens` returns.

        Args:
            task_feature_lengths: the lengths of the task's features.

        Returns:
            The length.
        """

    def get_model_feature_lengths(self, task_feature_lengths: Lengths) -> Lengths:
        """The length of each feature of the model.

        Args:
            task_feature_lengths: the lengths of the task's features.

        Returns:
            The lengths by feature.
        """
        names = [*self.MODEL_FEATURES, *(self.PACKING_FEATURE_DTYPES if self.pack else ())]
        through = {name: task_feature_lengths[name] for name in self._passthrough_features}
        return self._sides(task_feature_lengths).of(names) | through

    def _sides(self, task_feature_lengths: Lengths) -> _Sides:
        return _Sides(
            encoder=task_feature_lengths["inputs"],
            decoder=self.get_decoder_length(task_feature_lengths),
        )

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Lengths
    ) -> tf.data.Dataset:
        sides = self._sides(task_feature_lengths)
        ds = seqio.utils.trim_and_pad_dataset(ds, task_feature_lengths)
        ds = _map(ds, self._codes)
        ds = self._pack_or_pad(ds, sides.of(ds.element_spec.keys() - self._passthrough_features))
        return _map(ds, self._model_features)

    def _codes(self, features: Features) -> Features:
        """The sequences of an example without padding, so that it can be packed."""
        sequences = {k: utils.to_codes(v) for k, v in self._sequences(features).items()}
        return sequences | {name: features[name] for name in self._passthrough_features}

    def _sequences(self, features: Features) -> Features:
        # Packing counts the examples of a row by their tokens: one at least, or what the encoder
        # reads and what the decoder writes would no longer belong together.
        inputs = features["inputs"]
        size = tf.maximum(utils.length_without_padding(inputs), 1)
        return {"encoder_input_tokens": inputs[:size], **self._decoder_sequences(features)}

    def _decoder_sequences(self, features: Features) -> Features:
        aligned = self._aligned(features)
        tokens = aligned["decoder_target_tokens"]
        size = tf.maximum(utils.length_without_padding(tokens), 1)
        return {name: sequence[:size] for name, sequence in aligned.items()}

    def _aligned(self, features: Features) -> Features:
        """Everything that has one value a token, [length] each; 0 says nothing of the token."""
        tokens = self.get_decoder_target_tokens(features)
        weights = self.get_decoder_weights(features)
        if weights.dtype != tf.int32:
            raise TypeError(f"get_decoder_weights must return int32, got {weights.dtype.name}")
        return {
            "decoder_target_tokens": tokens,
            "decoder_loss_weights": weights * utils.non_padding(tokens),
        }

    def _model_features(self, features: Features) -> Features:
        packing = {}
        if self.pack:
            tokens_of = {"encoder": "encoder_input_tokens", "decoder": "decoder_target_tokens"}
            for name in self.PACKING_FEATURE_DTYPES:
                side, _, what = name.partition("_")
                packing[name] = features[f"{tokens_of[side]}_{what}"]
            # What packing adds to the other sequences says the same once more.
            features = {k: v for k, v in features.items() if not k.endswith(_PACKING)}
        model = {
            name: value if name in self._passthrough_features else utils.from_codes(value)
            for name, value in features.items()
        }
        model["decoder_input_tokens"] = seqio.utils.make_autoregressive_inputs(
            model["decoder_target_tokens"],
            sequence_id=packing.get("decoder_segment_ids"),
            bos_id=self.bos_id,
        )
        return model | packing


def _map(ds: tf.data.Dataset, function: Any) -> tf.data.Dataset:
    return ds.map(function, num_parallel_calls=tf.data.AUTOTUNE)


class _DecoderOnly(NegativeTrainingFeatureConverterBase):
    """Inputs and targets in one sequence, as seqio's `PrefixLMFeatureConverter` makes it.

    Args:
        loss_on_targets_only: gives the inputs weight 0; otherwise they are kept tokens.
    """

    PACKING_FEATURE_DTYPES: Mapping[str, Any] = {f"decoder_{what}": tf.int32 for what in _PACKING}

    def __init__(self, *args: Any, loss_on_targets_only: bool = True, **kwargs: Any):
        self._loss_on_targets_only = loss_on_targets_only
        super().__init__(*args, **kwargs)

    def _sides(self, task_feature_lengths: Lengths) -> _Sides:
        encoder, decoder = super()._sides(task_feature_lengths)
        return _Sides(encoder=0, decoder=encoder + decoder)

    def _sequences(self, features: Features) -> Features:
        inputs = features["inputs"][: utils.length_without_padding(features["inputs"])]
        nothing = tf.zeros_like(inputs)
        on_inputs = {
            "decoder_target_tokens": inputs,
            "decoder_loss_weights": (
                nothing if self._loss_on_targets_only else utils.non_padding(inputs)
            ),
        }
        sequences = {
            name: tf.concat([on_inputs.get(name, nothing), targets], 0)
            for name, targets in self._decoder_sequences(features).items()
        }
        # All inputs see each other. The place that reads the last of them is one further.
        places = tf.range(tf.size(sequences["decoder_target_tokens"]))
        sequences["decoder_causal_attention"] = tf.cast(places <= tf.size(inputs), tf.int32)
        return sequences


class _OneText(NegativeTrainingFeatureConverterBase):
    """Trains on one of the two texts. Marks all of it; subclasses mark less."""

    _text: str
    _other: str

    def get_decoder_target_tokens(self, features: Features) -> tf.Tensor:
        return features[self._text]

    def get_decoder_length(self, task_feature_lengths: Lengths) -> int:
        return task_feature_lengths[self._text]

    def _marks(self, features: Features) -> tf.Tensor:
        """[length] int32 of 0 and 1."""
        return utils.non_padding(features[self._text])


class _NegativeText(_OneText):
    """Pushes marked tokens down and keeps the others."""

    _text, _other = "negative_targets", "corrected_targets"

    def get_decoder_weights(self, features: Features) -> tf.Tensor:
        return utils.non_padding(features[self._text]) - 2 * self._marks(features)


class _CorrectedText(_OneText):
    """Trains on marked tokens and ignores the others."""

    _text, _other = "corrected_targets", "negative_targets"

    def get_decoder_weights(self, features: Features) -> tf.Tensor:
        return self._marks(features)


class _Diff(_OneText):
    """Marks the tokens that the other text does not repeat.

    Args:
        alignment: `"positional"` or `"tokens"`, see `feature_converters_utils.get_diff_mask`.

    Raises:
        ValueError: the alignment is neither.
    """

    _mask = staticmethod(utils.get_diff_mask)

    def __init__(self, *args: Any, alignment: str = "positional", **kwargs: Any):
        self._alignment = utils.check_alignment(alignment)
        super().__init__(*args, **kwargs)

    def _marks(self, features: Features) -> tf.Tensor:
        return self._mask(features[self._text], features[self._other], self._alignment)


class _First(_Diff):
    """Marks the first token that the other text does not repeat."""

    _mask = staticmethod(utils.get_first_diff_mask)


@gin.configurable(module="feature_converters")
class NegativeTrainingFirstFeatureConverter(_First, _NegativeText):
    """Pushes down the first token that the correction does not repeat; keeps the others.

    `negative_targets` [3, 9, 4, 1] and `corrected_targets` [3, 8, 2, 1] in rows of 5 give
    `decoder_target_tokens` [3, 9, 4, 1, 0] and `decoder_loss_weights` [1, -1, 1, 1, 0].
    """


@gin.configurable(module="feature_converters")
class NegativeTrainingDiffFeatureConverter(_Diff, _NegativeText):
    """Pushes down every token that the correction does not repeat; keeps the others.

    `negative_targets` [3, 9, 4, 1] and `corrected_targets` [3, 8, 2, 1] in rows of 5 give
    `decoder_target_tokens` [3, 9, 4, 1, 0] and `decoder_loss_weights` [1, -1, -1, 1, 0].
    """


@gin.configurable(module="feature_converters")
class NegativeTrainingFullFeatureConverter(_NegativeText):
    """Pushes down every token.

    `negative_targets` [3, 9, 4, 1] in rows of 5 give `decoder_target_tokens` [3, 9, 4, 1, 0] and
    `decoder_loss_weights` [-1, -1, -1, -1, 0].
    """


@gin.configurable(module="feature_converters")
class CorrectiveTrainingFirstFeatureConverter(_First, _CorrectedText):
    """Trains on the first token of the correction that the negative text does not have.

    `corrected_targets` [3, 8, 2, 1] and `negative_targets` [3, 9, 4, 1] in rows of 5 give
    `decoder_target_tokens` [3, 8, 2, 1, 0] and `decoder_loss_weights` [0, 1, 0, 0, 0].
    """


@gin.configurable(module="feature_converters")
class CorrectiveTrainingDiffFeatureConverter(_Diff, _CorrectedText):
    """Trains on every token of the correction that the negative text does not have.

    `corrected_targets` [3, 8, 2, 1] and `negative_targets` [3, 9, 4, 1] in rows of 5 give
    `decoder_target_tokens` [3, 8, 2, 1, 0] and `decoder_loss_weights` [0, 1, 1, 0, 0].
    """


@gin.configurable(module="feature_converters")
class CorrectiveTrainingFullFeatureConverter(_CorrectedText):
    """Trains on the correction, all of it: ordinary fine-tuning.

    `corrected_targets` [3, 8, 2, 1] in rows of 5 give `decoder_target_tokens` [3, 8, 2, 1, 0] and
    `decoder_loss_weights` [1, 1, 1, 1, 0].
    """


@gin.configurable(module="feature_converters")
class NegativeAndPositiveTrainingFeatureConverterBase(NegativeTrainingFeatureConverterBase):
    """Negative and positive examples in one task, each with a dummy as its other text.

    The text with more tokens counts, and the negative one where both have as many. Both features
    need the same length.

    Args:
        pack: as in the base class, as are the next four.
        use_custom_packing_ops: see above.
        apply_length_check: see above.
        bos_id: see above.
        passthrough_features: see above.
        **negative_options: for the converter of the negative examples, such as `alignment`.

    T5Patches: the class of the same name.
    """

    NEGATIVE_FEATURE_CONVERTER_CLS: type = NegativeTrainingFullFeatureConverter
    POSITIVE_FEATURE_CONVERTER_CLS: type = CorrectiveTrainingFullFeatureConverter

    def __init__(
        self,
        pack: bool = False,
        use_custom_packing_ops: bool = False,
        apply_length_check: bool = True,
        bos_id: int = 0,
        passthrough_features: Mapping[str, Any] | None = None,
        **negative_options: Any,
    ):
        common = (pack, use_custom_packing_ops, apply_length_check, bos_id, passthrough_features)
        super().__init__(*common)
        self.negative_feature_converter = self.NEGATIVE_FEATURE_CONVERTER_CLS(
            *common, **negative_options
        )
        self.positive_feature_converter = self.POSITIVE_FEATURE_CONVERTER_CLS(*common)

    def get_decoder_weights(self, features: Features) -> tf.Tensor:
        """What its converter says of the longer text."""
        return self._of_the_longer("get_decoder_weights", features)

    def get_decoder_target_tokens(self, features: Features) -> tf.Tensor:
        """The tokens of the longer text."""
        return self._of_the_longer("get_decoder_target_tokens", features)

    def _of_the_longer(self, method: str, features: Features) -> tf.Tensor:
        negative, positive = (
            tf.reduce_sum(utils.non_padding(features[text]))
            for text in ("negative_targets", "corrected_targets")
        )
        return tf.where(
            negative >= positive,
            getattr(self.negative_feature_converter, method)(features),
            getattr(self.positive_feature_converter, method)(features),
        )

    def get_decoder_length(self, task_feature_lengths: Lengths) -> int:
        """The length of both; raises ValueError where they have two."""
        negative = self.negative_feature_converter.get_decoder_length(task_feature_lengths)
        positive = self.positive_feature_converter.get_decoder_length(task_feature_lengths)
        if negative != positive:
            raise ValueError(
                "Negative and corrected targets should be assigned the same lengths. Got "
                f"{negative} and {positive} in task_feature_lengths"
            )
        return negative


@gin.configurable(module="feature_converters")
class NegativeAndPositiveTrainingFullFeatureConverter(
    NegativeAndPositiveTrainingFeatureConverterBase
):
    """Negative examples as in `NegativeTrainingFullFeatureConverter`; positive ones kept."""


@gin.configurable(module="feature_converters")
class NegativeAndPositiveTrainingFirstFeatureConverter(
    NegativeAndPositiveTrainingFeatureConverterBase
):
    """Negative examples as in `NegativeTrainingFirstFeatureConverter`; positive ones kept."""

    NEGATIVE_FEATURE_CONVERTER_CLS = NegativeTrainingFirstFeatureConverter


@gin.configurable(module="feature_converters")
class NegativeAndPositiveTrainingDiffFeatureConverter(
    NegativeAndPositiveTrainingFeatureConverterBase
):
    """Negative examples as in `NegativeTrainingDiffFeatureConverter`; positive ones kept."""

    NEGATIVE_FEATURE_CONVERTER_CLS = NegativeTrainingDiffFeatureConverter


@gin.configurable(module="feature_converters")
class NegativeSpansFeatureConverter(_NegativeText):
    """Pushes down the tokens inside given spans; keeps the others.

    The task has `inputs`, `negative_targets` and `negative_spans` [spans, 2] int32, the first token
    of each span and the one after its last: `negative_targets` [3, 9, 4, 1] and `negative_spans`
    [[1, 3]] give `decoder_loss_weights` [1, -1, -1, 1]. An empty span marks nothing.

    Raises:
        tf.errors.InvalidArgumentError: a span is not inside its text (while data is read).
    """

    TASK_FEATURES: Mapping[str, Any] = {
        "inputs": _IDS,
        "negative_targets": _IDS,
        "negative_spans": _Spec(dtype=tf.int32, rank=2),
    }

    def _marks(self, features: Features) -> tf.Tensor:
        text, spans = features[self._text], features["negative_spans"]
        start, end = spans[:, :1], spans[:, 1:]
        # A text that fills its row may have been cut, and then its spans go on.
        size = utils.length_without_padding(text)
        limit = tf.where(size < tf.size(text), size, tf.reduce_max(tf.concat([[[0]], end], 0)))
        tf.debugging.Assert(
            tf.reduce_all((start >= 0) & (start <= end) & (end <= limit)),
            [
                "negative_spans must be [start, end] with 0 <= start <= end <= tokens, got",
                spans,
                "in a text of",
                size,
            ],
            summarize=-1,
        )
        places = tf.range(tf.size(text))
        return tf.cast(tf.reduce_any((start <= places) & (places < end), axis=0), tf.int32)


@gin.configurable(module="feature_converters")
class NegativeSetsFeatureConverter(_NegativeText):
    """Pushes down a set of ids at each token; keeps the tokens that have none.

    The task has `inputs`, `negative_targets` and `negative_ids` [tokens, any number] int32, -1 for
    none: at each token of `negative_targets` the ids to push down there, whether or not the token
    itself is one of them. Rows that are missing at the end have no ids. The model gets
    `negative_ids` [length, K] int32 and `negative_factors` [length, K] float32 for
    `t5patches_kernels.Edits`, with `decoder_loss_weights` -1 at tokens that have ids.

    Args:
        num_negatives: K; the first K of a token's ids are taken.
        with_factors: the task has `negative_factors` too, float32 like `negative_ids`: what each
            id's probability is multiplied with. Otherwise it is 0 for all of them.

    Raises:
        ValueError: `num_negatives` is not positive.
        tf.errors.InvalidArgumentError: an id is below -1 or a factor is negative or no number
            (while data is read).
    """

    TASK_FEATURES: Mapping[str, Any] = {
        "inputs": _IDS,
        "negative_targets": _IDS,
        "negative_ids": _Spec(dtype=tf.int32, rank=2),
    }
    # seqio packs one dimension only: [length * K] until it has checked them.
    MODEL_FEATURES: Mapping[str, Any] = {
        **NegativeTrainingFeatureConverterBase.MODEL_FEATURES,
        "negative_ids": _Spec(dtype=tf.int32),
        "negative_factors": _Spec(dtype=tf.float32),
    }
    _SETS = ("negative_ids", "negative_factors")

    def __init__(self, *args: Any, num_negatives: int, with_factors: bool = False, **kwargs: Any):
        if num_negatives < 1:
            raise ValueError(f"num_negatives must be 1 or more, got {num_negatives}")
        self._num_negatives = num_negatives
        if with_factors:
            factors = _Spec(dtype=tf.float32, rank=2)
            self.TASK_FEATURES = {**self.TASK_FEATURES, "negative_factors": factors}
        super().__init__(*args, **kwargs)

    def __call__(self, ds: tf.data.Dataset, task_feature_lengths: Lengths) -> tf.data.Dataset:
        """Converts a dataset, as in seqio."""

        def unflatten(features: Features) -> Features:
            shape = [-1, self._num_negatives]
            return features | {name: tf.reshape(features[name], shape) for name in self._SETS}

        return _map(super().__call__(ds, task_feature_lengths), unflatten)

    def get_model_feature_lengths(self, task_feature_lengths: Lengths) -> Lengths:
        """The lengths by feature, those of the sets as seqio sees them."""
        lengths = super().get_model_feature_lengths(task_feature_lengths)
        return {k: v * self._num_negatives if k in self._SETS else v for k, v in lengths.items()}

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Lengths
    ) -> tf.data.Dataset:
        return super()._convert_features(_map(ds, self._sets_as_codes), task_feature_lengths)

    def _sets_as_codes(self, features: Features) -> Features:
        """The sets as int32 [tokens, K] in which 0, as padding adds it, stands for none."""
        ids = features["negative_ids"]
        factors = features.get("negative_factors", tf.zeros(tf.shape(ids)))
        tf.debugging.Assert(
            tf.reduce_all(ids >= -1), ["negative_ids must be -1 or more, got", ids], summarize=-1
        )
        tf.debugging.Assert(
            tf.reduce_all((factors >= 0) & tf.math.is_finite(factors)),
            ["negative_factors must be finite and not negative, got", factors],
            summarize=-1,
        )
        missing = [[0, 0], [0, self._num_negatives]]
        columns = slice(self._num_negatives)
        return features | {
            "negative_ids": tf.pad(ids + 1, missing)[:, columns],
            "negative_factors": tf.pad(tf.bitcast(factors, tf.int32), missing)[:, columns],
        }

    def _marks(self, features: Features) -> tf.Tensor:
        return tf.cast(tf.reduce_any(features["negative_ids"] > 0, axis=1), tf.int32)

    def _aligned(self, features: Features) -> Features:
        columns = {
            f"{name}/{k}": features[name][:, k]
            for name in self._SETS
            for k in range(self._num_negatives)
        }
        return super()._aligned(features) | columns

    def _model_features(self, features: Features) -> Features:
        model = super()._model_features(features)
        ids, factors = (
            tf.stack([model.pop(f"{name}/{k}") for k in range(self._num_negatives)], axis=1)
            for name in self._SETS
        )
        return model | {
            "negative_ids": tf.reshape(ids - 1, [-1]),
            "negative_factors": tf.reshape(tf.bitcast(factors, tf.float32), [-1]),
        }


def _decoder_only(converter: type[NegativeTrainingFeatureConverterBase]) -> type:
    """The twin for decoder-only models, `DecoderOnly` and the converter's name."""
    name = f"DecoderOnly{converter.__name__}"
    kept = {k: v for k, v in converter.MODEL_FEATURES.items() if not k.startswith("encoder")}
    twin = type(
        name,
        (_DecoderOnly, converter),
        {
            "__doc__": f"`{converter.__name__}` for decoder-only models.\n\n{_DecoderOnly.__doc__}",
            "__module__": __name__,
            "MODEL_FEATURES": kept | {"decoder_causal_attention": _IDS},
        },
    )
    return gin.configurable(name, module="feature_converters")(twin)


DecoderOnlyNegativeTrainingFirstFeatureConverter = _decoder_only(
    NegativeTrainingFirstFeatureConverter
)
DecoderOnlyNegativeTrainingDiffFeatureConverter = _decoder_only(
    NegativeTrainingDiffFeatureConverter
)
DecoderOnlyNegativeTrainingFullFeatureConverter = _decoder_only(
    NegativeTrainingFullFeatureConverter
)
DecoderOnlyCorrectiveTrainingFirstFeatureConverter = _decoder_only(
    CorrectiveTrainingFirstFeatureConverter
)
DecoderOnlyCorrectiveTrainingDiffFeatureConverter = _decoder_only(
    CorrectiveTrainingDiffFeatureConverter
)
DecoderOnlyCorrectiveTrainingFullFeatureConverter = _decoder_only(
    CorrectiveTrainingFullFeatureConverter
)
DecoderOnlyNegativeAndPositiveTrainingFirstFeatureConverter = _decoder_only(
    NegativeAndPositiveTrainingFirstFeatureConverter
)
DecoderOnlyNegativeAndPositiveTrainingDiffFeatureConverter = _decoder_only(
    NegativeAndPositiveTrainingDiffFeatureConverter
)
DecoderOnlyNegativeAndPositiveTrainingFullFeatureConverter = _decoder_only(
    NegativeAndPositiveTrainingFullFeatureConverter
)
DecoderOnlyNegativeSpansFeatureConverter = _decoder_only(NegativeSpansFeatureConverter)
DecoderOnlyNegativeSetsFeatureConverter = _decoder_only(NegativeSetsFeatureConverter)
