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

from t5patches_kernels.spec.statistics import Array, Functions


def _log2_of_compiler() -> Primitive | None:
    """``log2`` as a primitive of kernels, or None where this JAX has another way to add one."""
    try:
        from jax._src.pallas.mosaic.lowering import register_lowering_rule
    except ImportError:
        return None
    log2 = Primitive("log2")
    log2.def_impl(jnp.log2)
    log2.def_abstract_eval(lambda x: x)
    mlir.register_lowering(log2, mlir.lower_fun(jnp.log2, multiple_results=False))
    register_lowering_rule(log2)(lambda ctx, x: mlir_math.log2(x))
    return log2


_LOG2 = _log2_of_compiler()


def _log2(x: Array) -> Array:
    return _LOG2.bind(x) if _LOG2 is not None else jnp.log2(x)


FUNCTIONS = Functions() if _LOG2 is None else Functions(jnp.exp2, _log2, 1.0 / math.log(2))
