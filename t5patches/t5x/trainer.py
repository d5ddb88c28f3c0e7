"""T5X's trainer, with the frozen original model that targeted negative training needs.

The names and signatures of T5Patches' module. `SelfDistillationTrainer` hands the original
parameters to every step as an argument, sharded like those being trained: they are no constant of
the compiled program, and they are never donated. Where behaviour differs from T5Patches on purpose:
a resumed run keeps to the model that *training* began from, not to the one it resumed with, and
train-eval, microbatches and flax mutables work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from t5patches.editing.data import ORIGINAL_HIDDEN
from t5patches.t5x import models, original  # first: it says what is missing without T5X

# isort: split
from t5x import trainer as t5x_trainer
from t5x.partitioning import BasePartitioner
from t5x.train_state import InferenceState, TrainState
from t5x.trainer import LearningRateCallable, WeightMetricsComputer, apply_grads

Array = jax.Array
Batch = Mapping[str, Any]
Metrics = Any

_DATA = PartitionSpec("data")


class _WithOriginal:
    """A model whose loss has the original parameters bound, as T5X's own trainer calls it."""

    def __init__(self, model: models.SelfDistillationModel, original_params: Any):
        self._model = model
        self._original_params = original_params

    def loss_fn(self, params: Any, batch: Batch, dropout_rng: Array, *mutables: Any) -> Any:
        return self._model.loss_fn(params, batch, dropout_rng, self._original_params, *mutables)


def accumulate_grads_microbatched(
    model: models.SelfDistillationModel,
    train_state: TrainState,
    batch: Batch,
    dropout_rng: Array,
    num_microbatches: int | None,
    data_partition_spec: PartitionSpec = _DATA,
    orig_train_state: TrainState | None = None,
) -> tuple[Any, Metrics, Any]:
    """`t5x.trainer.accumulate_grads_microbatched` with the original parameters in the loss.

    Args:
      model: whose `loss_fn` is called.
      train_state: parameters being trained, and flax mutables where the network has any.
      batch: arrays ``[batch, ...]``.
      dropout_rng: a key.
      num_microbatches: in how many parts the gradient is made; None for one.
      data_partition_spec: how a batch is split over the mesh.
      orig_train_state: has the original parameters; None for a model that needs none.

    Returns:
      The gradient, the metrics and the changed flax mutables (None where there are none).
    """
    bound = model if orig_train_state is None else _WithOriginal(model, orig_train_state.params)
    return t5x_trainer.accumulate_grads_microbatched(
        bound, train_state, batch, dropout_rng, num_microbatches, data_partition_spec
    )


def train_with_lr(
    train_state: TrainState,
    batch: Batch,
    learning_rate: Array,
    dropout_rng: Array,
    model: models.SelfDistillationModel,
    num_microbatches: int | None,
    weight_metrics_computer: WeightMetricsComputer | None = None,
    data_partition_spec: PartitionSpec = _DATA,
    orig_train_state: TrainState | None = None,
) -> tuple[TrainState, Metrics]:
    """One training step.

    Args:
      train_state: parameters and optimizer.
      batch: arrays ``[batch, ...]``.
      learning_rate: of this step.
      dropout_rng: a key.
      model: to train.
      num_microbatches: in how many parts the gradient is made; None for one.
      weight_metrics_computer: T5X's, or None.
      data_partition_spec: how a batch is split over the mesh.
      orig_train_state: has the original parameters.

    Returns:
      The new train state and the metrics.
    """
    gradient, metrics, flax_mutables = accumulate_grads_microbatched(
        model,
        train_state,
        batch,
        dropout_rng,
        num_microbatches,
        data_partition_spec,
        orig_train_state=orig_train_state,
    )
    return apply_grads(
        train_state,
        gradient,
        metrics,
        learning_rate,
        weight_metrics_computer,
        other_state_variables={"flax_mutables": flax_mutables} if flax_mutables else None,
    )


