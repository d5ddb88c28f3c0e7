"""The latest state of a run on the disk, whole at any moment, with numbers beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orbax.checkpoint as ocp

from t5patches.runs.claims import writing

History = dict[str, list[float]]


class States:
    """A run's checkpoints, of which the last is kept; for use in a `with` statement.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     with States(directory) as states:
        ...         states.save(3, {"params": {"x": jnp.ones(2)}}, {"history": {"loss": [0.5]}})
        ...     with States(directory) as states:
        ...         states.latest, states.restore({"params": {"x": jnp.zeros(2)}}, "history")
        (3, {'history': {'loss': [0.5]}, 'params': {'x': Array([1., 1.], dtype=float32)}})
    """

    def __init__(self, directory: str | os.PathLike[str]):
        """Opens a directory.

        Args:
            directory: of the run; made if absent.
        """
        self._directory = Path(directory).absolute()
        # Not in the background: the next update reuses the memory that is being written.
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self._directory / "checkpoints", options=options)

    def __enter__(self) -> Self:
        """Nothing more than the states themselves."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Lets go of the directory."""
        self._manager.close()

    @property
    def latest(self) -> int:
        """The step of the state that is there; 0, where a run begins, if there is none."""
        return self._manager.latest_step() or 0

    def save(self, step: int, arrays: Mapping[str, Any], numbers: Mapping[str, Any]) -> None:
        """Writes a state; the one before goes once it is whole.

        Args:
            step: its number; nothing is written where its state is there, or of a run's beginning.
            arrays: trees of arrays by name; None is left out.
            numbers: what JSON can say by name; None is left out.

        Raises:
            OSError: it cannot be written; the state before is kept.
        """
        if step == self.latest:
            return
        items = {
            name: save(value)
            for part, save in ((arrays, ocp.args.StandardSave), (numbers, ocp.args.JsonSave))
            for name, value in part.items()
            if value is not None
        }
        with writing(f"the checkpoint of step {step}", "the one before it, if any, is"):
            self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, like: Mapping[str, Any], *numbers: str) -> dict[str, Any]:
        """Reads the latest state, or a part of it.

        Args:
            like: by name, trees of arrays, or of shapes with shardings, such as the state has; None
                is left out.
            *numbers: names of what lies beside them.

        Returns:
            What was asked for, by name.

        Raises:
            ValueError: the state is spoilt, or of another version of this program.
        """
        items: dict[str, Any] = {name: ocp.args.JsonRestore() for name in numbers}
        items |= {n: ocp.args.StandardRestore(x) for n, x in like.items() if x is not None}
        try:
            found = self._manager.restore(self.latest, args=ocp.args.Composite(**items))
            return {name: found[name] for name in items}
        except Exception as error:  # of a spoilt file Orbax raises just that
            reason = str(error).partition("\n")[0][:300]
            raise ValueError(
                f"the state in {self._directory} cannot be read ({type(error).__name__}: "
                f"{reason}): it is spoilt, or of another version of t5patches; remove the run and "
                "begin again"
            ) from error
