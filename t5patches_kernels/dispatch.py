"""Which implementation runs, and why another cannot."""

from __future__ import annotations

import functools
import importlib

import jax

from t5patches_kernels import checks
from t5patches_kernels.backends import chunked_linear as linear_backend
from t5patches_kernels.backends.xla import streaming
from t5patches_kernels.core.operation import Driver, Operands, Operation, columns_of

IMPLEMENTATIONS = ("pallas_tpu", "pallas_gpu", "xla", "reference")
_HOPPER = 9.0
# The best by the platform that JAX runs on, where it runs; elsewhere "xla".
_BEST = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}


def why_not(implementation: str, op: Operation) -> str | None:
    """The reason for which `implementation` cannot run an operation, or None where it can."""
    checks.one_of("implementation", implementation, IMPLEMENTATIONS)
    if implementation == "reference":
        if op.vocab_axis is not None:
            return (
                "the reference is dense and takes whole rows: leave vocab_axis out and gather the "
                'logits first, or use implementation="xla"'
            )
    elif implementation == "pallas_gpu":
        return _why_not_pallas_gpu()
    elif implementation == "pallas_tpu" and jax.default_backend() not in ("tpu", "cpu"):
        return (
            f"it needs a TPU (or a CPU, to be interpreted), not {jax.default_backend()}: use "
            'implementation="xla"'
        )
    return None


def _why_not_pallas_gpu() -> str | None:
    if jax.default_backend() not in ("gpu", "cpu"):
        return (
            "it needs a Hopper GPU (or a CPU, to be interpreted), not "
            f'{jax.default_backend()}: use implementation="xla"'
        )
    if jax.default_backend() == "gpu":
        capability = getattr(jax.devices()[0], "compute_capability", "none")
        if not capability[:1].isdigit() or float(capability) < _HOPPER:
            return (
                f"it needs a GPU of compute capability {_HOPPER} (Hopper) or newer, not "
                f'{capability}: use implementation="xla"'
            )
    try:
        importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    except ImportError as error:
        return (
            f"Mosaic GPU cannot be imported ({error}): install what is missing, or use "
            'implementation="xla"'
        )
    return None


def choose(implementation: str | None, op: Operation, operands: Operands) -> str:
    """The implementation that runs: the one asked for, or the best for this device and these rows.

    Raises:
      NotImplementedError: `implementation` was asked for by name and cannot run.
    """
    if implementation is None:
        best = _BEST.get(jax.default_backend(), "xla")
        return "xla" if why_not(best, op) or _why_not_rows(best, op, operands) else best
    reason = why_not(implementation, op)
    if reason:
        raise NotImplementedError(f"implementation={implementation!r}: {reason}.")
    return implementation


def _why_not_rows(implementation: str, op: Operation, operands: Operands) -> str | None:
    """The reason for which an implementation that can run cannot take rows of this shape."""
    if implementation != "pallas_gpu":
        return None
    from t5patches_kernels.backends.pallas_gpu import kernel as pallas_gpu

    made_in_float32 = (4,)  # by a head
    logits = (*operands.model, *operands.reference)
    itemsizes = made_in_float32 if op.head else tuple(x.dtype.itemsize for x in logits)
    return pallas_gpu.why_not(columns_of(op, operands), itemsizes)


@functools.cache  # one object a choice: programs are cached under their driver
def driver(implementation: str, *, linear: bool) -> Driver:
    """The driver of an implementation that has been chosen.

    Args:
      implementation: any but ``"reference"``.
      linear: whether the operands are hidden states and a head.
    """
    rows = _row_driver(implementation)
    return functools.partial(linear_backend.run, rows) if linear else rows


def _row_driver(implementation: str) -> Driver:
    if implementation == "xla":
        return streaming.run
    # Imported when it is used: Pallas takes longer to import than all of the rest.
    return importlib.import_module(f"t5patches_kernels.backends.{implementation}.kernel").run
