"""The folder that a long run makes: absent or whole, never overwritten, gone on with after a kill.

A run that makes OUTPUT lives in OUTPUT.unfinished beside it. The folder is written in there, with
a record of what was done, and OUTPUT appears by a rename.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from t5patches.model.huggingface import load_checkpoint, save_checkpoint
from t5patches.model.lora import Lora, merged, save_adapter, weights_fingerprint
from t5patches.model.memory import size
from t5patches.model.protocol import LanguageModel, Params
from t5patches.runs import hosts
from t5patches.runs.claims import as_json, claim, hold, is_of, remove, require_space
from t5patches.runs.files import PathLike, read_object, unfinished

Record = dict[str, Any]
CARD = "README.md"
RECORD = "t5patches.json"  # of `t5patches edit`
ALIGN_RECORD = "align.json"
REWARD_RECORD = "reward.json"
# How their sections in the card begin. Earlier ones of edits are "Edited with" a method.
HEADINGS = {
    RECORD: "## Edited with ",
    ALIGN_RECORD: "## Aligned with a score",
    REWARD_RECORD: "## A reward model",
}


class Output:
    """A folder to make.

    Attributes:
        path: where it appears.
        work: where the run lives until then.
        made: the folder in there, once it is whole.
    """

    def __init__(self, path: PathLike, last: Callable[[Path], Record | None], what: str):
        """Says where; nothing is made yet.

        Args:
            path: of the folder to make.
            last: reads from a folder what was done last to make it, an object with a `job`; None
                where it says nothing.
            what: the run is, for messages, such as "alignment".
        """
        self.path = Path(path).absolute()
        self.work = unfinished(self.path)
        self.made = self.work / "made"
        self._last, self._what = last, what

    def finished(self, job: Mapping[str, Any], *, resume: bool) -> Record | None:
        """Refuses what is there already but for this job, resumed.

        Args:
            job: what makes two jobs the same, of what JSON can say.
            resume: whether to go on with the same job.

        Returns:
            The record of the same job where it is finished; None where it is to be done.

        Raises:
            ValueError: something else is there, or something unfinished that is not to be resumed.
        """

        def check() -> None:
            if os.path.lexists(self.path):
                if not (resume and self._is_of(self.path, job)):
                    raise ValueError(
                        f"{self.path} exists: nothing is overwritten. Give another name or remove "
                        "it"
                    )
                if is_of(self.work, job):  # it was killed as it cleaned up
                    remove(self.work)
            elif self.work.exists() and not resume:
                hold(self.work)  # or another process is at work in it: it is not to be removed
                raise ValueError(
                    f"{self.work} holds an unfinished {self._what}: go on with it (--resume), or "
                    "remove it"
                )

        hosts.once(check)
        return self._last(self.path) if self.path.exists() else None

    def make(
        self,
        job: Mapping[str, Any],
        room: int,
        write: Callable[[], None],
        may_differ: Mapping[str, Callable[[Any, Any], bool]] | None = None,
    ) -> Record:
        """Makes the folder, or goes on where it was killed.

        Args:
            job: see `finished`.
            room: bytes on the disk that the run and its folder take.
            write: does the work in `work` and makes `made`. Where it fails before it has kept
                anything there, nothing is left of the attempt.
            may_differ: see `t5patches.runs.claims.claim`.

        Returns:
            The record.

        Raises:
            ValueError: another job is unfinished there, or another process is at work there.
            FloatingPointError: the run came to no number.
            OSError: the disk has too little room.
        """

        def begin() -> None:
            if self.work.is_symlink():
                raise ValueError(
                    f"{self.work} is a link, and what is made in there is renamed to {self.path}: "
                    "give an --output where there is room, and remove the link"
                )
            require_space(self.work, room, f"the {self._what}")
            hold(self.work)
            if os.path.lexists(self.path):
                if self._is_of(self.path, job):
                    remove(self.work)
                raise ValueError(f"{self.path} exists: another process has made it meanwhile")
            claim(self.work, job, may_differ=may_differ)
            if self.made.exists() and not self._is_of(self.made, job):
                remove(self.made)  # of fewer steps than are asked for now

        def finish() -> None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.made.rename(self.path)
            remove(self.work)

        hosts.once(begin)
        if not hosts.first_says(self.made.exists):
            try:
                write()
            except FloatingPointError as error:
                raise FloatingPointError(
                    f"{error}. To try other settings, such as a lower --learning-rate, remove "
                    f"{self.work}, which holds this run, or give another --output"
                ) from error
            except Exception as error:
                kept = ("run/checkpoints/*", "kept/outputs-*")
                if any(any(self.work.glob(name)) for name in kept):
                    if type(error) is ValueError:
                        raise ValueError(
                            f"{error}. {self.work} keeps what was made so far: for the same "
                            "settings go on there (--resume), for others remove it"
                        ) from error
                elif hosts.is_first():
                    remove(self.work)
                raise
        hosts.once(finish)
        return self._last(self.path) or {}

    def _is_of(self, folder: Path, job: Mapping[str, Any]) -> bool:
        with contextlib.suppress(ValueError):
            record = self._last(folder)
            return record is not None and record.get("job") == as_json(job)
        return False


def record_in(name: str) -> Callable[[Path], Record | None]:
    """Reads the record of a folder that holds one, for `Output`.

    Args:
        name: of its file.

    Returns:
        Given a folder, what it says.
    """

    def last(folder: Path) -> Record | None:
        path = folder / name
        return read_object(path, "remove it or restore it") if path.is_file() else None

    return last


def room_for(folder: PathLike, state: Any, *, whole: bool) -> int:
    """What a run takes on the disk: its folder, and two checkpoints, the last and the next.

    Args:
        folder: of the model that it begins with.
        state: of the run, as shapes.
        whole: whether a folder like that is made, and not an adapter's.

    Returns:
        Bytes.
    """
    files = sum(f.stat().st_size for f in Path(folder).iterdir() if f.is_file())
    return 2 * size(state) + (files if whole else size(state))


def require_adapter_to_merge(merge: bool, lora: Lora | None) -> None:
    """Refuses to merge what is not trained.

    Args:
        merge: see `result`.
        lora: see `result`.

    Raises:
        ValueError: there is no adapter.
    """
    if merge and lora is None:
        raise ValueError("merge adds an adapter to the model, and there is none (--lora)")


def require_unchanged(folder: PathLike, began: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to make anything of a model that is another one by now.

    Args:
        folder: of the model.
        began: what tells the weights apart with which the run began.
        now: the same of those that are there.

    Raises:
        ValueError: they differ.
    """
    if began != now:
        raise ValueError(
            f"the weights in {folder} were changed while this run trained, and what it has trained "
            "goes with the ones before: put those back and go on with it (--resume), or begin again"
        )


