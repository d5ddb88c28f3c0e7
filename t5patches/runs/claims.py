"""Work that takes long lives in a directory, so that a killed run goes on and no other does.

`run.json` in the directory says what the run is: settings, and fingerprints of everything that it
starts from. Whoever comes with the same goes on from there; anything else is refused.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from t5patches.runs.files import PathLike, read_object, unfinished, write_file
from t5patches.runs.fingerprints import json_fingerprint

_RUN, _BEGAN = "run.json", "began"
_STARTED = datetime.datetime.now().isoformat()


def claim(
    directory: PathLike,
    run: Mapping[str, Any],
    *,
    may_differ: Mapping[str, Callable[[Any, Any], bool]] | None = None,
) -> None:
    """Writes what the run is, or checks that the run already there is the same one.

    Args:
        directory: of the run; made if absent.
        run: settings and fingerprints, of what JSON can say; what it does not name is None.
        may_differ: for the names that the same run may have with another value, whether the value
            there may become the one asked for. It is then written.

    Raises:
        ValueError: the directory holds another run, all that differs is named; or something that
            is of no run, and would be removed with it.
    """
    path, run = Path(directory) / _RUN, as_json(run)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        own = {unfinished(path), path.with_name(_BEGAN)}
        if others := sorted({*path.parent.iterdir()} - own):
            more = f" and {len(others) - 1} more" if others[1:] else ""
            raise ValueError(
                f"{directory} is where this run would work, and holds {others[0].name!r}{more}, "
                "which are of no run: move them away, or choose another output"
            )
        write_file(path, json.dumps(run, indent=1))
        return
    there = read_object(path)
    differences = list(_differences(there, run, may_differ or {}))
    if differences:
        raise ValueError(
            f"{directory} holds another run, which differs in {'; '.join(differences)}: choose "
            "another directory, remove this one, or repeat that run to finish it"
        )
    if may_differ and run != there:
        write_file(path, json.dumps(run, indent=1))


def is_of(directory: PathLike, run: Mapping[str, Any]) -> bool:
    """Whether a directory holds this very run.

    Args:
        directory: that may be there.
        run: see `claim`.

    Returns:
        False for another one, and for none.
    """
    path = Path(directory) / _RUN
    return path.exists() and not list(_differences(read_object(path), as_json(run), {}))


def as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON gives back of a value, to compare with what was read: lists, not tuples.

    Args:
        value: of what JSON can say.

    Returns:
        Another one.
    """
    return json.loads(json.dumps(value))


def hold(directory: PathLike) -> None:
    """Keeps every other process out of a directory, until this one ends or removes it.

    Args:
        directory: of a run; made if absent.

    Raises:
        ValueError: another process holds it.
    """
    path = Path(directory).absolute()
    if path in _HELD:
        return
    handle, alone = _locked(path)
    if not alone:
        os.close(handle)
        raise ValueError(
            f"another process is at work in {directory}: wait until it has ended, or give another "
            "output"
        )
    _HELD[path] = handle
    if not (path / _BEGAN).exists():
        write_file(path / _BEGAN, _STARTED)


@contextlib.contextmanager
def in_turn(directory: PathLike, wait: Callable[[], object]) -> Iterator[None]:
    """Keeps other processes out of a directory for as long as something is done there.

    Of several that share what is made there, the first makes it and the others find it.

    Args:
        directory: made if absent.
        wait: called before this process waits for another one to be through.
    """
    path = Path(directory).absolute()
    if path in _HELD:  # it would wait for itself
        yield
        return
    handle, alone = _locked(path)
    try:
        if not alone:
            wait()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _locked(path: Path) -> tuple[int, bool]:
    """A handle of a directory, made if absent, and whether no other process has locked it."""
    path.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return handle, False
    except OSError:
        pass  # a file system that has no locks
    return handle, True


def began(directory: PathLike | None) -> datetime.datetime:
    """When the run in a directory began, for what it is to do alike whenever it goes on.

    Args:
        directory: of the run, see `hold`; need not exist. None for a run that keeps nothing.

    Returns:
        The local time at which the process started that was the first to hold it; where there was
        none, this one.
    """
    if directory is not None:
        with contextlib.suppress(ValueError, OSError):  # of a run before there was such a file
            return datetime.datetime.fromisoformat((Path(directory) / _BEGAN).read_text())
    return datetime.datetime.fromisoformat(_STARTED)