def eval_step(
    model: models.SelfDistillationModel,
    train_state: TrainState,
    batch: Batch,
    orig_train_state: TrainState,
) -> Metrics:
    """The metrics of a batch.

    Args:
      model: to evaluate.
      train_state: parameters, and flax mutables where the network has any.
      batch: arrays ``[batch, ...]``.
      orig_train_state: has the original parameters.

    Returns:
      T5X's metrics by name.
    """
    mutables = [train_state.flax_mutables] if train_state.flax_mutables else []
    return model.eval_fn(train_state.params, batch, orig_train_state.params, *mutables)[1]


class _Step:
    """A partitioned step `(train_state, batch)` that hands the original on as third argument.

    T5X calls it, or lowers and compiles it and calls what comes of that.
    """

    def __init__(self, step: Any, get_original: Callable[[], TrainState]):
        self._step = step
        self._get_original = get_original

    def __call__(self, train_state: TrainState, batch: Batch) -> Any:
        return self._step(train_state, batch, self._get_original())

    def lower(self, train_state: TrainState, batch: Batch) -> _Step:
        return _Step(self._step.lower(train_state, batch, self._get_original()), self._get_original)

    def compile(self) -> _Step:
        return _Step(self._step.compile(), self._get_original)

    def as_text(self) -> str:
        return self._step.as_text()


