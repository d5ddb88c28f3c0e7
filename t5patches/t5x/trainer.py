"""T5X's trainer for targeted negative training, which also needs the original model.

The names and signatures are those of T5Patches' module. `SelfDistillationTrainer` passes the
original parameters to every step as an argument, sharded like the trained ones: they are not
constants of the compiled program and are never donated. Where it differs from T5Patches on purpose:
the original of a resumed run is the model that *training* began from, not the one that it resumed
with; and train-eval, microbatches and flax mutables work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from t5patches.t5x import models, original  # first: its error says how to get T5X

# isort: split
from t5x import trainer as t5x_trainer
from t5x.partitioning import BasePartitioner
from t5x.train_state import InferenceState, TrainState
from t5x.trainer import LearningRateCallable, WeightMetricsComputer, apply_grads

from t5patches.model.teacher_cache import ORIGINAL_HIDDEN, TeacherCache, states_of
from t5patches.runs.fingerprints import fingerprint

Array = jax.Array
Batch = Mapping[str, Any]
Metrics = Any

_DATA = PartitionSpec("data")


class _WithOriginal:
    """A model with the original parameters bound to its loss, for T5X's functions."""

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
    """`t5x.trainer.accumulate_grads_microbatched`, with the original parameters in the loss.

    Args:
      model: the model whose `loss_fn` is differentiated.
      train_state: the trained parameters, and flax mutables if the network has any.
      batch: arrays ``[batch, ...]``.
      dropout_rng: a key.
      num_microbatches: the number of parts that the batch is split into; None for one.
      data_partition_spec: how a batch is sharded over the mesh.
      orig_train_state: holds the original parameters; None for a model that needs none.

    Returns:
      The gradient, the metrics and the new flax mutables (None if the network has none).
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
      learning_rate: the learning rate of this step.
      dropout_rng: a key.
      model: the model to train.
      num_microbatches: the number of parts that the batch is split into; None for one.
      weight_metrics_computer: T5X's, or None.
      data_partition_spec: how a batch is sharded over the mesh.
      orig_train_state: holds the original parameters; None for a model that needs none.

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
      model: the model to evaluate.
      train_state: the trained parameters, and flax mutables if the network has any.
      batch: arrays ``[batch, ...]``.
      orig_train_state: holds the original parameters.

    Returns:
      T5X's metrics by name.
    """
    mutables = [train_state.flax_mutables] if train_state.flax_mutables else []
    return model.eval_fn(train_state.params, batch, orig_train_state.params, *mutables)[1]


class _Step:
    """A step `(train_state, batch)` that passes the original to a partitioned step of three.

    T5X either calls it, or calls what `lower(...).compile()` returns.
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
    """T5X's `Trainer` for the models whose loss needs the original model.

    The original parameters are the first of these that is there:

    1. those of `orig_train_state`;
    2. those at `original_path`;
    3. those that an earlier part of the run wrote to ``original_params`` in `summary_dir`;
    4. those of `train_state`, which are then written there. Without a `summary_dir`, and for a
       state made by hand of numpy arrays, they stay in memory only.

    Args:
      model: the model to train.
      train_state: parameters and optimizer; None in T5X's eval, which sets it later and needs
        `original_path`.
      partitioner: T5X's.
      eval_names: the names of the evaluation data sets.
      summary_dir: the directory of the run, or None.
      train_state_axes: how the train state is sharded over the mesh.
      rng: a key.
      learning_rate_fn: maps a step to its learning rate.
      num_microbatches: the number of parts that a batch is split into; None for one.
      weight_metrics_computer: T5X's, or None.
      orig_train_state: holds the original parameters.
      original_path: ``original_params`` of a run, or a T5X checkpoint in either format.
      teacher_cache: directory with the original's hidden states on the training data, written by
        `t5patches.cache_teacher`. They are read and the original is not run. Needs a model with
        `fused_head`; every process reads the directory.

    Raises:
      ValueError: the original parameters of a resumed run are missing or are of another model, or
        the teacher cache is unfinished, or of another original or config.
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
        model.original_params = None  # those of an earlier trainer
        if orig_train_state is not None:
            self._keep(original.copy(orig_train_state.params))
        elif train_state is not None and original_path is not None:
            _ = self.orig_train_state  # the model may be scored with before the first step
        elif train_state is not None:
            # Now, because the first step donates the train state.
            if summary_dir is None or not original.on_devices(train_state.params):
                self._keep(original.copy(train_state.params))
            else:
                self._keep(original.load_or_save(summary_dir, train_state.params))
        self._cache: TeacherCache | None = None
        if teacher_cache is not None:
            params = original.on_host(self.orig_train_state.params)
            self._cache = TeacherCache(
                teacher_cache, states_of(fingerprint(params), model.module.config)
            )

    def train(
        self, batch_iter: Iterator[Batch], num_steps: int, start_step: int | None = None
    ) -> Any:
        """`t5x.trainer.BaseTrainer.train`; a teacher cache adds its states to each batch."""
        if self._cache is not None:
            cache = self._cache
            batch_iter = ({**batch, ORIGINAL_HIDDEN: _states(cache, batch)} for batch in batch_iter)
        return super().train(batch_iter, num_steps, start_step)

    def compile_train(self, batch: Batch) -> None:
        """`t5x.trainer.BaseTrainer.compile_train`, with the shape of the teacher cache's states."""
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
        # T5X's inference evaluator scores with the model and has no access to the trainer.
        self._model.original_params = params

    @property
    def orig_train_state(self) -> TrainState:
        """The original parameters, in a train state without step and optimizer."""
        if self._original is None:
            if self._original_path is None:
                raise ValueError(
                    "The trainer has no original model: it was made without a train_state, as in "
                    "T5X's eval. Set SelfDistillationTrainer.original_path to the original_params "
                    "in the directory of the training run, or to the checkpoint that it began from."
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


def _states(cache: TeacherCache, batch: Batch) -> Any:
    """The teacher cache's states of a batch, sharded like the batch."""
    tokens = batch["decoder_target_tokens"]
    if not isinstance(tokens, jax.Array):
        return cache.read(batch)
    # A process holds only some rows of the batch, and several of its devices may hold the same.
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
