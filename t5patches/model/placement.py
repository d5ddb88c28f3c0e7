"""Which device holds what: batches split over the data axis, large matrices over the model axis.

A model says which logical axes its parameters have. The names of the mesh's axes are T5X's, by
which the losses find it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from t5patches.model.protocol import LanguageModel

DATA, MODEL = "data", "model"


def make_mesh(model_parallel: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges the devices of this process.

    Args:
        model_parallel: over how many devices the vocabulary (and the other large matrices) are
            split; the rest multiply the examples handled at a time.
        devices: default, all there are.

    Returns:
        A mesh with the axes `data` and `model`.

    Raises:
        ValueError: the devices cannot be divided so.
    """
    devices = jax.devices() if devices is None else list(devices)
    if model_parallel < 1 or len(devices) % model_parallel:
        raise ValueError(
            f"model_parallel is {model_parallel} and there are {len(devices)} devices "
            f"({devices[0].device_kind}): it must divide their number"
        )
    grid = np.array(devices).reshape(-1, model_parallel)
    return Mesh(grid, (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def over(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Inside it the losses find the mesh by themselves.

    Args:
        mesh: of `make_mesh`; None is the first device alone.

    Returns:
        A context.
    """
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def check_mesh(mesh: Mesh, model: LanguageModel, batch_size: int) -> None:
    """Refuses sizes that the mesh does not divide.

    Args:
        mesh: of `make_mesh`.
        model: the model.
        batch_size: examples in an update.

    Raises:
        ValueError: saying which.
    """
    data, vocabulary = mesh.shape[DATA], mesh.shape[MODEL]
    if batch_size % data:
        raise ValueError(
            f"a batch of {batch_size} examples cannot be divided by {data} devices: take a "
            f"batch size that is a multiple of {data}, or more model-parallel devices"
        )
    if model.config.vocab_size % vocabulary:
        raise ValueError(
            f"a vocabulary of {model.config.vocab_size} cannot be divided by {vocabulary} devices: "
            "choose a model_parallel that divides it"
        )


def param_shardings(mesh: Mesh, model: LanguageModel) -> dict[str, Any]:
    """Where each parameter lies.

    Args:
        mesh: of `make_mesh`.
        model: the model.

    Returns:
        A tree of shardings, shaped like the parameters.
    """
    return shardings_by_axes(mesh, model, model.param_axes())


def shardings_by_axes(
    mesh: Mesh, model: LanguageModel, axes: Mapping[tuple[str, ...], Sequence[str]]
) -> dict[str, Any]:
    """Where arrays lie whose axes have the names of the model's.

    Args:
        mesh: of `make_mesh`.
        model: the model.
        axes: the logical axes of each array, by its path in the tree.

    Returns:
        The tree of shardings.
    """
    n, units = mesh.shape[MODEL], model.axis_units()

    def placed(names: Sequence[str]) -> NamedSharding:
        split = [MODEL if name in units and units[name] % n == 0 else None for name in names]
        return NamedSharding(mesh, PartitionSpec(*split))

    return traverse_util.unflatten_dict({path: placed(names) for path, names in axes.items()})


def state_shardings(
    mesh: Mesh,
    shardings: Any,
    params: Any,
    state: Any,
    optimizer: optax.GradientTransformation,
) -> Any:
    """Where the optimizer's numbers lie: moments with their parameter, the rest everywhere.

    Args:
        mesh: of `make_mesh`.
        shardings: of the parameters.
        params: the parameters or their shapes.
        state: what the optimizer keeps, or its shapes.
        optimizer: made the state.

    Returns:
        A tree of shardings, shaped like `state`.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def placed(leaf: Any, param: Any, sharding: NamedSharding) -> NamedSharding:
        return sharding if leaf.shape == param.shape else everywhere

    return optax.tree_utils.tree_map_params(
        optimizer,
        placed,
        state,
        params,
        shardings,
        transform_non_params=lambda _: everywhere,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where the rows of a batch lie.

    Args:
        mesh: of `make_mesh`.

    Returns:
        One sharding for every array of a batch.
    """
    return NamedSharding(mesh, PartitionSpec(DATA))
