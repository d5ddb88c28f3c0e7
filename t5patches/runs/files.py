"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PathLike = str | os.PathLike[str]


def unfinished(path: PathLike) -> Path:
    """Where a file or a folder is made until it is whole.

    Args:
        path: of the one to make.

    Returns:
        Of the other, which lies beside it and is removed at the end.
    """
    return Path(f"{Path(path)}.unfinished")


def work_of(output: PathLike) -> Path:
    """Where a command keeps what is finished of a file, to go on from where it was killed.

    Args:
        output: the file.

    Returns:
        A folder beside it.
    """
    return Path(f"{Path(output)}.work")


def write_file(path: PathLike, content: str | bytes) -> None:
    r"""Writes a file that appears whole or not at all: a kill leaves the earlier file.

    Args:
        path: where to.
        content: what to write; text becomes UTF-8, but for halves of characters (of a file's name,
            say), which are spelled `\udcff`.
    """
    part = unfinished(path)
    try:
        with open(part, "wb") as file:
            file.write(
                content.encode(errors="backslashreplace") if isinstance(content, str) else content
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = os.fspath(path)
        raise


def require_regular(path: PathLike) -> None:
    """Refuses what reading may never end of: a pipe, a device.

    Args:
        path: of the file.

    Raises:
        ValueError: there is something else of that name.
        FileNotFoundError: there is nothing.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe or device"
        raise ValueError(f"{os.fspath(path)} is no file but a {kind}")


def read_regular(path: PathLike) -> bytes:
    """Reads a file, and refuses what reading may never end of: a pipe, a device.

    Args:
        path: of the file.

    Returns:
        Its content.

    Raises:
        ValueError: there is something else of that name.
        FileNotFoundError: there is nothing.
    """
    require_regular(path)
    return Path(path).read_bytes()


def read_object(
    path: PathLike,
    remedy: str = "what is in its folder is of no use; remove the folder",
) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: of the file.
        remedy: what to do where it is none; by default, of a file that a run has left.

    Returns:
        The object.

    Raises:
        ValueError: it is something else, or cannot be read.
        FileNotFoundError: there is nothing.
    """
    try:
        found = json.loads(read_regular(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{os.fspath(path)} cannot be read ({type(error).__name__}: {error}): {remedy}"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{os.fspath(path)} must hold an object, got {str(found)[:80]!r}: {remedy}"
        )
    return found


def require_own_file(path: PathLike) -> None:
    """Refuses what is no file of its folder: a link out of it leads to what is not the folder's.

    A download of Hugging Face's is made of links, `snapshots/REVISION/NAME`, where the name may be
    in folders, to `blobs/HASH`: these are the folder's own.

    Args:
        path: of the file.

    Raises:
        ValueError: it is no regular file, or a link that leads elsewhere.
        FileNotFoundError: there is nothing.
    """
    path = Path(path)
    target, folder = path.resolve(), path.parent.resolve()
    downloads = [above.parent / "blobs" for above in folder.parents if above.name == "snapshots"]
    if not (target.is_relative_to(folder) or target.parent in downloads):
        raise ValueError(
            f"{path} is a link to {target}, outside its folder: copy that file there if it is the "
            "model's own"
        )
    require_regular(path)


def require_writable(path: PathLike, what: str) -> None:
    """Refuses a place where no folder can be made.

    Args:
        path: of the folder, which may be there already.
        what: it is for.

    Raises:
        ValueError: what is there of the path is no folder, or nothing can be written to it.
    """
    path = Path(path).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise ValueError(f"{what} is {path}: {there} is no folder, or cannot be written to")


@contextlib.contextmanager
def folder_for_output(path: PathLike) -> Iterator[None]:
    """A folder to write to, made if absent; an exception inside takes it away again if it is empty.

    Args:
        path: of the folder; missing folders above it are made, and taken away, too.
    """
    path = Path(path).absolute()
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # somebody else has put something there
                folder.rmdir()
        raise


@contextlib.contextmanager
def whole_folder(output: PathLike) -> Iterator[Path]:
    """A folder that appears whole or not at all.

    It is filled under another name beside `output`, and renamed once all of it is on the disk. An
    exception inside removes it; a kill leaves it under its other name, which begins with a dot, to
    the next attempt to make `output`, which removes it.

    Args:
        output: the folder to make; missing folders above it are made.

    Yields:
        The folder to fill.

    Raises:
        ValueError: `output` exists.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     output = Path(directory, "a", "folder")
        ...     with whole_folder(output) as partial:
        ...         _ = (partial / "file").write_text("content")
        ...         output.exists()
        ...     (output / "file").read_text()
        False
        'content'
    """
    output = Path(output).absolute()
    if output.exists():
        raise ValueError(
            f"{output} exists: nothing is overwritten. Give another name or remove it."
        )
    with folder_for_output(output.parent):
        for left in output.parent.glob(f".{glob.escape(output.name)}.{'[0-9a-f]' * 8}"):
            with contextlib.suppress(OSError), _locked(left) as nobody_is_at_work:
                if nobody_is_at_work:
                    _remove(left)
        partial = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
        try:
            partial.mkdir()
            with _locked(partial):
                yield partial
                _finish(partial, output)
        except BaseException:
            _remove(partial)
            raise


def _finish(partial: Path, output: Path) -> None:
    # As any new file, by the umask: safetensors lets nobody but the owner read its own.
    readable = partial.stat().st_mode & 0o666
    for folder, _, names in os.walk(partial):
        for name in names:
            Path(folder, name).chmod(readable)
            _flush(Path(folder, name))
        _flush(Path(folder))
    try:
        partial.rename(output)
    except OSError as error:
        if not output.exists():
            raise
        raise ValueError(
            f"{output} exists now: another process has made it in the meantime, and nothing is "
            "overwritten"
        ) from error
    _flush(output.parent)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Locks a folder, until this process ends at the latest; says whether no other one has."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except OSError:  # or the file system has no locks
            alone = False
        yield alone
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    """Removes a folder, to which threads of Tensorstore may yet be writing after it has failed."""
    absent = 0
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        absent = 0 if folder.exists() else absent + 1
        if absent == 2:
            break
        time.sleep(0.1)


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