class SelfDistillationTrainer(t5x_trainer.Trainer):
    """T5X's `Trainer` for the models that keep to an original model.

    The original parameters are, in this order: those of `orig_train_state`; those at
    `original_path`; those that an earlier part of the run wrote in ``original_params`` in
    `summary_dir`; or those of `train_state`, which are then written there. Without a `summary_dir`,
    and for a state made by hand whose parameters are numpy's, they are kept in memory only.

    Args:
      model: to train.
      train_state: parameters and optimizer; None in T5X's eval, which sets it later and needs
        `original_path`.
      partitioner: T5X's.
      eval_names: of the evaluation data sets.
      summary_dir: the directory of the run, or None.
      train_state_axes: how the train state is split over the mesh.
      rng: a key.
      learning_rate_fn: from a step to its learning rate.
      num_microbatches: in how many parts a gradient is made; None for one.
      weight_metrics_computer: T5X's, or None.
      orig_train_state: has the original parameters.
      original_path: ``original_params`` of a run, or a T5X checkpoint in either format.
      teacher_cache: directory that `t5patches.cache_teacher` wrote the original's hidden states on
        the training data in: they are read instead of running the original. For models with
        `fused_head`. Every process reads it.

    Raises:
      ValueError: the original parameters of a resumed run are gone, are of another model, or cannot
        be known.
    """

    def __init__(
        self,
        model: models.SelfDistillationModel,
        train_state: TrainState | None,
        partitioner: BasePartitioner,
        eval_names: Sequence[str],
        summary_dir: str | None,
        train_state_axes: Any,
        rng: Array,
        learning_rate_fn: LearningRateCallable,
        num_microbatches: int | None,
        weight_metrics_computer: WeightMetricsComputer | None = None,
        orig_train_state: TrainState | None = None,
        original_path: str | None = None,
        teacher_cache: str | None = None,
    ):
        super().__init__(
            model=model,
            train_state=train_state,
            partitioner=partitioner,
            eval_names=eval_names,
            summary_dir=summary_dir,
            train_state_axes=train_state_axes,
            rng=rng,
            learning_rate_fn=learning_rate_fn,
            num_microbatches=num_microbatches,
            weight_metrics_computer=weight_metrics_computer,
        )
        self._original_path = original_path
        self._original: Any = None
        if orig_train_state is not None:
            self._keep(original.freeze(orig_train_state.params))
        elif train_state is not None and original_path is None:
            # At once: the first step donates the train state.
            if summary_dir is None or not original.on_devices(train_state.params):
                self._keep(original.freeze(train_state.params))
            else:
                self._keep(original.kept_in(summary_dir, train_state.params))
        self._cache = None if teacher_cache is None else self._open_cache(teacher_cache)

    def _open_cache(self, directory: str) -> Any:
        # Here: `editing` needs more than T5X does, and most runs have no cache.
        from t5patches.model.teacher_cache import TeacherCache
        from t5patches.runs.fingerprints import fingerprint

        params = original.on_host(self.orig_train_state.params)
        return TeacherCache(directory, {"checkpoint": fingerprint(params)})

    def train(
        self, batch_iter: Iterator[Batch], num_steps: int, start_step: int | None = None
    ) -> Any:
        """`t5x.trainer.BaseTrainer.train`; with a teacher cache, its states beside each batch."""
        if self._cache is not None:
            cache = self._cache
            batch_iter = ({**batch, ORIGINAL_HIDDEN: _states(cache, batch)} for batch in batch_iter)
        return super().train(batch_iter, num_steps, start_step)

    def compile_train(self, batch: Batch) -> None:
        """`t5x.trainer.BaseTrainer.compile_train`, whose batch may hold any values."""
        if self._cache is not None:
            tokens = batch["decoder_target_tokens"]
            states = jax.ShapeDtypeStruct(
                (*tokens.shape, self._cache.width),
                self._cache.dtype,
                sharding=getattr(tokens, "sharding", None),
            )
            batch = {**batch, ORIGINAL_HIDDEN: states}
        super().compile_train(batch)

    def _keep(self, params: Any) -> None:
        self._original = params
        # T5X's inference evaluator scores with the model, and knows nothing of the trainer.
        self._model.original_params = params

    @property
    def orig_train_state(self) -> TrainState:
        """The original parameters, as a state without step and optimizer."""
        if self._original is None:
            if self._original_path is None:
                raise ValueError(
                    "The original model is not known where the trainer is made without a "
                    "train_state, as T5X's eval does: set SelfDistillationTrainer.original_path to "
                    "the original_params in the directory of the training run, or to the "
                    "checkpoint that it began from."
                )
            self._keep(original.load(self._original_path, self.train_state.params, on_host=False))
        return _state(self._original)

    @property
    def _batch_axes(self) -> PartitionSpec:
        return self._partitioner.data_partition_spec

    def _partition(self, step: Callable[..., Any], **options: Any) -> _Step:
        axes = self._train_state_axes
        partitioned = self._partitioner.partition(
            step, in_axis_resources=(axes, self._batch_axes, _state(axes.params)), **options
        )
        return _Step(partitioned, lambda: self.orig_train_state)

    @functools.cached_property
    def _partitioned_train_step(self) -> _Step:
        def step(train_state: TrainState, batch: Batch, original_state: TrainState) -> Any:
            return train_with_lr(
                train_state,
                batch,
                learning_rate=self._learning_rate_fn(train_state.step),
                dropout_rng=self._get_step_rng(train_state.step),
                model=self._model,
                num_microbatches=self._num_microbatches,
                weight_metrics_computer=self._weight_metrics_computer,
                data_partition_spec=self._batch_axes,
                orig_train_state=original_state,
            )

        return self._partition(
            step, out_axis_resources=(self._train_state_axes, None), donate_argnums=(0,)
        )

    @functools.cached_property
    def _partitioned_eval_step(self) -> _Step:
        def step(train_state: TrainState, batch: Batch, original_state: TrainState) -> Any:
            return eval_step(self._model, train_state, batch, orig_train_state=original_state)

        return self._partition(step, out_axis_resources=None)


def _states(cache: Any, batch: Batch) -> Any:
    """What a teacher cache holds for a batch, split over the devices as the batch is."""
    tokens = batch["decoder_target_tokens"]
    if not isinstance(tokens, jax.Array):
        return cache.read(batch)
    # A process has some rows of the batch only, and several of its devices may have the same ones.
    parts: dict[int, dict[str, Any]] = {}
    for name, array in batch.items():
        for shard in array.addressable_shards:
            parts.setdefault(_first_row(shard), {})[name] = shard.data
    states = {row: cache.read(part) for row, part in parts.items()}
    placed = [
        jax.device_put(states[_first_row(shard)], shard.device)
        for shard in tokens.addressable_shards
    ]
    shape = (*tokens.shape, cache.width)
    return jax.make_array_from_single_device_arrays(shape, tokens.sharding, placed)


def _first_row(shard: Any) -> int:
    return shard.index[0].start or 0


def _state(params: Any) -> TrainState:
    return InferenceState(step=None, params=params)
