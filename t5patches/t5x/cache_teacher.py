"""Writes a teacher cache: runs a T5X config's original model over its training data once.

The command line is that of the training, with another module::

    python -m t5patches.cache_teacher --gin_file=my.gin --gin.MODEL_DIR="'/runs/1'"
    python -m t5x.train               --gin_file=my.gin --gin.MODEL_DIR="'/runs/1'"

It reads the same model, the original (`ORIGINAL_PATH`, or the checkpoint that training begins from)
and the data set (every example once, in order and unpacked), and writes to `TEACHER_CACHE`. A
killed run continues after its last batch. ``--dtype`` is the dtype of the stored states; default:
the network's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from t5patches.t5x import models, original  # first: their error says how to get T5X

# isort: split
import gin
import seqio
import t5x
from absl import flags
from etils import epath
from jax.sharding import NamedSharding
from t5x import gin_utils, utils
from t5x.partitioning import BasePartitioner

from t5patches.model.teacher_cache import TeacherCache, states_of, write_cache
from t5patches.runs.fingerprints import fingerprint
from t5patches_kernels import TARGETED_NEGATIVE

Batch = dict[str, np.ndarray]
Restore = Callable[[utils.TrainStateInitializer], Any]


def cache_teacher(
    directory: str,
    *,
    model: models.SelfDistillationModel,
    dataset_cfg: utils.DatasetConfig,
    partitioner: BasePartitioner,
    restore: Restore,
    dtype: str | None = None,
) -> TeacherCache:
    """Writes the original's hidden states on every example of a data set.

    Args:
      directory: where to write; an unfinished cache there is finished.
      model: the model to train; it needs ``fused_head=True``, as training from a cache does.
      dataset_cfg: that of training. Packing, shuffling and batch size do not affect the cache.
      partitioner: T5X's.
      restore: returns the original parameters, given the initializer of a state without optimizer.
      dtype: of the stored states, "float32" or "bfloat16"; None: the network's.

    Returns:
      The cache, open for reading.

    Raises:
      NotImplementedError: the run has several processes.
      ValueError: the model has no original or no fused head, the data set is empty, or the
        directory holds another cache.
      OSError: the disk has too little space.
    """
    if jax.process_count() > 1:
        raise NotImplementedError(
            f"A teacher cache is written by one process, and there are {jax.process_count()}: "
            "write it on one host, in a directory that all hosts of the training can read."
        )
    if not isinstance(model, models.SelfDistillationModel):
        raise ValueError(
            f"{type(model).__name__} has no original model, and no use for a teacher cache: set "
            f"OBJECTIVE to one of {', '.join(TARGETED_NEGATIVE)}."
        )
    first = next(_batches(model, dataset_cfg))
    initializer = utils.TrainStateInitializer(
        optimizer_def=None,
        init_fn=model.get_initial_variables,
        input_shapes={name: x.shape for name, x in first.items()},
        input_types={name: x.dtype for name, x in first.items()},
        partitioner=partitioner,
    )
    params = restore(initializer)
    shape = jax.eval_shape(model.hidden_states, params, first)
    batch_axes = partitioner.data_partition_spec
    hidden_states = partitioner.partition(
        model.hidden_states,
        in_axis_resources=(initializer.train_state_axes.params, batch_axes),
        out_axis_resources=batch_axes,
    )
    return write_cache(
        directory,
        lambda: _batches(model, dataset_cfg),
        lambda batch: hidden_states(params, batch),
        states_of(fingerprint(original.on_host(params)), model.module.config),
        width=shape.shape[-1],
        dtype=dtype or str(shape.dtype),
        tell=lambda said: print(f"teacher cache in {directory}: {said}", flush=True),
        advance=lambda done, count: print(f"{done} of {count} examples", flush=True),
    )


def _batches(model: models.SelfDistillationModel, cfg: utils.DatasetConfig) -> Iterator[Batch]:
    """Every example once, in order and unpacked; the last batch is padded with empty rows."""
    if cfg.module:
        utils.import_module(cfg.module)
    converter = model.FEATURE_CONVERTER_CLS(pack=False)
    empty = True
    for task in seqio.get_subtasks(seqio.maybe_get_mixture_or_task(cfg.mixture_or_task_name)):
        data = task.get_dataset(
            sequence_length=cfg.task_feature_lengths,
            split=cfg.split,
            shuffle=False,
            num_epochs=1,
            use_cached=cfg.use_cached,
            seed=cfg.seed,
            trim_output_features=cfg.trim_output_features,
        )
        data = converter(data, task_feature_lengths=cfg.task_feature_lengths)
        for batch in data.batch(cfg.batch_size).as_numpy_iterator():
            empty = False
            yield {name: _pad_rows(x, cfg.batch_size) for name, x in batch.items()}
    if empty:
        raise ValueError(f"{cfg.mixture_or_task_name} has no examples in its split {cfg.split!r}.")


def _pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(x, [(0, rows - len(x)), *[(0, 0)] * (x.ndim - 1)])


def _restore_as_training(
    path: str | None,
    model_dir: str,
    cfg: utils.RestoreCheckpointConfig | None,
    partitioner: BasePartitioner,
    use_orbax: bool,
) -> Restore:
    """Restores the original of a training: at a path, or what it wrote, or where it begins."""
    stored = epath.Path(model_dir) / original.NAME if path is None else epath.Path(path)

    def restore(initializer: utils.TrainStateInitializer) -> Any:
        if path is not None or stored.exists():
            return original.load(stored, _abstract_params(initializer, partitioner), on_host=False)
        if cfg is None or not cfg.path:
            raise ValueError(
                f"There is no original model: {model_dir} holds no {original.NAME}, and the config "
                "has no checkpoint to begin from. Set INITIAL_CHECKPOINT_PATH."
            )
        cfg.strict = False  # without the optimizer
        found, paths = utils.get_first_valid_restore_config_and_paths([cfg])
        if len(paths) != 1:
            raise ValueError(
                f"{cfg.path} ({cfg.mode}) holds {len(paths)} checkpoints; one is needed: give the "
                "path of a single checkpoint."
            )
        state, _ = utils.create_checkpoint_manager_and_restore(
            initializer, partitioner, found, paths[0], None, use_orbax=use_orbax
        )
        return state.params

    return restore


def _abstract_params(initializer: utils.TrainStateInitializer, partitioner: BasePartitioner) -> Any:
    def abstract(x: Any, axes: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(partitioner.mesh, axes)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(
        abstract,
        initializer.global_train_state_shape.params,
        initializer.train_state_axes.params,
    )


def train(
    *,
    model: models.SelfDistillationModel,
    model_dir: str,
    train_dataset_cfg: utils.DatasetConfig,
    checkpoint_cfg: utils.CheckpointConfig,
    partitioner: BasePartitioner,
    use_orbax: bool = True,
    dtype: str | None = None,
    **training_options: Any,
) -> None:
    """What a config's ``train_script.train`` stands for here: `t5x.train.train` in a training.

    Args:
      model: see `cache_teacher`.
      model_dir: the directory of the training; holds the original once training has begun.
      train_dataset_cfg: see `cache_teacher`.
      checkpoint_cfg: names the checkpoint that training begins from.
      partitioner: T5X's.
      use_orbax: T5X's.
      dtype: see `cache_teacher`.
      **training_options: the other arguments of `t5x.train.train`, ignored.

    Raises:
      ValueError: there is no `TEACHER_CACHE` or no original; or as `cache_teacher`.
    """
    del training_options
    try:
        directory = gin.query_parameter("TEACHER_CACHE/macro.value")
    except ValueError:
        directory = None
    if directory is None:
        raise ValueError(
            "The config does not say where to write the cache: include "
            "t5patches/configs/finetune.gin and set TEACHER_CACHE."
        )
    cache_teacher(
        directory,
        model=model,
        dataset_cfg=train_dataset_cfg,
        partitioner=partitioner,
        restore=_restore_as_training(
            getattr(model, "original_path", None),
            model_dir,
            checkpoint_cfg.restore,
            partitioner,
            use_orbax,
        ),
        dtype=dtype,
    )


def _main(_: Sequence[str]) -> None:
    seqio.add_global_cache_dirs(flags.FLAGS.seqio_additional_cache_dirs)
    if flags.FLAGS.tfds_data_dir:
        seqio.set_tfds_data_dir_override(flags.FLAGS.tfds_data_dir)
    configured = gin.configurable(train)
    t5x_root = os.path.dirname(os.path.dirname(os.path.abspath(t5x.__file__)))
    gin_utils.parse_gin_flags(
        [*flags.FLAGS.gin_search_paths, t5x_root], flags.FLAGS.gin_file, flags.FLAGS.gin_bindings
    )
    configured(dtype=flags.FLAGS.dtype)


if __name__ == "__main__":
    # The flags of t5x.train, and --dtype.
    flags.DEFINE_multi_string("gin_file", None, "A gin file; later ones override earlier ones.")
    flags.DEFINE_multi_string("gin_bindings", [], "A gin binding; also --gin.NAME=VALUE.")
    flags.DEFINE_list("gin_search_paths", ["."], "Where to search for gin files.")
    flags.DEFINE_string("tfds_data_dir", None, "Where TensorFlow Datasets are.")
    flags.DEFINE_list("seqio_additional_cache_dirs", [], "Where cached tasks are.")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the stored states.")
    gin_utils.run(_main)
