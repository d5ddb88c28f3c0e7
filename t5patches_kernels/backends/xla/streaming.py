"""Streaming XLA in the form that suits the platform a program is compiled for.

The choice is made when the program is lowered, so it is right for `jax.jit` on another device than
the default one and for compiling ahead of time.
"""

from __future__ import annotations

from functools import partial

import jax

from t5patches_kernels.backends import tiling
from t5patches_kernels.backends.xla import cpu_math, driver, gpu_form
from t5patches_kernels.core.operation import Operands, Operation, Result, Stage, Tokens
from t5patches_kernels.core.statistics import Functions, Numbers


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
        gpu=partial(gpu_form.run, op, stage),
        tpu=partial(driver.run, driver.Form(Functions(), whole=False), op, stage),
        default=partial(driver.run, driver.Form(cpu_math.FUNCTIONS, whole=True), op, stage),
    )
