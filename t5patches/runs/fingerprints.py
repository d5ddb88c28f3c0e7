"""What tells two trees of arrays, two files or two JSON values apart, on every machine alike."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import numpy as np

from t5patches.runs.files import PathLike, require_regular


def fingerprint(tree: Any) -> str:
    """A short text that two trees of arrays share only if they are equal.

    Args:
        tree: arrays in dicts, such as parameters or a batch.

    Returns:
        64 hexadecimal digits, the same on every machine.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def file_fingerprint(path: PathLike) -> str:
    """The same of a file: the SHA-256 of its content.

    Args:
        path: of the file.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: it is a pipe or a device, of which reading may never end.
    """
    require_regular(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_fingerprint(value: Any) -> str:
    """The same of what JSON can say.

    Args:
        value: dicts, lists, texts and numbers; the order of a dict's keys says nothing.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> json_fingerprint({"a": 1, "b": [2]}) == json_fingerprint({"b": (2,), "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
