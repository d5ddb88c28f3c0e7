"""Which implementation runs, and why another cannot."""

from __future__ import annotations

from functools import partial

from t5patches_kernels import checks
from t5patches_kernels.backends import linear, xla
from t5patches_kernels.operation import Driver, Operation

IMPLEMENTATIONS = ("pallas_tpu", "pallas_gpu", "xla", "reference")
_ROW_DRIVERS: dict[str, Driver] = {"xla": xla.run}


def why_not(implementation: str, op: Operation) -> str | None:
    """The reason for which `implementation` cannot run an operation, or None where it can."""
    checks.one_of("implementation", implementation, IMPLEMENTATIONS)
    if implementation == "reference":
        if op.vocab_axis is not None:
            return (
                "the reference is dense and takes whole rows: leave vocab_axis out and gather the "
                'logits first, or use implementation="xla"'
            )
    elif implementation not in _ROW_DRIVERS:
        return f'{implementation} is not in this version of the library: use implementation="xla"'
    return None


def choose(implementation: str | None, op: Operation) -> str:
    """The implementation that runs: the one asked for, or the best proven for this device.

    Raises:
      NotImplementedError: `implementation` was asked for by name and cannot run.
    """
    if implementation is None:
        return "xla"
    reason = why_not(implementation, op)
    if reason:
        raise NotImplementedError(f"implementation={implementation!r}: {reason}.")
    return implementation


def driver(implementation: str, op: Operation) -> Driver:
    """The driver of an implementation that has been chosen."""
    rows = _ROW_DRIVERS[implementation]
    return _LINEAR[implementation] if op.head else rows


# One object per implementation: a driver is part of what a compiled program is cached under.
_LINEAR: dict[str, Driver] = {name: partial(linear.run, run) for name, run in _ROW_DRIVERS.items()}
