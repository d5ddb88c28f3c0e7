"""Programs that are compiled for batches of known shapes, and what memory they take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

Rows = tuple[tuple[str, tuple[int, ...], Any], ...]
"""Names, shapes and types of a batch: what a program is compiled for."""


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


def batch_shapes(rows: Rows) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as shapes, to compile with.

    Args:
        rows: of the batch.

    Returns:
        Shapes by name.
    """
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in rows}


def on_first_device(tree: Any) -> Any:
    """A tree as shapes on the first device, to compile with and to restore as.

    Args:
        tree: of arrays or shapes.

    Returns:
        A tree of `jax.ShapeDtypeStruct`.
    """
    first = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=first), tree)


def size(tree: Any) -> int:
    """What a tree takes.

    Args:
        tree: of arrays or shapes.

    Returns:
        Bytes.
    """
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def working_memory(program: Any, held: Any) -> int:
    """What a compiled program holds beside arguments that are there before and after it.

    Args:
        program: of `jax.jit(...).lower(...).compile()`.
        held: these arguments, as arrays or shapes.

    Returns:
        Bytes.
    """
    memory = program.memory_analysis()
    given = max(0, memory.argument_size_in_bytes - size(held))
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + made + given
