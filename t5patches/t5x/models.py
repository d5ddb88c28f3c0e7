r"""T5X models with T5Patches' names and arguments, on the fused losses.

A T5X config names `models.EncoderDecoderModelTNFF` and so on, as with T5Patches; each class has a
decoder-only variant. `EncoderDecoderModel` and `DecoderOnlyModel` replace T5X's classes of these
names for ordinary and corrective fine-tuning.

A batch has the features that `t5patches.feature_converters` write, ``[batch, length]``.
``decoder_loss_weights`` is positive where a token is kept, negative where it is pushed down and 0
where it is ignored. With ``negative_ids`` and ``negative_factors``, ``[batch, length, K]``, the
targeted objectives and unlikelihood push down K ids at each position. With ``original_hidden``,
``[batch, length, D]``, the states of a teacher cache, the original model is not run.

=================== =============================================== ================
class               loss, see `t5patches_kernels`                   T5Patches
=================== =============================================== ================
...ModelNL          `negative_likelihood_loss`                      NLModel
...ModelUL          `unlikelihood_loss`                             ULModel
...ModelTNFF        `targeted_negative_loss`, ``objective="tnff"``  TNFFModel
...ModelTNRR        the same, ``"tnrr"``                            TNRRModel
...ModelTNRF        the same, ``"tnrf"``                            TNRFModel
...ModelTNFLL       the same, ``"tnfll"``                           TNFLLModel
...ModelTNRLL       the same, ``"tnrll"``                           TNRLLModel
...Model            `cross_entropy_loss`                            t5x.models
=================== =============================================== ================

Losses are summed over tokens. `score_batch` is the negated sum of each sequence without z-loss, as
in T5Patches. The metrics are made of what the loss returns, without another pass over the logits:
``accuracy`` over kept tokens, ``positive/*`` over kept and ``negative/*`` over pushed-down tokens
(``negative/prevalence``: the share of pushed-down tokens that are still the argmax). Train-eval of
the targeted models adds ``*/kl``, KL(model, original), which takes one more pass over both models'
logits; the training step leaves it out.

`t5patches.t5x` lists where the models differ from T5Patches on purpose.
"""

from __future__ import annotations

import abc
import copy
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

import t5patches_kernels
from t5patches.model.t5 import network
from t5patches_kernels import Edits, TokenLoss

try:
    import gin
    from clu import metrics as clu_metrics
    from flax import core as flax_core
    from t5x import losses as t5x_losses
    from t5x import metrics as metrics_lib
    from t5x import models as t5x_models
    from t5x.metrics import MetricsMap
    from t5x.models import BaseTransformerModel
except ImportError as error:
    raise ImportError(
        f"t5patches.models needs T5X ({error}). T5X is on no package index: clone "
        "https://github.com/google-research/t5x, put it on PYTHONPATH and install what it imports; "
        "see T5X in the README of T5Patches Kernels."
    ) from error

from t5patches.model.teacher_cache import ORIGINAL_HIDDEN
from t5patches.t5x import original

Array = jax.Array
Batch = Mapping[str, Any]
PyTree = Any

_FLOAT32_MIN = float(jnp.finfo(jnp.float32).min)


class _Outputs(NamedTuple):
    """The outputs of a network on a batch, in the form that the losses take."""

    arrays: tuple[Array, ...]  # the logits; or the hidden states and the head's matrix
    head: dict[str, Any]  # the options of the linear losses; empty for logits
    variables: Any  # the network's mutable collections, updated


class _ReturnHidden:
    """A network that returns its last hidden states instead of logits."""

    def __init__(self, module: Any):
        self._module = module

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        return self._module.apply(*args, return_hidden=True, **kwargs)


