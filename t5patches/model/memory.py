"""What arrays and compiled programs take on a device."""

from __future__ import annotations

import ctypes
import math
import sys
from typing import Any

import jax


def size(tree: Any) -> int:
    """What a tree takes in all.

    Args:
        tree: of arrays or shapes.

    Returns:
        Bytes.
    """
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def held(tree: Any) -> int:
    """What a tree takes on one device.

    Args:
        tree: of arrays or shapes, with or without shardings.

    Returns:
        Bytes.
    """
    return sum(math.prod(_here(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _here(x: Any) -> tuple[int, ...]:
    sharding = getattr(x, "sharding", None)
    return x.shape if sharding is None else sharding.shard_shape(x.shape)


def beside(arguments: Any, program: Any) -> int:
    """What a compiled program holds on a device beside arguments that are there in any case.

    Args:
        arguments: these, as arrays or shapes; what the program takes the place of is among them.
        program: what `jax.jit(...).lower(...).compile()` gives.

    Returns:
        Bytes.
    """
    memory = program.memory_analysis()
    given = max(0, memory.argument_size_in_bytes - held(arguments))
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes + made + given


def give_back() -> None:
    """Gives what this process has freed back to the system, which glibc does not by itself.

    What reading a model and compiling for it took would stay in its heaps: beside 135 million
    parameters over a GiB, which the arrays of an update, too large for the heaps, cannot use.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other libraries have none
        if trim is not None:
            trim(0)


def compiled(program: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles, and gives back what that took.

    Args:
        program: lowered.

    Returns:
        The program; it says what memory it takes.
    """
    made = program.compile()
    give_back()
    return made
