"""The original parameters of a training run, stored beside its checkpoints.

A run writes them once, before its first checkpoint, to `NAME` in its directory, and reads them when
it is resumed: the original stays the model that training began from. The layout is that of the
parameters in T5X's orbax checkpoints, so that `load` reads both.
"""

from __future__ import annotations

import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import core as flax_core
from t5x import checkpoints

from t5patches.runs import hosts

PyTree = Any

NAME = "original_params"
_STATE = "state"  # the folder of the train state in T5X's orbax checkpoints
_LEGACY = "checkpoint"  # the file of T5X's own checkpoint format


def copy(params: PyTree) -> PyTree:
    """Copies parameters, so that they outlive the donation of the train state.

    Args:
      params: a tree of arrays.

    Returns:
      The same tree with the same shardings, in new buffers.
    """
    shardings = jax.tree.map(lambda x: getattr(x, "sharding", None), params)
    return jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=shardings)(params)


def on_devices(params: PyTree) -> bool:
    """Whether parameters are JAX arrays, and not numpy arrays of a state made by hand."""
    return all(isinstance(x, jax.Array) for x in jax.tree.leaves(params))


def on_host(params: PyTree) -> PyTree:
    """Parameters as numpy arrays, whole in every process.

    Args:
      params: a tree of arrays, which may be sharded over several processes.

    Returns:
      The same tree, as nested dictionaries.
    """
    return jax.tree.map(np.asarray, hosts.whole(flax_core.unfreeze(params)))


def load_or_save(directory: str | os.PathLike[str], params: PyTree) -> PyTree:
    """Loads the original parameters of a resumed run; saves those of a run that begins.

    Args:
      directory: the run's, where T5X writes its checkpoints.
      params: the run's current parameters: the original ones if there is no checkpoint yet.

    Returns:
      The original parameters in new buffers, sharded like `params`.

    Raises:
      ValueError: the run has checkpoints and its original parameters are missing.
    """
    folder = epath.Path(directory) / NAME
    # One that was not written to its end has more in its name.
    names = (path.name for path in epath.Path(directory).glob("checkpoint_*"))
    resumed = any(re.fullmatch(r"checkpoint_\d+", name) for name in names)
    if resumed and not (folder / _STATE).exists():
        raise ValueError(
            f"{directory} holds checkpoints but not the original parameters, {NAME}: which model "
            "training began from is not known. Put them back, set "
            "SelfDistillationTrainer.original_path to the checkpoint that training began from, or "
            "train in another directory."
        )
    if resumed:
        return load(folder, params, on_host=False)
    copied = copy(params)
    # Overwrites what a run left that died before its first checkpoint: this one may begin from
    # other parameters.
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as checkpointer:
        state = {"target": flax_core.unfreeze(copied)}
        checkpointer.save(folder / _STATE, args=ocp.args.PyTreeSave(state), force=True)
    return copied


def load(path: str | os.PathLike[str], like: PyTree, *, on_host: bool = True) -> PyTree:
    """Loads the parameters of a checkpoint.

    Args:
      path: `NAME` as `load_or_save` wrote it, or the directory of a T5X checkpoint in either
        format.
      like: parameters with the tree, the shapes and the dtypes to return.
      on_host: whether to return numpy arrays; otherwise arrays sharded like `like`.

    Returns:
      Parameters with the tree and the dtypes of `like`.

    Raises:
      ValueError: there is no checkpoint, or it is of another model.
    """
    folder = epath.Path(path)
    wanted = flax_core.unfreeze(like)
    if (folder / _STATE).exists():
        found = _read_orbax(folder / _STATE, wanted, on_host)
    elif (folder / _LEGACY).exists():
        found = _read_legacy(folder, wanted, on_host)
    else:
        raise ValueError(
            f"{path} holds no parameters: give the {NAME} in the directory of a training run, or "
            f"the directory of one T5X checkpoint (with {_STATE}/ or the file {_LEGACY!r} in it)."
        )
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(found))


def _read_orbax(folder: epath.Path, wanted: PyTree, on_host: bool) -> PyTree:
    def restore_args(x: Any) -> ocp.RestoreArgs:
        if on_host:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype)
        return ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), wanted)
    args = ocp.args.PyTreeRestore(
        item={"target": shapes},
        restore_args={"target": jax.tree.map(restore_args, wanted)},
        partial_restore=True,  # leaves the optimizer unread
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as checkpointer:
        _check_same(folder, checkpointer.metadata(folder).item_metadata.tree["target"], wanted)
        return checkpointer.restore(folder, args=args)["target"]


def _read_legacy(folder: epath.Path, wanted: PyTree, on_host: bool) -> PyTree:
    lazy = checkpoints.load_t5x_checkpoint(os.fspath(folder), lazy_parameters=True)["target"]
    _check_same(folder, lazy, wanted)

    def read(x: Any, like: Any) -> Any:
        array = np.asarray(x.get(), like.dtype)
        return array if on_host else hosts.place(array, like.sharding)

    return jax.tree.map(read, lazy, wanted)


def _check_same(folder: epath.Path, stored: PyTree, wanted: PyTree) -> None:
    """Raises with the name of a parameter that is missing or has another shape."""

    def shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree.leaves_with_path(tree)
        return {jax.tree_util.keystr(at): tuple(x.shape) for at, x in leaves}

    found, needed = shapes(stored), shapes(wanted)
    if found == needed:
        return
    name = next(k for k in sorted(found | needed) if found.get(k) != needed.get(k))
    raise ValueError(
        f"{folder} is of another model: {name} is {found.get(name, 'missing')} in it and "
        f"{needed.get(name, 'missing')} in the model being run."
    )
