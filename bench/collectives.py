"""What moves between devices, read off a compiled program."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
_COLLECTIVE = re.compile(rf" = (.*?) ({_KINDS})(?:-start)?\(")


class Collective(NamedTuple):
    """One collective operation, as a device sees it."""

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]  # dtype and shape of each result
    of: str  # JAX's name of the operation that asked for it

    @property
    def largest(self) -> int:
        """Elements of its largest array."""
        return max(math.prod(shape) for _, shape in self.arrays)


def moved(text: str) -> list[Collective]:
    """The collectives in the text of a compiled program, in its order.

    XLA puts several of one kind into one, under the name of one of them. One that is started and
    awaited apart may name its operand among its results.
    """
    found = []
    for line in text.splitlines():
        match = _COLLECTIVE.search(line)
        if match:
            arrays = tuple(
                (dtype, tuple(int(n) for n in dims.split(",") if n))
                for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            )
            name = re.search(r'op_name="([^"]*)"', line)
            found.append(Collective(match[2], arrays, name[1] if name else ""))
    return found
