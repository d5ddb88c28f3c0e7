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

    def done() -> int:
        work()
        return 0

    first_says(done)


def first_says(question: Callable[[], int]) -> int:
    """The first process's answer, in every process.

    What a process reads from a file may have changed by the time another one looks, and they must
    not part ways over it.

    Args:
        question: what the first process alone is asked.

    Returns:
        Its answer.

    Raises:
        ValueError: in the others, saying why the first one could not. It raises its own error.
    """
    if jax.process_count() == 1:
        return question()
    said = b""
    try:
        if is_first():
            said = b"%d" % question()
    except BaseException as error:
        said = f"{_FAILED}{type(error).__name__}: {error}".encode()[:_LONGEST]
        raise
    finally:
        heard = _of_the_first(said).decode(errors="replace")
    if heard.startswith(_FAILED):
        raise ValueError(f"the first process could not go on: {heard.removeprefix(_FAILED)}")
    return int(heard)


_FAILED = "failed: "
_LONGEST = 4096


def _of_the_first(said: bytes) -> bytes:
    """What the first process says, in every process.

    `multihost_utils.broadcast_one_to_all` waits for one of a process's devices. Where another one
    of them is not through when the processes leave, JAX takes its connections down and waits for
    it for ever.
    """
    devices = jax.sharding.Mesh(jax.devices(), "all")
    each, same = (
        jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec(*axes))
        for axes in (("all",), ())
    )
    row = np.zeros((1, _LONGEST), np.uint8)
    row[0, : len(said)] = np.frombuffer(said, np.uint8)

    def of_device(index: Any) -> np.ndarray:
        return row if index[0].start == 0 else np.zeros_like(row)  # the first process's first

    rows = jax.make_array_from_callback((devices.size, _LONGEST), each, of_device)
    total = jax.jit(lambda x: x.sum(0, dtype=x.dtype), out_shardings=same)(rows)
    return bytes(np.asarray(jax.block_until_ready(total).addressable_data(0))).rstrip(b"\0")


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
