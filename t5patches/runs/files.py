"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file that appears whole or not at all: a kill leaves the earlier file.

    Args:
        path: where to.
        content: what to write; text becomes UTF-8.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
