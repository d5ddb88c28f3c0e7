"""Exponential and logarithm for TPU kernels: the chip's own, which are to base 2.

`jnp.log` multiplies what the chip returns by ln 2, entry by entry. With values in bits only sums
and factors of rows are multiplied. JAX has a primitive for ``2^x`` and none for ``log2``, which the
kernels' compiler knows; where JAX does not let one be added, values are in nats.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.extend.mlir.dialects import math as mlir_math
from jax.interpreters import mlir

from t5patches_kernels.core.statistics import Functions


def _functions() -> Functions:
    try:
        from jax._src.pallas.mosaic.lowering import register_lowering_rule
    except ImportError:
        return Functions()
    log2 = Primitive("log2")
    log2.def_impl(jnp.log2)
    log2.def_abstract_eval(lambda x: x)
    mlir.register_lowering(log2, mlir.lower_fun(jnp.log2, multiple_results=False))
    register_lowering_rule(log2)(lambda ctx, x: mlir_math.log2(x))
    return Functions(jnp.exp2, log2.bind, 1.0 / math.log(2))


FUNCTIONS = _functions()
