"""What is trained and how an update is compiled, for every command that trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding

from t5patches.model.lora import Lora, init_adapter, trained_shapes
from t5patches.model.protocol import LanguageModel, Params
from t5patches.runs import hosts

Rows = tuple[tuple[str, tuple[int, ...], Any], ...]
"""Names, shapes and types of a batch: what a program is compiled for."""

# In what a run that goes on may differ from what it was: neither changes more than rounding.
MAY_DIFFER: Mapping[str, Callable[[Any, Any], bool]] = dict.fromkeys(
    ("checkpoint_every", "remat"), lambda there, asked: True
)
WEIGHT, BELOW = "weight", "below"
"""What is trained with a scalar head: the weight [D] of the head, and the adapter, or the model."""


def require_ranges(settings: Any, least: Mapping[str, float], above_0: Sequence[str]) -> None:
    """Refuses settings that cannot be trained with.

    Args:
        settings: numbers as attributes.
        least: by name, the least that they may be.
        above_0: names of those that must be above 0 and stay finite in float32; None is taken too.

    Raises:
        ValueError: one of them is outside of that; it is named.
    """
    for name, bound in least.items():
        if not getattr(settings, name) >= bound:
            raise ValueError(f"{name} is {getattr(settings, name)}: at least {bound} is needed")
    for name in above_0:
        value = getattr(settings, name)
        if value is not None and not 0 < value < 1e38:
            raise ValueError(f"{name} is {value}: a number above 0 is needed, as float32 has it")


# --- Batches --------------------------------------------------------------------------------------


def rows_of(batch: Mapping[str, Any], count: int | None = None) -> Rows:
    """What a program is compiled for.

    Args:
        batch: arrays by name.
        count: how many rows of it are taken; None for all.

    Returns:
        Their names, shapes and types.
    """
    return tuple(
        (name, x.shape if count is None else (count, *x.shape[1:]), x.dtype)
        for name, x in sorted(batch.items())
    )


def batch_shapes(
    rows: Rows, sharding: jax.sharding.Sharding | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as shapes, to compile with.

    Args:
        rows: of the batch.
        sharding: where it lies; None where that is left to the program.

    Returns:
        Shapes by name.
    """
    on_device = jax.dtypes.canonicalize_dtype  # there the integers of NumPy are int32
    return {
        name: jax.ShapeDtypeStruct(shape, on_device(dtype), sharding=sharding)
        for name, shape, dtype in rows
    }


# --- What is trained ------------------------------------------------------------------------------


class State(NamedTuple):
    """What an update changes.

    Attributes:
        params: what is trained.
        optimizer: what it keeps of them.
    """

    params: Any
    optimizer: optax.OptState


def on_first_device(tree: Any) -> Any:
    """A tree as shapes on the first device, to compile with and to restore as.

    Args:
        tree: of arrays or shapes.

    Returns:
        A tree of `jax.ShapeDtypeStruct`.
    """
    first = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=first), tree)


def state_shapes(trained: Any, optimizer: optax.GradientTransformation) -> State:
    """A state on the first device as shapes; nothing is made.

    Args:
        trained: shapes of what is trained.
        optimizer: trains it.

    Returns:
        A tree of `jax.ShapeDtypeStruct`.
    """
    return on_first_device(State(trained, jax.eval_shape(optimizer.init, trained)))


def with_head(model: LanguageModel, lora: Lora | None) -> dict[str, Any]:
    """What a run trains that has a scalar head on the hidden states, as shapes.

    Args:
        model: the network.
        lora: the adapter that is trained below the head; None trains all parameters.

    Returns:
        `weight` and `below`.
    """
    weight = jax.ShapeDtypeStruct((model.config.emb_dim,), jnp.float32)
    return {WEIGHT: weight, BELOW: dict(trained_shapes(model, lora))}


def begun(
    model: LanguageModel, params: Params, lora: Lora | None, seed: int, like: Params
) -> dict[str, Any]:
    """What a run trains, before its first update.

    Args:
        model: the network.
        params: that it starts from; not changed.
        lora: the adapter that is trained beside them; None trains them all.
        seed: of the adapter.
        like: shapes of what is trained, and where each lies.

    Returns:
        Parameters like those; a head (see `with_head`) is zero.
    """
    if like.keys() == {WEIGHT, BELOW}:
        weight = jnp.zeros_like(like[WEIGHT], device=like[WEIGHT].sharding)
        return {WEIGHT: weight, BELOW: begun(model, params, lora, seed, like[BELOW])}
    start = params if lora is None else init_adapter(model, lora, seed)
    # Copied, as every update gives the memory of its state away.
    return jax.tree.map(
        lambda x, y: hosts.place(jnp.array(x, copy=True), y.sharding), dict(start), like
    )


def updated(
    loss_of: Callable[[Any], tuple[jax.Array, Any]],
    state: State,
    optimizer: optax.GradientTransformation,
) -> tuple[State, jax.Array, Any]:
    """The arithmetic of an update.

    Args:
        loss_of: of what is trained, with what else is to be known.
        state: before.
        optimizer: see `state_shapes`.

    Returns:
        The state after, the loss before, and what else is to be known.
    """
    (loss, more), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, inner = optimizer.update(gradient, state.optimizer, state.params)
    return State(optax.apply_updates(state.params, updates), inner), loss, more
