"""Exponential and logarithm for XLA on CPUs, on the arguments that rows of logits give.

XLA's own serve every float: denormal numbers, infinities, zeros and negative arguments of a
logarithm. Here an exponential's argument is at most 0 and a logarithm's a normal positive number;
what is left is a polynomial on a reduced argument and a few operations on the exponent's bits.
`make bench` shows the time of both, `tests/test_cpu_functions.py` the errors of both.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from t5patches_kernels.core.statistics import Array, Functions

_MANTISSA_BITS = 23
# ln 2 as a sum whose first part has so few bits that its product with an exponent is exact.
_LN2_HIGH = round(math.log(2) * 2**15) / 2**15
_LN2_LOW = math.log(2) - _LN2_HIGH
_LEAST_EXPONENT = -87.0  # of a result that is a normal number
_TWO_THIRDS = 0x3F2AAAAB  # the bits of 2/3
_ONE = 0x3F800000
# (e^x - 1 - x) / x^2 for |x| <= ln 2 / 2 and (log(1 + x) - x) / x^2 for |x| <= 1/3, the highest
# power first: minimax in the relative error of the whole function, 3e-9 and 3e-8.
_EXP = (0.0013821446, 0.008368662, 0.041668255, 0.16666521, 0.49999994)
_LOG = (
    *(0.14020583, -0.15383598, 0.13997135, -0.1641703),
    *(0.20011073, -0.2500775, 0.333332, -0.49999937),
)


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    out = jnp.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        out = out * x + c
    return out


def _bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: Array) -> Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def exp(x: Array) -> Array:
    """``e^x`` for float32 `x` of at most 0; exactly 0 below -87; NaN for NaN."""
    n = jax.lax.round(x * (1 / math.log(2)), jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    rest = (x - n * _LN2_HIGH) - n * _LN2_LOW
    mantissa = _polynomial((*_EXP, 1.0, 1.0), rest)
    # Added to this, n is the lowest bits of the sum: no conversion, which would see to overflow.
    power = jax.lax.shift_left(_bits(n + 1.5 * 2**_MANTISSA_BITS), jnp.int32(_MANTISSA_BITS))
    return jnp.where(x < _LEAST_EXPONENT, 0.0, _float(_bits(mantissa) + power))


def log(x: Array) -> Array:
    """``log x`` for normal positive float32 numbers of at most 2^126; NaN for others."""
    # x = 2^n y with y in [2/3, 4/3): around 1 nothing cancels.
    power = (_bits(x) - _TWO_THIRDS) & ~((1 << _MANTISSA_BITS) - 1)
    rest = x * _float(_ONE - power) - 1.0  # a product, so that NaN stays NaN
    n = jax.lax.shift_right_arithmetic(power, jnp.int32(_MANTISSA_BITS)).astype(jnp.float32)
    out = n * _LN2_HIGH + ((_polynomial(_LOG, rest) * (rest * rest) + n * _LN2_LOW) + rest)
    # XLA hands products and sums over to YNNPACK's reductions, every operand an array in memory;
    # not so a choice.
    return jnp.where(x > 0, out, math.nan)


FUNCTIONS = Functions(exp=exp, log=log)
