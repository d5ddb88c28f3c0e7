"""The parameters that a targeted training keeps to: a frozen copy, kept beside the checkpoints.

A run writes them once, before its first checkpoint, in `NAME` in its directory, and takes them from
there when it goes on: the original stays the model that training began from. They lie as parameters
do in T5X's orbax checkpoints, so that one reader serves both.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import core as flax_core
from jax.experimental import multihost_utils
from t5x import checkpoints

PyTree = Any

NAME = "original_params"
_STATE = "state"  # where T5X's orbax checkpoints have the train state
_LEGACY = "checkpoint"  # the file that T5X's own format has


def freeze(params: PyTree) -> PyTree:
    """A copy of parameters, placed like them, that outlives the donation of the train state.

    Args:
      params: a tree of arrays.

    Returns:
      The same tree, in memory of its own.
    """
    shardings = jax.tree.map(lambda x: getattr(x, "sharding", None), params)
    return jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=shardings)(params)


def on_devices(params: PyTree) -> bool:
    """Whether parameters are arrays of a run, and not numpy's in a state made by hand."""
    return all(isinstance(x, jax.Array) for x in jax.tree.leaves(params))


def on_host(params: PyTree) -> PyTree:
    """Parameters as numpy's arrays, whole in every process.

    Args:
      params: a tree of arrays, which may be split over several processes.

    Returns:
      The same tree, in dictionaries.
    """

    def fetch(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(fetch, flax_core.unfreeze(params))


def kept_in(directory: str | os.PathLike[str], params: PyTree) -> PyTree:
    """The original parameters of the run in a directory.

    Args:
      directory: of the run, where T5X writes its checkpoints.
      params: those that the run has now: its start where there is no checkpoint yet.

    Returns:
      Parameters in memory of their own, placed like `params`.

    Raises:
      ValueError: the run has checkpoints and its original parameters are gone.
    """
    folder = epath.Path(directory) / NAME
    begun = any(epath.Path(directory).glob("checkpoint_*"))
    if begun and not (folder / _STATE).exists():
        raise ValueError(
            f"{directory} holds checkpoints but not the original parameters, {NAME}: the model "
            "that training began from is not known. Put them back, set "
            "SelfDistillationTrainer.original_path to the checkpoint that training began from, or "
            "train in another directory."
        )
    if begun:
        return load(folder, params, on_host=False)
    frozen = freeze(params)
    # Written anew where a run died before its first checkpoint: it may begin elsewhere now.
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as checkpointer:
        state = {"target": flax_core.unfreeze(frozen)}
        checkpointer.save(folder / _STATE, args=ocp.args.PyTreeSave(state), force=True)
    return frozen


def load(path: str | os.PathLike[str], like: PyTree, *, on_host: bool = True) -> PyTree:
    """The parameters in a checkpoint.

    Args:
      path: what `kept_in` wrote, or the directory of a T5X checkpoint in either format.
      like: parameters of the same tree, shapes and dtypes.
      on_host: as numpy's arrays; otherwise placed like `like`.

    Returns:
      Parameters with the tree and the dtypes of `like`.

    Raises:
      ValueError: nothing is there, or parameters of another model.
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
        partial_restore=True,  # the optimizer stays where it is
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as checkpointer:
        _check_same(folder, checkpointer.metadata(folder).item_metadata.tree["target"], wanted)
        return checkpointer.restore(folder, args=args)["target"]


def _read_legacy(folder: epath.Path, wanted: PyTree, on_host: bool) -> PyTree:
    lazy = checkpoints.load_t5x_checkpoint(os.fspath(folder), lazy_parameters=True)["target"]
    _check_same(folder, lazy, wanted)

    def read(x: Any, to: Any) -> Any:
        there = np.asarray(x.get(), to.dtype)
        if on_host:
            return there
        return jax.make_array_from_callback(there.shape, to.sharding, lambda index: there[index])

    return jax.tree.map(read, lazy, wanted)


def _check_same(folder: epath.Path, stored: PyTree, wanted: PyTree) -> None:
    """Says by name where parameters are those of another model."""

    def shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree.leaves_with_path(tree)
        return {jax.tree_util.keystr(at): tuple(x.shape) for at, x in leaves}

    there, here = shapes(stored), shapes(wanted)
    if there == here:
        return
    name = next(k for k in sorted(there | here) if there.get(k) != here.get(k))
    raise ValueError(
        f"{folder} is of another model: {name} is {there.get(name, 'not there')} in it and "
        f"{here.get(name, 'not there')} in the model being run."
    )