_HELD: dict[Path, int] = {}


def remove(directory: PathLike) -> None:
    """Removes a directory and all in it; what says whose it is goes last.

    So a kill on the way leaves nothing that another run takes for its own.

    Args:
        directory: of the run, or one that holds such directories.
    """
    directory = Path(directory).absolute()
    for path in sorted(
        directory.iterdir(), key=lambda path: (path.name == _RUN, path.name == _BEGAN)
    ):
        if path.is_dir() and not path.is_symlink():
            remove(path)
        else:
            path.unlink()
    directory.rmdir()
    if directory in _HELD:
        os.close(_HELD.pop(directory))


def _differences(
    there: Mapping[str, Any],
    asked: Mapping[str, Any],
    may_differ: Mapping[str, Callable[[Any, Any], bool]],
) -> Iterator[str]:
    for name in {**asked, **there}:
        old, value = there.get(name), asked.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            yield from _differences(old, value, may_differ)
        elif old != value and not (
            # What is there may be of any type, and the next one only of the same.
            type(old) is type(value) and name in may_differ and may_differ[name](old, value)
        ):
            yield f"{name} ({old} there, {value} asked for)"


def require_space(directory: PathLike, size: int, what: str) -> None:
    """Refuses to begin what the disk has no room for.

    Args:
        directory: where it is to be written; need not exist yet.
        size: in bytes.
        what: it is, for the message.

    Raises:
        OSError: less is free.
    """
    place = Path(directory).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size:
        raise OSError(
            errno.ENOSPC,
            f"{what} needs {size / 2**20:.1f} MiB of disk space and {free / 2**20:.1f} MiB are "
            "free: make room, or choose a directory on another disk",
            os.fspath(place),
        )


@contextlib.contextmanager
def writing(what: str, left: str) -> Iterator[None]:
    """Turns what fails in writing into an `OSError` of a line.

    Tensorstore has ways of its own to say it, and Orbax logs a traceback for each of its threads.

    Args:
        what: is being written.
        left: what is there in any case.

    Raises:
        OSError: for any exception inside.
    """
    threads = logging.getLogger("absl")
    disabled, threads.disabled = threads.disabled, True
    try:
        yield
    except Exception as error:
        said = str(error)
        reason = next((f for f in _FULL if f in said), said.partition("\n")[0][:300])
        raise OSError(
            f"{what} cannot be written ({reason}): {left} kept; make room and go on"
        ) from error
    finally:
        threads.disabled = disabled


_FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""What is said of a disk, a quota and a file that can take no more."""


class Parts:
    """The finished parts of a long piece of work, each in a file of its own.

    Each says which run it is of, beside what the directory says.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     for _ in range(2):  # the second time as after a kill
        ...         parts = Parts(directory, {"seed": 0})
        ...         parts.get("first", lambda: print("made") or [1, 2])
        made
        [1, 2]
        [1, 2]
    """

    def __init__(self, directory: PathLike, run: Mapping[str, Any]):
        """Opens a directory, which then belongs to this run.

        Args:
            directory: made if absent.
            run: see `claim`.

        Raises:
            ValueError: the directory holds another run, or another process is at work in it.
        """
        hold(directory)
        claim(directory, run)
        self._directory = Path(directory)
        self._run = json_fingerprint(run)

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """A part: read where it is finished, made and kept where it is not.

        Args:
            name: of the part, fit for a file name.
            make: makes it; what it returns must be what JSON gives back (lists, not tuples).

        Returns:
            The part.
        """
        path = self._directory / f"{name}.json"
        if path.exists():
            with contextlib.suppress(ValueError):  # a part that cannot be read is made again
                found = read_object(path)
                if found.keys() == {"run", "part"} and found["run"] == self._run:
                    return found["part"]
        part = make()
        write_file(path, json.dumps({"run": self._run, "part": part}))
        return part

    def remove(self) -> None:
        """Throws the parts away, once what they make up is safe elsewhere."""
        remove(self._directory)


def make_part(name: str, make: Callable[[], Any]) -> Any:
    """Instead of `Parts.get` where nothing is kept.

    Args:
        name: not used.
        make: makes the part.

    Returns:
        What `make` makes.
    """
    return make()
