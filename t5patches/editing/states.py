"""The latest state of a run on the disk, whole at any moment, and its history."""

from __future__ import annotations

import os
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
        ...         states.save(3, {"x": jnp.ones(2)}, {"loss": [0.5]})
        ...     with States(directory) as states:
        ...         states.latest, states.restore({"x": jnp.zeros(2)})
        (3, ({'x': Array([1., 1.], dtype=float32)}, {'loss': [0.5]}))
    """

    def __init__(self, directory: str | os.PathLike[str]):
        """Opens a directory.

        Args:
            directory: of the run; made if absent.
        """
        # Not in the background: the next update reuses the memory that is being written.
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(
            Path(directory).absolute() / "checkpoints", options=options
        )

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
    def latest(self) -> int | None:
        """The step of the state that is there; None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, history: History) -> None:
        """Writes a state; the one before goes once it is whole.

        Args:
            step: its number; nothing is written where its state is there.
            state: a tree of arrays.
            history: numbers by name.

        Raises:
            OSError: it cannot be written; the state before is kept.
        """
        if step == self.latest:
            return
        with writing(f"the checkpoint of step {step}", "the one before it, if any, is"):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), history=ocp.args.JsonSave(history)
                ),
            )

    def restore(self, like: Any) -> tuple[Any, History]:
        """Reads the latest state.

        Args:
            like: a tree of arrays, or of shapes with shardings, such as the state has.

        Returns:
            The state and the history up to it.
        """
        found = self._manager.restore(
            self.latest,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(like), history=ocp.args.JsonRestore()
            ),
        )
        return found.state, found.history
