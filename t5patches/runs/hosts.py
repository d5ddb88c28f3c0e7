"""Several processes with one task, each with devices of its own: who writes, and who waits.

All run the same program on the same files, which lie where each can read them. What must be done
once is done by the first of them. With one process nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def connect(address: Sequence[str]) -> None:
    """Makes this process one of several; before anything asks JAX for its devices.

    Args:
        address: ``HOST:PORT`` of the first process, how many there are, and which of them this is,
            from 0; or nothing where the machine knows: on a TPU pod, under Slurm or Open MPI.

    Raises:
        ValueError: it is of another form, the others cannot be found or do not come.
    """
    if len(address) not in (0, 3) or not all(x.isdecimal() for x in address[1:]):
        raise ValueError(
            f"got {' '.join(address)}: HOST:PORT of the first process, their number and this "
            "one's, from 0, are needed, or nothing on a TPU pod, under Slurm or Open MPI"
        )
    try:
        if address:
            jax.distributed.initialize(address[0], int(address[1]), int(address[2]))
        else:
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the processes do not find one another: {error}") from error


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


def once(work: Callable[[], object]) -> None:
    """Has the first process do something while the others wait.

    Args:
        work: what to do.

    Raises:
        ValueError: in the others, saying why the first one could not. It raises its own error.
    """
    if jax.process_count() == 1:
        work()
        return
    told = np.zeros(_LONGEST, np.uint8)
    try:
        if is_first():
            work()
    except BaseException as error:
        said = f"{type(error).__name__}: {error}".encode()[:_LONGEST]
        told[: len(said)] = np.frombuffer(said, np.uint8)
        raise
    finally:
        heard = bytes(np.asarray(multihost_utils.broadcast_one_to_all(told), np.uint8))
    reason = heard.rstrip(b"\0").decode(errors="replace")
    if reason:
        raise ValueError(f"the first process could not go on: {reason}")


_LONGEST = 4096


def first_says(question: Callable[[], int]) -> int:
    """The first process's answer, in every process.

    What a process reads from a file may have changed by the time another one looks, and they must
    not part ways over it.

    Args:
        question: what the first process alone is asked; as `once` has it where it raises.

    Returns:
        Its answer.
    """
    answers: list[int] = []
    once(lambda: answers.append(question()))
    if jax.process_count() == 1:
        return answers[0]
    held = np.asarray(answers[0] if answers else 0, np.int32)
    return int(multihost_utils.broadcast_one_to_all(held))


def place(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Puts an array where a sharding says, also on devices of other processes.

    Args:
        x: the whole array, the same in every process.
        sharding: of the result.

    Returns:
        The array of all processes.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    held = np.asarray(x)
    return jax.make_array_from_callback(held.shape, sharding, lambda index: held[index])


def whole(tree: Any) -> Any:
    """Arrays of all processes as each can read them.

    Args:
        tree: of arrays.

    Returns:
        The same where this process has all of them; else numpy arrays.
    """

    def read(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x
        if x.is_fully_replicated:
            return np.asarray(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(read, tree)
