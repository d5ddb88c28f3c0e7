"""seqio feature converters: from outputs and their corrections to the features of the models.

A task has `inputs`, `negative_targets` (the model's output) and `corrected_targets` (the output
with its unwanted parts replaced). Ten converters have T5Patches' names and, on valid data, its
results:

* `NegativeTraining{First,Diff,Full}FeatureConverter` train on the negative text and push down the
  first token that differs from the correction, every such token, or all tokens: weight -1 there, 1
  elsewhere.
* `CorrectiveTraining{First,Diff,Full}FeatureConverter` train on the correction: weight 1 at the
  first token that differs from the negative text, at every such token, or at all; 0 elsewhere.
* `NegativeAndPositiveTraining{First,Diff,Full}FeatureConverter` (and their base) take examples of
  which one text is a dummy, and train on the longer one: a negative text as the `NegativeTraining`
  converter does, a corrected one as `CorrectiveTrainingFullFeatureConverter` does.

For two more the task says what to push down: `NegativeSpansFeatureConverter` and
`NegativeSetsFeatureConverter`. For decoder-only models each converter has a variant, named
`DecoderOnly...`.

Where they differ from T5Patches on purpose: padding has no weight; `pack=True` works;
`alignment="tokens"` aligns the two texts, so that after an inserted token the others do not differ;
where the other text fills its feature, seqio may have cut it, and no token is selected that may
have been the same as one cut off (`feature_converters_utils.get_diff_mask`).
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


class _Lengths(NamedTuple):
    """The lengths of the encoder's and of the decoder's features."""

    encoder: int
    decoder: int

    def of(self, names: Iterable[str]) -> dict[str, int]:
        return {n: self.encoder if n.startswith("encoder") else self.decoder for n in sorted(names)}


class NegativeTrainingFeatureConverterBase(seqio.FeatureConverter, abc.ABC):
    """The base of all converters: pads or packs the tokens and weights of a subclass.

    Args:
        pack: whether to put several examples into one row.
        use_custom_packing_ops: as in seqio.
        apply_length_check: whether to raise for an example that is longer than its feature; if
            False, it is cut.
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
        """The weights of the tokens to train on.

        Args:
            features: the task's features of one example, each padded to its length.

        Returns:
            [length] int32: positive kept, negative pushed down, 0 ignored. Those of padding are
            set to 0 afterwards.
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
        """The length of the tokens to train on.

        Args:
            task_feature_lengths: the lengths of the task's features.

        Returns:
            The length of `get_decoder_target_tokens`.
        """

    def get_model_feature_lengths(self, task_feature_lengths: Lengths) -> Lengths:
        """The lengths of the model's features.

        Args:
            task_feature_lengths: the lengths of the task's features.

        Returns:
            The lengths by feature.
        """
        names = [*self.MODEL_FEATURES, *(self.PACKING_FEATURE_DTYPES if self.pack else ())]
        through = {name: task_feature_lengths[name] for name in self._passthrough_features}
        return self._lengths(task_feature_lengths).of(names) | through

    def _lengths(self, task_feature_lengths: Lengths) -> _Lengths:
        return _Lengths(
            encoder=task_feature_lengths["inputs"],
            decoder=self.get_decoder_length(task_feature_lengths),
        )

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Lengths
    ) -> tf.data.Dataset:
        lengths = self._lengths(task_feature_lengths)
        ds = seqio.utils.trim_and_pad_dataset(ds, task_feature_lengths)
        ds = _map(ds, self._encoded)
        ds = self._pack_or_pad(ds, lengths.of(ds.element_spec.keys() - self._passthrough_features))
        return _map(ds, self._model_features)

    def _encoded(self, features: Features) -> Features:
        """An example's sequences as packing takes them: without padding and without zeros."""
        sequences = {k: utils.encode_zeros(v) for k, v in self._sequences(features).items()}
        return sequences | {name: features[name] for name in self._passthrough_features}

    def _sequences(self, features: Features) -> Features:
        # At least one token: packing numbers the examples of a row on the encoder's and on the
        # decoder's side separately, and an empty sequence would have no number.
        inputs = features["inputs"]
        size = tf.maximum(utils.length_without_padding(inputs), 1)
        return {"encoder_input_tokens": inputs[:size], **self._decoder_sequences(features)}

    def _decoder_sequences(self, features: Features) -> Features:
        aligned = self._aligned(features)
        tokens = aligned["decoder_target_tokens"]
        size = tf.maximum(utils.length_without_padding(tokens), 1)
        return {name: sequence[:size] for name, sequence in aligned.items()}

    def _aligned(self, features: Features) -> Features:
        """The sequences with one value for each target token, [length] each; 0 where unused."""
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
            # Packing adds segment ids and positions to every sequence; those above suffice.
            features = {k: v for k, v in features.items() if not k.endswith(_PACKING)}
        model = {
            name: value if name in self._passthrough_features else utils.decode_zeros(value)
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
    """Inputs and targets in one sequence, as in seqio's `PrefixLMFeatureConverter`.

    Args:
        loss_on_targets_only: whether the inputs are ignored (weight 0); if False, they are kept.
    """

    PACKING_FEATURE_DTYPES: Mapping[str, Any] = {f"decoder_{what}": tf.int32 for what in _PACKING}

    def __init__(self, *args: Any, loss_on_targets_only: bool = True, **kwargs: Any):
        self._loss_on_targets_only = loss_on_targets_only
        super().__init__(*args, **kwargs)

    def _lengths(self, task_feature_lengths: Lengths) -> _Lengths:
        encoder, decoder = super()._lengths(task_feature_lengths)
        return _Lengths(encoder=0, decoder=encoder + decoder)

    def _sequences(self, features: Features) -> Features:
        inputs = features["inputs"][: utils.length_without_padding(features["inputs"])]
        zeros = tf.zeros_like(inputs)
        prefixes = {
            "decoder_target_tokens": inputs,
            "decoder_loss_weights": (
                zeros if self._loss_on_targets_only else utils.non_padding(inputs)
            ),
        }
        sequences = {
            name: tf.concat([prefixes.get(name, zeros), targets], 0)
            for name, targets in self._decoder_sequences(features).items()
        }
        # All inputs attend to each other. Decoder inputs are shifted right by one position.
        positions = tf.range(tf.size(sequences["decoder_target_tokens"]))
        sequences["decoder_causal_attention"] = tf.cast(positions <= tf.size(inputs), tf.int32)
        return sequences


class _OneText(NegativeTrainingFeatureConverterBase):
    """Trains on one of the two texts and selects all of its tokens; subclasses select fewer."""

    _text: str
    _other: str

    def get_decoder_target_tokens(self, features: Features) -> tf.Tensor:
        return features[self._text]

    def get_decoder_length(self, task_feature_lengths: Lengths) -> int:
        return task_feature_lengths[self._text]

    def _selected(self, features: Features) -> tf.Tensor:
        """[length] int32, 1 at the tokens to push down or to train on."""
        return utils.non_padding(features[self._text])


class _NegativeText(_OneText):
    """Pushes the selected tokens down and keeps the others."""

    _text, _other = "negative_targets", "corrected_targets"

    def get_decoder_weights(self, features: Features) -> tf.Tensor:
        return utils.non_padding(features[self._text]) - 2 * self._selected(features)


class _CorrectedText(_OneText):
    """Trains on the selected tokens and ignores the others."""

    _text, _other = "corrected_targets", "negative_targets"

    def get_decoder_weights(self, features: Features) -> tf.Tensor:
        return self._selected(features)


class _Diff(_OneText):
    """Selects the tokens that differ from the other text.

    Args:
        alignment: `"positional"` or `"tokens"`, see `feature_converters_utils.get_diff_mask`.

    Raises:
        ValueError: `alignment` is neither.
    """

    _mask = staticmethod(utils.get_diff_mask)

    def __init__(self, *args: Any, alignment: str = "positional", **kwargs: Any):
        self._alignment = utils.check_alignment(alignment)
        super().__init__(*args, **kwargs)

    def _selected(self, features: Features) -> tf.Tensor:
        other = features[self._other]
        # A text that fills its feature may have been cut.
        cut = tf.equal(utils.length_without_padding(other), tf.size(other))
        return self._mask(features[self._text], other, self._alignment, cut)


class _First(_Diff):
    """Selects the first token that differs from the other text."""

    _mask = staticmethod(utils.get_first_diff_mask)


@gin.configurable(module="feature_converters")
class NegativeTrainingFirstFeatureConverter(_First, _NegativeText):
    """Pushes down the first token that differs from the correction; keeps the others.

    `negative_targets` [3, 9, 4, 1] and `corrected_targets` [3, 8, 2, 1] in rows of 5 give
    `decoder_target_tokens` [3, 9, 4, 1, 0] and `decoder_loss_weights` [1, -1, 1, 1, 0].
    """


@gin.configurable(module="feature_converters")
class NegativeTrainingDiffFeatureConverter(_Diff, _NegativeText):
    """Pushes down every token that differs from the correction; keeps the others.

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
    """Trains on the first token of the correction that differs from the negative text.

    `corrected_targets` [3, 8, 2, 1] and `negative_targets` [3, 9, 4, 1] in rows of 5 give
    `decoder_target_tokens` [3, 8, 2, 1, 0] and `decoder_loss_weights` [0, 1, 0, 0, 0].
    """


@gin.configurable(module="feature_converters")
class CorrectiveTrainingDiffFeatureConverter(_Diff, _CorrectedText):
    """Trains on every token of the correction that differs from the negative text.

    `corrected_targets` [3, 8, 2, 1] and `negative_targets` [3, 9, 4, 1] in rows of 5 give
    `decoder_target_tokens` [3, 8, 2, 1, 0] and `decoder_loss_weights` [0, 1, 1, 0, 0].
    """


@gin.configurable(module="feature_converters")
class CorrectiveTrainingFullFeatureConverter(_CorrectedText):
    """Trains on the whole correction: ordinary fine-tuning.

    `corrected_targets` [3, 8, 2, 1] in rows of 5 give `decoder_target_tokens` [3, 8, 2, 1, 0] and
    `decoder_loss_weights` [1, 1, 1, 1, 0].
    """


@gin.configurable(module="feature_converters")
class NegativeAndPositiveTrainingFeatureConverterBase(NegativeTrainingFeatureConverterBase):
    """Negative and positive examples in one task, each with a dummy as its other text.

    Trains on the text with more tokens, and on the negative one if both have the same number. Both
    features need the same length.

    Args:
        pack: this and the next four as in `NegativeTrainingFeatureConverterBase`.
        use_custom_packing_ops: see there.
        apply_length_check: see there.
        bos_id: see there.
        passthrough_features: see there.
        **negative_options: of the converter of the negative examples, such as `alignment`.

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
        """The weights of the longer text."""
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
        """The length of both features; raises ValueError if they differ."""
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
    """Negative examples as in `NegativeTrainingFullFeatureConverter`; keeps positive ones."""


@gin.configurable(module="feature_converters")
class NegativeAndPositiveTrainingFirstFeatureConverter(
    NegativeAndPositiveTrainingFeatureConverterBase
):
    """Negative examples as in `NegativeTrainingFirstFeatureConverter`; keeps positive ones."""

    NEGATIVE_FEATURE_CONVERTER_CLS = NegativeTrainingFirstFeatureConverter


@gin.configurable(module="feature_converters")
class NegativeAndPositiveTrainingDiffFeatureConverter(
    NegativeAndPositiveTrainingFeatureConverterBase
):
    """Negative examples as in `NegativeTrainingDiffFeatureConverter`; keeps positive ones."""

    NEGATIVE_FEATURE_CONVERTER_CLS = NegativeTrainingDiffFeatureConverter


@gin.configurable(module="feature_converters")
class NegativeSpansFeatureConverter(_NegativeText):
    """Pushes down the tokens inside given spans; keeps the others.

    The task has `inputs`, `negative_targets` and `negative_spans` [spans, 2] int32, the first token
    of each span and the one after its last: `negative_targets` [3, 9, 4, 1] and `negative_spans`
    [[1, 3]] give `decoder_loss_weights` [1, -1, -1, 1]. An empty span pushes nothing down.

    The length of `negative_spans` is at least one more than the most spans of an output. seqio cuts
    spans like tokens, and padding at the end shows that none was lost.

    Raises:
        tf.errors.InvalidArgumentError: while data is read: a span is not inside its text, or the
            spans fill their feature.
    """

    TASK_FEATURES: Mapping[str, Any] = {
        "inputs": _IDS,
        "negative_targets": _IDS,
        "negative_spans": _Spec(dtype=tf.int32, rank=2),
    }

    def _selected(self, features: Features) -> tf.Tensor:
        text, spans = features[self._text], features["negative_spans"]
        start, end = spans[:, :1], spans[:, 1:]
        tf.debugging.Assert(
            tf.reduce_any(tf.reduce_all(spans[-1:] == 0, axis=1)),
            [
                "negative_spans fill their feature, and seqio may have cut some off: its length in "
                "task_feature_lengths must be at least one more than the most spans of an output, "
                "got",
                tf.shape(spans)[0],
            ],
        )
        # A text that fills its row may have been cut: its spans may end after the row.
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
        positions = tf.range(tf.size(text))
        inside = (start <= positions) & (positions < end)
        return tf.cast(tf.reduce_any(inside, axis=0), tf.int32)


@gin.configurable(module="feature_converters")
class NegativeSetsFeatureConverter(_NegativeText):
    """Pushes down a set of ids at each token; keeps the tokens that have none.

    The task has `inputs`, `negative_targets` and `negative_ids` [tokens, any number] int32: for
    each token of `negative_targets` the ids to push down at its position, whether or not the token
    is one of them, and -1 for none. Rows missing at the end have no ids. The length of
    `negative_ids` in the feature lengths is that of `negative_targets`. The model gets
    `negative_ids` [length, K] int32 and `negative_factors` [length, K] float32 for
    `t5patches_kernels.Edits`, and `decoder_loss_weights` -1 at tokens that have ids.

    Args:
        num_negatives: K; of more ids at a token, the first K are taken.
        with_factors: whether the task has `negative_factors`, float32 with the shape of
            `negative_ids`: each id's probability is multiplied by its factor. If False, by 0.

    Raises:
        ValueError: `num_negatives` is not positive; or, when data is converted, the feature lengths
            of the text and of its ids or factors differ.
        tf.errors.InvalidArgumentError: while data is read: an id is below -1, a factor is negative
            or not finite, or there are not as many factors as ids.
    """

    TASK_FEATURES: Mapping[str, Any] = {
        "inputs": _IDS,
        "negative_targets": _IDS,
        "negative_ids": _Spec(dtype=tf.int32, rank=2),
    }
    # seqio packs and checks one-dimensional features: [length * K] until `__call__` returns.
    MODEL_FEATURES: Mapping[str, Any] = {
        **NegativeTrainingFeatureConverterBase.MODEL_FEATURES,
        "negative_ids": _Spec(dtype=tf.int32),
        "negative_factors": _Spec(dtype=tf.float32),
    }
    _EDITS = ("negative_ids", "negative_factors")

    def __init__(self, *args: Any, num_negatives: int, with_factors: bool = False, **kwargs: Any):
        if num_negatives < 1:
            raise ValueError(f"num_negatives must be 1 or more, got {num_negatives}")
        self._num_negatives, self._with_factors = num_negatives, with_factors
        if with_factors:
            factors = _Spec(dtype=tf.float32, rank=2)
            self.TASK_FEATURES = {**self.TASK_FEATURES, "negative_factors": factors}
        super().__init__(*args, **kwargs)

    def __call__(self, ds: tf.data.Dataset, task_feature_lengths: Lengths) -> tf.data.Dataset:
        """Converts a dataset, see `seqio.FeatureConverter`."""

        def unflatten(features: Features) -> Features:
            shape = [-1, self._num_negatives]
            return features | {name: tf.reshape(features[name], shape) for name in self._EDITS}

        return _map(super().__call__(ds, task_feature_lengths), unflatten)

    def get_decoder_length(self, task_feature_lengths: Lengths) -> int:
        """The length of the text; raises ValueError if that of its ids or factors differs."""
        length = super().get_decoder_length(task_feature_lengths)
        for name in self._EDITS:
            if (rows := task_feature_lengths.get(name, length)) != length:
                raise ValueError(
                    f"{name} has a row for each token of negative_targets and needs the same "
                    f"length. Got {rows} and {length} in task_feature_lengths"
                )
        return length

    def get_model_feature_lengths(self, task_feature_lengths: Lengths) -> Lengths:
        """The lengths of the model's features; those of ids and factors are length * K."""
        lengths = super().get_model_feature_lengths(task_feature_lengths)
        return {k: v * self._num_negatives if k in self._EDITS else v for k, v in lengths.items()}

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Lengths
    ) -> tf.data.Dataset:
        return super()._convert_features(_map(ds, self._edits_as_integers), task_feature_lengths)

    def _edits_as_integers(self, features: Features) -> Features:
        """Ids and factors as int32 [tokens, K], of which padding's 0 stands for no edit."""
        ids = features["negative_ids"]
        factors = tf.zeros(tf.shape(ids))
        if self._with_factors:
            factors = features["negative_factors"]
        tf.debugging.assert_equal(
            tf.shape(factors), tf.shape(ids), "negative_factors and negative_ids differ in shape"
        )
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

    def _selected(self, features: Features) -> tf.Tensor:
        return tf.cast(tf.reduce_any(features["negative_ids"] > 0, axis=1), tf.int32)

    def _aligned(self, features: Features) -> Features:
        columns = {
            f"{name}/{k}": features[name][:, k]
            for name in self._EDITS
            for k in range(self._num_negatives)
        }
        return super()._aligned(features) | columns

    def _model_features(self, features: Features) -> Features:
        model = super()._model_features(features)
        ids, factors = (
            tf.stack([model.pop(f"{name}/{k}") for k in range(self._num_negatives)], axis=1)
            for name in self._EDITS
        )
        return model | {
            "negative_ids": tf.reshape(ids - 1, [-1]),
            "negative_factors": tf.reshape(tf.bitcast(factors, tf.float32), [-1]),
        }


def _decoder_only(converter: type[NegativeTrainingFeatureConverterBase]) -> type:
    """The variant of a converter for decoder-only models."""
    name = f"DecoderOnly{converter.__name__}"
    decoder = {k: v for k, v in converter.MODEL_FEATURES.items() if not k.startswith("encoder")}
    variant = type(
        name,
        (_DecoderOnly, converter),
        {
            "__doc__": f"`{converter.__name__}` for decoder-only models.\n\n{_DecoderOnly.__doc__}",
            "__module__": __name__,
            "MODEL_FEATURES": decoder | {"decoder_causal_attention": _IDS},
        },
    )
    return gin.configurable(name, module="feature_converters")(variant)


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
