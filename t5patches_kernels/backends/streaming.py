"""Streaming XLA in the form that suits the platform a program is compiled for.

The choice is made when the program is lowered, so it is right for `jax.jit` on another device than
the default one and for compiling ahead of time.
"""

from __future__ import annotations

from functools import partial

import jax

from t5patches_kernels import tiling
from t5patches_kernels.backends import cpu_functions, xla, xla_gpu
from t5patches_kernels.operation import Operands, Operation, Result, Stage, Tokens
from t5patches_kernels.spec.statistics import Functions, Numbers


@partial(jax.jit, static_argnums=(0, 1))
def run(
    op: Operation,
    stage: Stage,
    operands: Operands,
    tokens: Tokens,
    numbers: Numbers | None = None,
    by: Numbers | None = None,
) -> Result:
    """The driver (`operation.Driver`)."""
    return tiling.by_platform(
        (operands, tokens, numbers, by),
        gpu=partial(xla_gpu.run, op, stage),
        tpu=partial(xla.run, xla.Form(Functions(), whole=False), op, stage),
        default=partial(xla.run, xla.Form(cpu_functions.FUNCTIONS, whole=True), op, stage),
    )
