"""u(c) = sign(c) |c|^(q-1), the direction of steepest descent in L_p, 1/p + 1/q = 1 [Eq. 3]: the scalar arithmetic.

The definition is reference/signed_power.py. Operation for operation this is csrc/math/signed_power.h, so a GPU computes the
same bits in both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import power_coefficients

LOG2_FLOAT = tl.constexpr(power_coefficients.LOG2_FLOAT)
EXP2_FLOAT = tl.constexpr(power_coefficients.EXP2_FLOAT)
LOG2_DOUBLE = tl.constexpr(power_coefficients.LOG2_DOUBLE)
EXP2_DOUBLE = tl.constexpr(power_coefficients.EXP2_DOUBLE)


def power_of(q: float) -> str:
    """What `signed_power` is compiled for: q = 1, 1.5, 2, and any other in [1, 2]."""
    return {1.0: "sign", 1.5: "root", 2.0: "identity"}.get(float(q), "general")


@triton.constexpr_function
def degree(coefficients: tuple[float, ...]) -> int:
    return len(coefficients) - 1


@triton.jit
def polynomial(COEFFICIENTS: tl.constexpr, x):
    """Horner's rule."""
    DEGREE: tl.constexpr = degree(COEFFICIENTS)
    # tl.fma takes a Python float for a float32 also where x is a float64.
    total = tl.full(x.shape, COEFFICIENTS[DEGREE], x.dtype)
    for i in tl.static_range(DEGREE):
        total = tl.fma(total, x, tl.full(x.shape, COEFFICIENTS[DEGREE - 1 - i], x.dtype))
    return total


# |c|^e for 0 < e < 1 is 2^(e log2|c|), within 4 ulp: the whole part of the logarithm is multiplied by e without error, so the
# error does not grow with |log2|c||. No table, no branch and no library, so that Triton compiles it for any GPU.
@triton.jit
def power(
    size,
    exponent,
    INTEGER: tl.constexpr,
    MANTISSA: tl.constexpr,
    FRACTION: tl.constexpr,
    ROOT_HALF: tl.constexpr,
    ROUND: tl.constexpr,
    LIFT: tl.constexpr,
    LOG2: tl.constexpr,
    EXP2: tl.constexpr,
):
    REAL: tl.constexpr = size.dtype
    SMALLEST_NORMAL: tl.constexpr = 1 << MANTISSA
    # q - 1 as the polynomial wants it: `high` times an integer exponent is exact, high + low = q - 1 to far below an ulp.
    # A sum with 1.5 2^52 holds the nearest integer in its low bits.
    high64 = ((exponent * (1 << FRACTION) + 6755399441055744.0) - 6755399441055744.0) * (1.0 / (1 << FRACTION))
    full, high, low = exponent.to(REAL), high64.to(REAL), (exponent - high64).to(REAL)
    bits = size.to(INTEGER, bitcast=True)
    subnormal = bits < SMALLEST_NORMAL
    # Read the mantissa of a subnormal as a fraction above a power of two, then take that power away: exact.
    above = tl.full(size.shape, (LIFT + 1) << MANTISSA, INTEGER)
    lifted = ((bits + above).to(REAL, bitcast=True) - above.to(REAL, bitcast=True)).to(INTEGER, bitcast=True)
    bits = tl.where(subnormal, lifted, bits) - ROOT_HALF
    shift = tl.where(subnormal, LIFT, 0).to(INTEGER)
    r = ((bits & (SMALLEST_NORMAL - 1)) + ROOT_HALF).to(REAL, bitcast=True) - 1.0
    # log2|c| = whole + fraction, |fraction| <= 1/2.
    rounder = tl.full(size.shape, ROUND, INTEGER).to(REAL, bitcast=True)
    whole = ((bits >> MANTISSA) - shift + ROUND).to(REAL, bitcast=True) - rounder
    fraction = r * polynomial(LOG2, r)

    low = tl.fma(low, whole, full * fraction)
    rounded = tl.fma(high, whole, low) + rounder
    f = tl.fma(high, whole, rounder - rounded) + low
    mantissa = tl.fma(f, polynomial(EXP2, f), tl.full(size.shape, 1.0, REAL))
    # The nearest integer, in the low bits of `rounded`, goes straight into the exponent. Only a subnormal |c| may have a
    # subnormal power: there in two factors.
    n = rounded.to(INTEGER, bitcast=True) + shift
    scaled = (mantissa.to(INTEGER, bitcast=True) + (n << MANTISSA)).to(REAL, bitcast=True)
    return scaled * tl.where(subnormal, 1.0 / (1 << LIFT), 1.0).to(REAL)


@triton.jit
def square_root(x):
    """Rounded to nearest."""
    # sqrt_rn is for float32 alone; the square root of a float64 is correctly rounded anyway.
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def signed_power(c, exponent, POWER: tl.constexpr):
    """u(c) of float32 or float64; `exponent` is q - 1 in float64.

    u(+-0) = +-0 for every q, NaN stays NaN, and at q = 1 u(+-inf) = +-1.
    """
    if POWER == "identity":
        return c
    else:
        SINGLE: tl.constexpr = c.dtype == tl.float32
        INTEGER: tl.constexpr = tl.int32 if SINGLE else tl.int64
        INFINITY: tl.constexpr = 0x7F800000 if SINGLE else 0x7FF0000000000000
        MAGNITUDE: tl.constexpr = 0x7FFFFFFF if SINGLE else 0x7FFFFFFFFFFFFFFF
        bits = c.to(INTEGER, bitcast=True)
        magnitude = bits & MAGNITUDE
        size = magnitude.to(c.dtype, bitcast=True)
        if POWER == "sign":
            u = tl.full(c.shape, 1.0, c.dtype)
        elif POWER == "root":
            u = square_root(size)
        elif SINGLE:
            u = power(size, exponent, tl.int32, 23, 16, 0x3F3504F3, 0x4B400000, 24, LOG2_FLOAT, EXP2_FLOAT)
        else:
            u = power(size, exponent, tl.int64, 52, 40, 0x3FE6A09E667F3BCD, 0x4338000000000000, 53, LOG2_DOUBLE, EXP2_DOUBLE)
        # Zero and NaN, and for q > 1 an infinity, are their own image.
        image = (u.to(INTEGER, bitcast=True) | (bits ^ magnitude)).to(c.dtype, bitcast=True)
        last = INFINITY if POWER == "sign" else INFINITY - 1
        return tl.where((magnitude > 0) & (magnitude <= last), image, c)