class FusedLossModel(BaseTransformerModel, abc.ABC):
    """The base of all models: a fused loss, its metrics and its scores.

    Args:
      implementation: that of the losses, see `t5patches_kernels.losses`.
      fused_head: multiply hidden states by the head inside the loss, a chunk of tokens at a time,
        so that the training step holds no logits. Needs a network that can return hidden states.
      kwargs: T5X's arguments, among them `z_loss`, `label_smoothing`, `loss_normalizing_factor`
        and `feature_converter_cls`.

    Raises:
      ValueError: label smoothing with a loss that has none.
      NotImplementedError: `fused_head` with a network that cannot return its hidden states.
    """

    LOSS: ClassVar[str]  # the name of a function of `t5patches_kernels`
    PUSHES_DOWN: ClassVar[bool] = True  # whether negative weights push tokens down
    TAKES_EDITS: ClassVar[bool] = False  # whether the loss takes K ids a position

    implementation: str | None = None
    fused_head: bool = False
    _z_loss: float = 0.0
    _label_smoothing: float = 0.0
    _loss_normalizing_factor: Any = None

    def __init__(
        self, *, implementation: str | None = None, fused_head: bool = False, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.implementation = implementation
        self.fused_head = fused_head
        if fused_head and "return_hidden" not in inspect.signature(self.module.__call__).parameters:
            raise NotImplementedError(
                f"fused_head=True needs a network that can return its hidden states, and "
                f"{type(self.module).__name__} of {type(self.module).__module__} cannot: use "
                "t5patches.network.Transformer, which has the same parameters as T5X's "
                "encoder-decoder, or fused_head=False."
            )

    # --- The loss of each token ------------------------------------------------------------------

    def _options(self, scoring: bool) -> dict[str, Any]:
        """The keyword arguments of the loss; scores are without its regularizing parts."""
        return {
            "z_loss": 0.0 if scoring else self._z_loss,
            "implementation": self.implementation,
        }

    def _weights_and_factors(self, weights: Array) -> tuple[Array, Array]:
        """The weights that the loss takes, and the factors that its result is multiplied by."""
        return weights, (weights != 0).astype(jnp.float32)

    def _edits(self, batch: Batch) -> dict[str, Edits]:
        names = ("negative_ids", "negative_factors")
        missing = [name for name in names if name not in batch]
        if len(missing) == len(names):
            return {}
        if missing:
            raise ValueError(
                f"The batch has {' and '.join(set(names) - set(missing))} but no {missing[0]}: "
                "give both, [batch, length, K]; a factor of 0 removes an id."
            )
        if not self.TAKES_EDITS:
            raise NotImplementedError(
                f"{type(self).__name__} pushes down one token a position and the batch has "
                "negative_ids: use UL or one of the targeted models, or a converter without them."
            )
        return {"edits": Edits(*(batch[name] for name in names))}

    def _outputs(
        self,
        params: PyTree,
        batch: Batch,
        dropout_rng: Array | None,
        mutable: Any = False,
        other_variables: PyTree | None = None,
    ) -> _Outputs:
        run = self
        if self.fused_head:
            run = copy.copy(self)
            run.module = _ReturnHidden(self.module)
        made = run._compute_logits(
            params, batch, dropout_rng, mutable=mutable, other_variables=other_variables
        )
        array, variables = (made, None) if mutable is False else made
        return self._with_head(array, params, variables)

    def _with_head(self, array: Array, params: PyTree, variables: Any = None) -> _Outputs:
        """Adds the head's matrix to hidden states; leaves logits as they are."""
        if not jnp.issubdtype(array.dtype, jnp.floating):
            array = array.astype(jnp.float32)
        if not self.fused_head:
            return _Outputs((array,), {}, variables)
        head = network.output_head(self.module.config, params)
        return _Outputs((array, head.kernel), head.loss_options(), variables)

    def _call(self, name: str, outputs: _Outputs, *arrays: Array, **options: Any) -> Any:
        """Calls a function of `t5patches_kernels` on logits, or its `linear_*` on hidden states."""
        function = getattr(t5patches_kernels, f"linear_{name}" if outputs.head else name)
        return function(*outputs.arrays, *arrays, **outputs.head, **options)

    def _token_loss(
        self, outputs: _Outputs, original: _Outputs | None, batch: Batch, scoring: bool
    ) -> TokenLoss:
        reference = original.arrays if original else ()
        weights, _ = self._weights_and_factors(_weights(batch))
        return self._call(
            self.LOSS,
            outputs,
            *reference,
            _targets(batch),
            weights,
            **self._edits(batch),
            **self._options(scoring),
        )

    # --- T5X's methods ---------------------------------------------------------------------------

    def loss_fn(
        self,
        params: PyTree,
        batch: Batch,
        dropout_rng: Array | None,
        flax_mutables: PyTree | None = None,
    ) -> tuple[Array, Any]:
        """The summed loss of a batch and its metrics.

        Args:
          params: the model's parameters.
          batch: arrays ``[batch, length]``, see the module.
          dropout_rng: the key for dropout; None for none.
          flax_mutables: the network's mutable collections, if it has any.

        Returns:
          ``(loss, metrics)``; with `flax_mutables`, ``(loss, (metrics, new mutables))``.

        Raises:
          ValueError, TypeError, NotImplementedError: as the losses do.
        """
        return self._loss_and_metrics(params, batch, dropout_rng, flax_mutables)

    def eval_fn(
        self, params: PyTree, batch: Batch, flax_mutables: PyTree | None = None
    ) -> tuple[Array, MetricsMap]:
        """`loss_fn` without dropout: ``(loss, metrics)``, also with `flax_mutables`."""
        return _without_mutables(self.loss_fn(params, batch, None, flax_mutables), flax_mutables)

    def score_batch(
        self, params: PyTree, batch: Batch, return_intermediates: bool = False
    ) -> Array | tuple[Array, Mapping[str, Any]]:
        """The negated loss of each sequence, without z-loss and label smoothing.

        Args:
          params: the model's parameters.
          batch: arrays ``[batch, length]``, see the module.
          return_intermediates: also return what the network sowed, with ``target_tokens``,
            ``loss_weights`` and ``token_scores`` under ``"decoder"``.

        Returns:
          ``[batch]`` scores, higher is better; or the scores and the intermediates.
        """
        return self._score(params, batch, return_intermediates)

    # --- What these methods share ----------------------------------------------------------------

    def _original(
        self, batch: Batch, dropout_rng: Array | None, original: PyTree, **collections: Any
    ) -> _Outputs | None:
        """The original model's outputs on a batch; None where the loss does not need them."""
        return None

    def _loss_and_metrics(
        self,
        params: PyTree,
        batch: Batch,
        dropout_rng: Array | None,
        flax_mutables: PyTree | None,
        original_params: PyTree | None = None,
        with_kl: bool = False,
    ) -> tuple[Array, Any]:
        collections: dict[str, Any] = {}
        if flax_mutables is not None:
            collections = {"mutable": list(flax_mutables), "other_variables": flax_mutables}
        outputs = self._outputs(params, batch, dropout_rng, **collections)
        original = self._original(batch, dropout_rng, original_params, **collections)
        out = self._token_loss(outputs, original, batch, scoring=False)
        kl = self._kl(outputs, original, batch) if with_kl and original else None
        loss, metrics = self._reduce(batch, out, kl)
        if flax_mutables is None:
            return loss, metrics
        changed = flax_core.unfreeze(outputs.variables)
        frozen = isinstance(flax_mutables, flax_core.FrozenDict)
        return loss, (metrics, flax_core.freeze(changed) if frozen else changed)

    def _kl(self, outputs: _Outputs, original: _Outputs, batch: Batch) -> Array:
        """KL(model, original) of every token, without gradient: one pass over both rows."""
        arrays, reference = jax.lax.stop_gradient((outputs.arrays, original.arrays))
        return self._call(
            "token_statistics",
            outputs._replace(arrays=arrays),
            _targets(batch),
            *reference,
            implementation=self.implementation,
        ).kl

    def _reduce(self, batch: Batch, out: TokenLoss, kl: Array | None) -> tuple[Array, MetricsMap]:
        """The loss and the metrics of a batch, from its tokens' losses."""
        signed, magnitudes = self._weights_and_factors(_weights(batch))
        divisor, factors = t5x_losses.get_loss_normalizing_factor_and_weights(
            self._loss_normalizing_factor, {**batch, "decoder_loss_weights": magnitudes}
        )
        token_loss, token_z_loss = out.loss * factors, out.z_loss * factors
        if divisor is not None:
            # 0 / 0 where all tokens are ignored: one such microbatch would spoil the whole step.
            divisor = jnp.where(divisor == 0, 1, divisor)
            token_loss, token_z_loss = token_loss / divisor, token_z_loss / divisor
        loss = jnp.sum(token_loss)
        metrics = t5x_models.compute_base_metrics(
            # Only the accuracy reads the logits, and it is replaced below by the loss's own.
            logits=jnp.zeros((*out.correct.shape, 1), jnp.float32),
            targets=_targets(batch),
            mask=magnitudes,
            loss=loss,
            z_loss=jnp.sum(token_z_loss),
            segment_ids=_segment_ids(batch),
        )
        kept = signed > 0
        metrics["accuracy"] = _mean(out.correct, kept)
        kinds = [("positive", kept, "accuracy")]
        if self.PUSHES_DOWN:
            kinds.append(("negative", signed < 0, "prevalence"))
        for name, chosen, share_of_argmax in kinds:
            metrics[f"{name}/tokens"] = metrics_lib.AveragePerStep(total=_count(chosen))
            metrics[f"{name}/loss"] = _mean(token_loss, chosen)
            metrics[f"{name}/log_prob"] = _mean(out.log_prob, chosen)
            metrics[f"{name}/{share_of_argmax}"] = _mean(out.correct, chosen)
            if kl is not None:
                metrics[f"{name}/kl"] = _mean(kl, chosen)
        return loss, metrics

    def _score(
        self,
        params: PyTree,
        batch: Batch,
        return_intermediates: bool,
        original_params: PyTree | None = None,
    ) -> Array | tuple[Array, Mapping[str, Any]]:
        collections = {"mutable": ["intermediates"]} if return_intermediates else {}
        outputs = self._outputs(params, batch, None, **collections)
        original = self._original(batch, None, original_params, **collections)
        _, factors = self._weights_and_factors(_weights(batch))
        token_loss = self._token_loss(outputs, original, batch, scoring=True).loss
        token_scores = -token_loss * factors
        scores = jnp.sum(token_scores, axis=-1)
        if not return_intermediates:
            return scores
        intermediates = flax_core.unfreeze(outputs.variables.get("intermediates", {}))
        # Tuples, like everything that a network sows.
        intermediates.setdefault("decoder", {}).update(
            target_tokens=(batch["decoder_target_tokens"],),
            loss_weights=(_weights(batch),),
            token_scores=(token_scores,),
        )
        return scores, intermediates


def _targets(batch: Batch) -> Array:
    return jnp.asarray(batch["decoder_target_tokens"]).astype(jnp.int32)


def _weights(batch: Batch) -> Array:
    if batch.get("decoder_loss_weights") is None:
        raise ValueError(
            f"The batch has no decoder_loss_weights, only {sorted(batch)}: a positive weight keeps "
            "a token, a negative one pushes it down, 0 ignores it. SeqIO's feature converters and "
            "those of t5patches.feature_converters write them."
        )
    return jnp.asarray(batch["decoder_loss_weights"]).astype(jnp.float32)


def _segment_ids(batch: Batch) -> dict[str, Array]:
    """For T5X's metrics: the packed example that each position belongs to, by feature."""
    end = "_segment_ids"
    packed = {k.removesuffix(end): v for k, v in batch.items() if k.endswith(end)}
    features = ("encoder_input_tokens", "decoder_target_tokens")
    return packed or {k: batch[k] != 0 for k in features if k in batch}


def _count(chosen: Array) -> Array:
    return jnp.sum(chosen, dtype=jnp.float32)


def _mean(values: Array, chosen: Array) -> clu_metrics.Average:
    total = jnp.sum(jnp.where(chosen, values.astype(jnp.float32), 0.0))
    return clu_metrics.Average(total=total, count=_count(chosen))


def _without_mutables(result: tuple[Array, Any], flax_mutables: PyTree | None) -> tuple[Array, Any]:
    loss, aux = result
    return loss, aux if flax_mutables is None else aux[0]


# --- One class for each loss ---------------------------------------------------------------------


class CrossEntropyModel(FusedLossModel):
    """``-w log p[y]`` with label smoothing and z-loss: the loss of T5X's own models."""

    LOSS = "cross_entropy_loss"
    PUSHES_DOWN = False

    def _options(self, scoring: bool) -> dict[str, Any]:
        smoothing = 0.0 if scoring else self._label_smoothing
        return {"label_smoothing": smoothing, **super()._options(scoring)}

    def _weights_and_factors(self, weights: Array) -> tuple[Array, Array]:
        return (weights != 0).astype(jnp.float32), weights


class NegativeTrainingTransformer(FusedLossModel, abc.ABC):
    """The base of the losses that keep some tokens and push others down.

    Args:
      alpha: the factor on pushed-down tokens.
      kwargs: as for `FusedLossModel`.
    """

    alpha: float = 1e4

    def __init__(self, *, alpha: float = 1e4, **kwargs: Any):
        super().__init__(**kwargs)
        self.alpha = alpha
        if self._label_smoothing:
            raise ValueError(
                f"label_smoothing={self._label_smoothing} has no meaning for "
                f"{type(self).__name__}: set it to 0, or use EncoderDecoderModel for training on "
                "corrections alone."
            )

    def _options(self, scoring: bool) -> dict[str, Any]:
        return {"alpha": self.alpha, **super()._options(scoring)}


class NLModel(NegativeTrainingTransformer):
    """Negative likelihood: ``-w log p[y]``, constant for unlikely pushed-down tokens.

    A pushed-down token has no gradient once its log-probability is below `EPSILON`; with
    `THRESHOLD = False` it always has one. (T5Patches' threshold, as written, stops the gradient of
    confident kept tokens.)
    """

    LOSS = "negative_likelihood_loss"
    THRESHOLD = True
    EPSILON = -10.3

    def _options(self, scoring: bool) -> dict[str, Any]:
        threshold = self.EPSILON if self.THRESHOLD else _FLOAT32_MIN
        return {"threshold": threshold, **super()._options(scoring)}


class ULModel(NegativeTrainingTransformer):
    """Unlikelihood: ``-log p[y]`` for kept tokens, ``-log(1 - p[y])`` for pushed-down ones."""

    LOSS = "unlikelihood_loss"
    TAKES_EDITS = True


@gin.configurable(module="models")
class SelfDistillationModel(NegativeTrainingTransformer, abc.ABC):
    """The base of targeted negative training, whose losses read the original model's distribution.

    Train with `t5patches.trainer.SelfDistillationTrainer`, which holds the original parameters.

    Args:
      smoothing: eps of the objectives with a reverse divergence, T5Patches' own. Kept tokens
        move to s(q) as well, with 0.03 of its mass spread over T5's vocabulary, 0.2 over mT5's;
        ``1e-3 / V`` keeps closer.
      divergence: report KL(q, p), whose minimum is 0, instead of T5Patches' CE(q, p).
      teacher_dropout: run the original model with the trained model's dropout, as T5Patches does.
      original_path: where `score_batch` and `eval_fn` find the original parameters if they are not
        passed, as in T5X's infer and eval: the ``original_params`` in the directory of the training
        run, or a T5X checkpoint. They become constants of the compiled program. The trainer of
        `t5patches.configs.make_trainer` takes them from there too.
      kwargs: as for `NegativeTrainingTransformer`.
    """

    LOSS = "targeted_negative_loss"
    TAKES_EDITS = True
    OBJECTIVE: ClassVar[str]

    smoothing: float = 1e-6
    divergence: bool = False
    teacher_dropout: bool = False
    original_path: str | None = None
    # Set by the trainer, for evaluators that have access to the model only.
    original_params: PyTree | None = None

    def __init__(
        self,
        *,
        smoothing: float = 1e-6,
        divergence: bool = False,
        teacher_dropout: bool = False,
        original_path: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.smoothing = smoothing
        self.divergence = divergence
        self.teacher_dropout = teacher_dropout
        self.original_path = original_path

    def _options(self, scoring: bool) -> dict[str, Any]:
        return {
            "objective": self.OBJECTIVE,
            "smoothing": self.smoothing,
            "divergence": self.divergence,
            **super()._options(scoring),
        }

    def hidden_states(self, params: PyTree, batch: Batch) -> Array:
        """The last hidden states without dropout, as a teacher cache stores them.

        Args:
          params: the original model's parameters.
          batch: arrays ``[batch, length]``, see the module.

        Returns:
          ``[batch, length, D]``.

        Raises:
          ValueError: `fused_head` is False: the model takes logits.
        """
        if not self.fused_head:
            raise ValueError(
                "A teacher cache holds hidden states, which a model uses with fused_head=True "
                "only: include t5patches/configs/fused_head.gin."
            )
        return self._outputs(params, batch, None).arrays[0]

    def _original(
        self, batch: Batch, dropout_rng: Array | None, original: PyTree, **collections: Any
    ) -> _Outputs | None:
        hidden = batch.get(ORIGINAL_HIDDEN)
        if hidden is None:
            rng = dropout_rng if self.teacher_dropout else None
            return self._outputs(original, batch, rng, **collections)
        if not self.fused_head or self.teacher_dropout:
            raise ValueError(
                "The batch has original_hidden, the original's hidden states from a teacher cache: "
                "they need fused_head=True, and teacher_dropout=False because they have no dropout."
            )
        return self._with_head(hidden, original)

    def _given_or_stored(self, given: PyTree | None, like: PyTree) -> PyTree:
        if given is not None:
            return given
        if self.original_params is None:
            if self.original_path is None:
                raise ValueError(_no_original(type(self).__name__))
            self.original_params = original.load(self.original_path, like)
        return self.original_params

    def loss_fn(  # type: ignore[override]
        self,
        params: PyTree,
        batch: Batch,
        dropout_rng: Array | None,
        orig_params: PyTree | None = None,
        flax_mutables: PyTree | None = None,
    ) -> tuple[Array, Any]:
        """The summed loss of a batch and its metrics.

        Args:
          params: the trained parameters.
          batch: arrays ``[batch, length]``, see the module.
          dropout_rng: the key for dropout; None for none.
          orig_params: the original model's parameters.
          flax_mutables: the network's mutable collections, if it has any.

        Returns:
          ``(loss, metrics)``; with `flax_mutables`, ``(loss, (metrics, new mutables))``.

        Raises:
          ValueError: `orig_params` is None.
        """
        if orig_params is None:
            raise ValueError(_no_original(type(self).__name__))
        return self._loss_and_metrics(params, batch, dropout_rng, flax_mutables, orig_params)

    def eval_fn(  # type: ignore[override]
        self,
        params: PyTree,
        batch: Batch,
        orig_params: PyTree | None = None,
        flax_mutables: PyTree | None = None,
    ) -> tuple[Array, MetricsMap]:
        """`loss_fn` without dropout, with KL(model, original) among the metrics."""
        original = self._given_or_stored(orig_params, params)
        result = self._loss_and_metrics(params, batch, None, flax_mutables, original, with_kl=True)
        return _without_mutables(result, flax_mutables)

    def score_batch(  # type: ignore[override]
        self,
        params: PyTree,
        batch: Batch,
        return_intermediates: bool = False,
        orig_params: PyTree | None = None,
    ) -> Array | tuple[Array, Mapping[str, Any]]:
        """The negated loss of each sequence, see `FusedLossModel.score_batch`.

        Raises:
          ValueError: `orig_params` is None and the model has no `original_path`.
        """
        original = self._given_or_stored(orig_params, params)
        return self._score(params, batch, return_intermediates, original)


def _no_original(name: str) -> str:
    return (
        f"{name} needs the parameters of the original model. Training: use "
        "t5patches.trainer.SelfDistillationTrainer as trainer_cls. T5X's infer and eval: set "
        f"{name}.original_path to the original_params in the directory of the training run, or to "
        "the checkpoint that it began from. Called by hand: pass orig_params."
    )


class TNFFModel(SelfDistillationModel):
    """CE(q, p) for kept and for pushed-down tokens."""

    OBJECTIVE = "tnff"


class TNRRModel(SelfDistillationModel):
    """KL(p, s(q)) for kept and for pushed-down tokens."""

    OBJECTIVE = "tnrr"


class TNRFModel(SelfDistillationModel):
    """CE(s(q), p) for kept tokens, KL(p, s(q)) for pushed-down ones."""

    OBJECTIVE = "tnrf"


class TNFLLModel(SelfDistillationModel):
    """``-log p[y]`` for kept tokens, CE(q, p) for pushed-down ones."""

    OBJECTIVE = "tnfll"


class TNRLLModel(SelfDistillationModel):
    """CE(s(onehot y), p) for kept tokens, KL(p, s(q)) for pushed-down ones."""

    OBJECTIVE = "tnrll"


# --- Each loss with T5X's two kinds of network ---------------------------------------------------


def _model(name: str, loss: type, base: type) -> type:
    """A T5X model (its network calls, decoding and feature converter) with one of the losses."""
    doc = f"`t5x.models.{base.__name__}` with the loss of `{loss.__name__}`.\n\n{loss.__doc__}"
    made = type(name, (loss, base), {"__doc__": doc, "__module__": __name__})
    return gin.configurable(module="models")(made)


def _both(suffix: str, loss: type) -> tuple[type, type]:
    return (
        _model(f"EncoderDecoderModel{suffix}", loss, t5x_models.EncoderDecoderModel),
        _model(f"DecoderOnlyModel{suffix}", loss, t5x_models.DecoderOnlyModel),
    )


EncoderDecoderModel, DecoderOnlyModel = _both("", CrossEntropyModel)
EncoderDecoderModelNL, DecoderOnlyModelNL = _both("NL", NLModel)
EncoderDecoderModelUL, DecoderOnlyModelUL = _both("UL", ULModel)
EncoderDecoderModelTNFF, DecoderOnlyModelTNFF = _both("TNFF", TNFFModel)
EncoderDecoderModelTNRR, DecoderOnlyModelTNRR = _both("TNRR", TNRRModel)
EncoderDecoderModelTNRF, DecoderOnlyModelTNRF = _both("TNRF", TNRFModel)
EncoderDecoderModelTNFLL, DecoderOnlyModelTNFLL = _both("TNFLL", TNFLLModel)
EncoderDecoderModelTNRLL, DecoderOnlyModelTNRLL = _both("TNRLL", TNRLLModel)
