"""Which implementation runs, and why another cannot."""

from __future__ import annotations

import warnings
from functools import partial

import jax

from t5patches_kernels import checks
from t5patches_kernels.backends import linear, pallas_tpu, streaming
from t5patches_kernels.operation import Driver, Operation

IMPLEMENTATIONS = ("pallas_tpu", "pallas_gpu", "xla", "reference")
_ROW_DRIVERS: dict[str, Driver] = {"xla": streaming.run, "pallas_tpu": pallas_tpu.run}
# The best proven by the platform that JAX runs on; elsewhere "xla".
_BEST = {"tpu": "pallas_tpu"}


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
    elif implementation == "pallas_tpu" and jax.default_backend() not in ("tpu", "cpu"):
        return (
            f"it needs a TPU (or a CPU, to be interpreted), not {jax.default_backend()}: use "
            'implementation="xla"'
        )
    return None


def choose(implementation: str | None, op: Operation) -> str:
    """The implementation that runs: the one asked for, or the best proven for this device.

    Raises:
      NotImplementedError: `implementation` was asked for by name and cannot run.
    """
    if implementation is None:
        best = _BEST.get(jax.default_backend(), "xla")
        reason = why_not(best, op)
        if reason:
            warnings.warn(f"the losses run as XLA and not as {best}: {reason}.", stacklevel=5)
        return "xla" if reason else best
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
