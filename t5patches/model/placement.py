"""Which device holds what: batches split over the data axis, large matrices over the model axis.

The parameters' logical axes are those that T5X's own partitioning goes by, and so are the names of
the mesh's axes, by which the losses find it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from t5patches.model.t5.network import T5Config, Transformer

DATA, MODEL = "data", "model"
_SPLIT = ("vocab", "mlp", "heads", "joined_kv")


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


def check_mesh(mesh: Mesh, model: T5Config, batch_size: int) -> None:
    """Refuses sizes that the mesh does not divide.

    Args:
        mesh: of `make_mesh`.
        model: the sizes of the T5.
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
    if model.vocab_size % vocabulary:
        raise ValueError(
            f"a vocabulary of {model.vocab_size} cannot be divided by {vocabulary} devices: "
            "choose a model_parallel that divides it"
        )


def param_shardings(mesh: Mesh, model: T5Config) -> dict[str, Any]:
    """Where each parameter lies.

    Args:
        mesh: of `make_mesh`.
        model: the sizes of the T5.

    Returns:
        A tree of shardings, shaped like the parameters.
    """
    n = mesh.shape[MODEL]
    size = {"vocab": model.vocab_size, "mlp": model.mlp_dim}
    # Heads are not cut through, and what has them in it goes with them.
    size |= dict.fromkeys(("heads", "joined_kv"), model.num_heads)

    def placed(names: Sequence[str]) -> NamedSharding:
        split = [MODEL if name in _SPLIT and size[name] % n == 0 else None for name in names]
        return NamedSharding(mesh, PartitionSpec(*split))

    return traverse_util.unflatten_dict({k: placed(v) for k, v in _logical_axes(model).items()})


def state_shardings(
    mesh: Mesh, model: T5Config, params: Any, state: Any, optimizer: optax.GradientTransformation
) -> Any:
    """Where the optimizer's numbers lie: moments with their parameter, the rest everywhere.

    Args:
        mesh: of `make_mesh`.
        model: the sizes of the T5.
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
        param_shardings(mesh, model),
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


@functools.lru_cache(maxsize=4)
def _variables(model: T5Config) -> Any:
    ids = jax.ShapeDtypeStruct((1, 2), np.int32)
    init = functools.partial(Transformer(model).init, enable_dropout=False)
    return jax.eval_shape(init, jax.random.key(0), ids, ids, ids)


def param_shapes(model: T5Config) -> Any:
    """The shapes and types of the parameters, none of which is made.

    Args:
        model: the sizes of the T5.

    Returns:
        A tree of `jax.ShapeDtypeStruct`.
    """
    return _variables(model)["params"]


def _logical_axes(model: T5Config) -> Mapping[tuple[str, ...], Sequence[str]]:
    flat = traverse_util.flatten_dict(_variables(model)["params_axes"])
    return {(*path, name.removesuffix("_axes")): axes.names for (*path, name), axes in flat.items()}