def result(
    folder: PathLike, trained: Params, lora: Lora | None, *, merge: bool
) -> tuple[Params, Lora | None]:
    """What a run leaves: all parameters of a model, or those of an adapter alone.

    Args:
        folder: of the model that it began with.
        trained: what was trained.
        lora: the adapter; None where that is all parameters.
        merge: whether an adapter is added to the model's kernels.

    Returns:
        The parameters, and the adapter where they are one's.
    """
    if lora is None or not merge:
        return trained, lora
    return merged(load_checkpoint(folder)[1], trained, lora), None


def save_result(
    output: PathLike,
    model: LanguageModel,
    made: tuple[Params, Lora | None],
    like: PathLike,
    files: Mapping[str, str | bytes],
) -> None:
    """Writes the folder of a model, or of an adapter.

    Args:
        output: the folder to make.
        model: the network.
        made: of `result`.
        like: the folder that it was made from.
        files: more files for it.
    """
    params, lora = made
    if lora is None:
        save_checkpoint(output, model, params, like=like, files=files)
    else:
        save_adapter(output, model, params, lora, base=like, files=files)


def named(folder: PathLike) -> dict[str, str]:
    """How a record names the model that a run began with.

    Args:
        folder: of the model.

    Returns:
        Its name, and what tells its weights apart.
    """
    return {"name": Path(folder).name, "sha256": weights_fingerprint(folder)}


def recorded(job: Mapping[str, Any], **more: Any) -> Record:
    """What every run says of itself.

    Args:
        job: what was asked for.
        **more: what was done.

    Returns:
        The record.
    """
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"job": job, "date": date, **more, "jax": jax.__version__}


def card_with(folder: PathLike, section: str) -> str:
    """A model's card with a section at its end.

    Args:
        folder: of the model.
        section: with its heading.

    Returns:
        The card.
    """
    path = Path(folder) / CARD
    before = path.read_text(encoding="utf-8").rstrip() + "\n\n" if path.exists() else ""
    return before + section


def lies(merge: bool, name: str) -> str:
    """Where an adapter is, for a card.

    Args:
        merge: see `result`.
        name: of the model's folder.

    Returns:
        A few words.
    """
    return "added to its kernels" if merge else f"to lie beside `{name}`"
