"""The folder that a long run makes: absent or whole, never overwritten, gone on with after a kill.

A run that makes OUTPUT lives in OUTPUT.unfinished beside it. The folder is written in there, with
a record of what was done, and OUTPUT appears by a rename.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from t5patches.runs.claims import claim, hold, remove, require_space
from t5patches.runs.files import read_object

PathLike = str | os.PathLike[str]


class Output:
    """A folder to make.

    Attributes:
        path: where it appears.
        work: where the run lives until then.
        made: the folder in there, once it is whole.
    """

    def __init__(self, path: PathLike, record: str, what: str):
        """Says where; nothing is made yet.

        Args:
            path: of the folder to make.
            record: the name of the file in it that says what was done, an object with a `job`.
            what: the run is, for messages, such as "an alignment".
        """
        self.path = Path(path).absolute()
        self.work = self.path.with_name(self.path.name + ".unfinished")
        self.made = self.work / "made"
        self._record, self._what = record, what

    def finished(self, job: Mapping[str, Any], *, resume: bool) -> dict[str, Any] | None:
        """Refuses what is there already but for this job, resumed.

        Args:
            job: what makes two jobs the same, as JSON has it.
            resume: whether to go on with the same job.

        Returns:
            The record of the same job where it is finished; None where it is to be done.

        Raises:
            ValueError: something else is there, or something unfinished that is not to be resumed.
        """
        if self.path.exists():
            there = self.path / self._record
            record = read_object(there) if there.is_file() else {}
            if not (resume and record.get("job") == json.loads(json.dumps(job))):
                raise ValueError(
                    f"{self.path} exists: nothing is overwritten. Give another name or remove it"
                )
            if self.work.exists():
                remove(self.work)
            return record
        if self.work.exists() and not resume:
            hold(self.work)  # or another process is at work in it, and it is not to be removed
            raise ValueError(
                f"{self.work} holds {self._what} that is not finished: go on with it (--resume), "
                "or remove it"
            )
        return None

    def make(self, job: Mapping[str, Any], size: int, write: Callable[[], None]) -> dict[str, Any]:
        """Makes the folder, or goes on where it was killed.

        Args:
            job: see `finished`.
            size: bytes on the disk that the run and its folder take.
            write: does the work in `work` and makes `made`. Where it fails before it has kept
                anything there, nothing is left of the attempt.

        Returns:
            The record.

        Raises:
            ValueError: another job is unfinished there, or another process is at work there.
            OSError: the disk has too little room.
        """
        require_space(self.work, size, self._what)
        hold(self.work)
        claim(self.work, job)
        if not self.made.exists():
            try:
                write()
            except Exception:
                if not any(self.work.glob("run/checkpoints/*")):
                    remove(self.work)
                raise
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.made.rename(self.path)
        remove(self.work)
        return read_object(self.path / self._record)
