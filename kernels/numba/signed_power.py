"""u(c) = sign(c) |c|^(q-1), the direction of steepest descent in L_p, 1/p + 1/q = 1 [Eq. 3]: the scalar arithmetic.

The definition is reference/signed_power.py. Operation for operation this is csrc/math/signed_power.h, so a machine with fused
multiply-add computes the same bits in both.
"""

from __future__ import annotations

import enum
import functools
import math
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from ..power_coefficients import EXP2_DOUBLE, EXP2_FLOAT, LOG2_DOUBLE, LOG2_FLOAT
from .dtype import bits_of, real_of, scalar


class Power(enum.Enum):
    """q = 1, 1.5, 2, and any other in [1, 2]."""

    SIGN = 1.0
    ROOT = 1.5
    IDENTITY = 2.0
    GENERAL = None


def power_of(q: float) -> Power:
    return Power(q) if q in (1.0, 1.5, 2.0) else Power.GENERAL


class Exponent(NamedTuple):
    """As the polynomial wants it: `high` times an integer exponent is exact, high + low = full far below an ulp."""

    full: float
    high: float
    low: float


def exponent_of(exponent: float, real: type) -> Exponent:
    unit = 2.0 ** (16 if real is np.float32 else 40)
    high = round(exponent * unit) / unit
    return Exponent(exponent, high, exponent - high)


class Signed(NamedTuple):
    """The scalar functions of one q and one compute type. Only Power.GENERAL looks at the logarithm."""

    logarithm: Callable[[Any], tuple[Any, Any]]  # c -> log2|c| = whole + fraction
    signed_power: Callable[[Any, Any, Any, Any], Any]  # c, whole, fraction, exponent -> u(c)


def fuses(features: str) -> bool:
    """Whether code for these processor features has a fused multiply-add."""
    return "+fma" in features.split(",") or platform.machine().lower() in ("aarch64", "arm64")


def fused(context: Any, builder: Any, a: Any, b: Any, c: Any) -> Any:
    if fuses(context.codegen().magic_tuple()[2]):
        return builder.fma(a, b, c)
    return builder.fadd(builder.fmul(a, b), c)


@intrinsic
def multiply_add(typing_context, a, b, c):
    """a b + c, fused where the hardware does it: within the 4 ulp that `power` promises, not a part of the contract."""

    def generate(context, builder, signature, arguments):
        return fused(context, builder, *arguments)

    return a(a, b, c), generate


def polynomial(coefficients: tuple[float, ...]) -> Callable[[Any], Any]:
    """Horner's rule, written out: a loop inside would keep the loop around it from vectorising."""

    @intrinsic
    def horner(typing_context, x):
        def generate(context, builder, signature, arguments):
            constants = [ir.Constant(arguments[0].type, coefficient) for coefficient in coefficients]
            total = constants.pop()
            while constants:
                total = fused(context, builder, total, arguments[0], constants.pop())
            return total

        return x(x), generate

    return horner


@functools.cache
def scalar_functions(power: Power, real: type) -> Signed:
    """`real` is np.float32 or np.float64."""
    single = real is np.float32
    # numba widens 32-bit integer arithmetic to 64 bits, half as many in a vector: each result is taken back to `integer`.
    integer: Any = np.int32 if single else np.int64
    mantissa = np.finfo(real).nmant
    mantissa_bits, mantissa_mask = integer(mantissa), integer((1 << mantissa) - 1)
    smallest_normal, infinity = integer(1 << mantissa), integer(real(math.inf).view(integer))
    sign_bit, root_half = integer(real(-0.0).view(integer)), integer(real(math.sqrt(0.5)).view(integer))
    one, zero = real(1), integer(0)
    # 2^lift times a subnormal is normal.
    lift, unlift, above = integer(mantissa + 1), real(2.0 ** -(mantissa + 1)), integer((mantissa + 2) << mantissa)
    smallest_above = above.view(real)
    # A sum with `rounder` holds the nearest integer in its low bits.
    rounder = real(1.5 * 2.0**mantissa)
    rounder_bits = integer(rounder.view(integer))
    log2 = polynomial(LOG2_FLOAT if single else LOG2_DOUBLE)
    exp2 = polynomial(EXP2_FLOAT if single else EXP2_DOUBLE)

    @scalar
    def magnitude(c):
        return integer(bits_of(c) & ~sign_bit)

    # |c|^e for 0 < e < 1 is 2^(e log2|c|), within 4 ulp: the whole part of the logarithm is multiplied by e without error, so
    # the error does not grow with |log2|c||. No table and no branch, so that both halves vectorise anywhere.
    @scalar
    def logarithm(c):
        """log2|c| = whole + fraction, |fraction| <= 1/2."""
        size = magnitude(c)
        subnormal = size < smallest_normal
        # Read the mantissa of a subnormal as a fraction above a power of two, then take that power away: exact.
        lifted = bits_of(real_of(integer(size + above)) - smallest_above)
        bits = integer((lifted if subnormal else size) - root_half)
        exponent = integer(integer(bits >> mantissa_bits) - (lift if subnormal else zero))
        r = real_of(integer(integer(bits & mantissa_mask) + root_half)) - one
        return real_of(integer(exponent + rounder_bits)) - rounder, r * log2(r)

    @scalar
    def power_of_size(size, whole, fraction, exponent):
        low = multiply_add(exponent.low, whole, exponent.full * fraction)
        rounded = multiply_add(exponent.high, whole, low) + rounder
        f = multiply_add(exponent.high, whole, rounder - rounded) + low
        size_of_image = multiply_add(f, exp2(f), one)
        # The nearest integer, in the low bits of `rounded`, goes straight into the exponent. Only a subnormal |c| may have a
        # subnormal power: there in two factors.
        subnormal = size < smallest_normal
        n = integer(bits_of(rounded) + (lift if subnormal else zero))
        lifted = real_of(integer(bits_of(size_of_image) + integer(n << mantissa_bits)))
        return lifted * (unlift if subnormal else one)

    @scalar
    def sign_power(c, whole, fraction, exponent):
        size = magnitude(c)
        image = integer(bits_of(one) | (bits_of(c) & sign_bit))
        return real_of(image) if zero < size <= infinity else c

    @scalar
    def root_power(c, whole, fraction, exponent):
        size = magnitude(c)
        image = integer(bits_of(real(math.sqrt(real_of(size)))) | (bits_of(c) & sign_bit))
        return real_of(image) if zero < size < infinity else c

    @scalar
    def identity_power(c, whole, fraction, exponent):
        return c

    @scalar
    def general_power(c, whole, fraction, exponent):
        size = magnitude(c)
        image = integer(bits_of(power_of_size(size, whole, fraction, exponent)) | (bits_of(c) & sign_bit))
        return real_of(image) if zero < size < infinity else c

    return {
        Power.SIGN: Signed(logarithm, sign_power),
        Power.ROOT: Signed(logarithm, root_power),
        Power.IDENTITY: Signed(logarithm, identity_power),
        Power.GENERAL: Signed(logarithm, general_power),
    }[power]
