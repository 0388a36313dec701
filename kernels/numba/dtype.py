"""Storage types and their compute types: 16- and 32-bit floats compute in float32, 64-bit ones in float64.

Rounding to 16 bits is to nearest, ties to even; subnormals, infinities and NaN are kept. Numbers of 16 bits lie in memory as
uint16, which no machine lacks; the arithmetic is that of csrc/math/dtype.h.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic

# Each scalar function must become part of the loop that calls it, or the loop does not vectorise.
scalar = njit(forceinline=True, error_model="numpy")

INTEGER_LIKE = {types.float32: types.int32, types.float64: types.int64}
REAL_LIKE = {integer: real for real, integer in INTEGER_LIKE.items()}


def reinterpreted(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))


@intrinsic
def bits_of(typing_context, x):
    """The bits of a float32 or float64 as an integer of its size."""
    return INTEGER_LIKE[x](x), reinterpreted


@intrinsic
def real_of(typing_context, bits):
    """The float32 or float64 that has these bits."""
    return REAL_LIKE[bits](bits), reinterpreted


# numba widens 32-bit integer arithmetic to 64 bits, half as many in a vector: each result is taken back to int32.
EXPONENT_ONE = 127 << 23  # of a float32
REBIAS_HALF = np.int32(EXPONENT_ONE - (15 << 23))
SMALLEST_HALF = np.int32(EXPONENT_ONE - (14 << 23))  # 2^-14, the smallest normal float16, as a float32
ABOVE_HALF = np.int32(EXPONENT_ONE + (16 << 23))  # 2^16, where float16 has overflowed
HALF_INFINITY, HALF_NAN = np.int32(0x7C00), np.int32(0x7E00)
POINT_FIVE = np.int32(126 << 23)
INFINITY = np.int32(0x7F800000)
MAGNITUDE = np.int32(0x7FFFFFFF)


@scalar
def widen_float16(half):
    word = np.int32(half)
    magnitude = np.int32(np.int32(word & 0x7FFF) << 13)
    normal = np.int32(magnitude + REBIAS_HALF)
    special = np.int32(normal + REBIAS_HALF)
    # The mantissa of a subnormal is read as a fraction above 2^-14, then 2^-14 is taken away: exact, no subnormal operand.
    subnormal = bits_of(real_of(np.int32(magnitude + SMALLEST_HALF)) - real_of(SMALLEST_HALF))
    bits = special if magnitude >= np.int32(0x7C00 << 13) else normal
    bits = subnormal if magnitude < np.int32(0x0400 << 13) else bits
    return real_of(np.int32(bits | np.int32(np.int32(word & 0x8000) << 16)))


@scalar
def narrow_float16(x):
    bits = bits_of(x)
    magnitude = np.int32(bits & MAGNITUDE)
    odd = np.int32(np.int32(magnitude >> 13) & 1)
    normal = np.int32(np.int32(np.int32(magnitude - REBIAS_HALF) + np.int32(0xFFF + odd)) >> 13)
    # Adding 1/2 leaves the subnormal's mantissa, correctly rounded, in the low bits of the sum.
    subnormal = np.int32(bits_of(real_of(magnitude) + np.float32(0.5)) - POINT_FIVE)
    half = subnormal if magnitude < SMALLEST_HALF else normal
    half = HALF_INFINITY if magnitude >= ABOVE_HALF else half
    half = HALF_NAN if magnitude > INFINITY else half
    return np.uint16(half | np.int32(np.int32(bits >> 16) & 0x8000))


@scalar
def widen_bfloat16(half):
    return real_of(np.int32(np.int32(half) << 16))


@scalar
def narrow_bfloat16(x):
    bits = bits_of(x)
    high = np.int32(bits >> 16)
    # The carry may reach the sign only from a NaN, which is made from `high` instead.
    rounded = np.int32(np.int32(bits + np.int32(0x7FFF + np.int32(high & 1))) >> 16)
    return np.uint16(np.int32(high | 0x40) if np.int32(bits & MAGNITUDE) > INFINITY else rounded)


@scalar
def same(x):
    return x


class Storage(NamedTuple):
    memory: type  # of an element in memory, for numpy and numba
    widened: type
    widen: Callable[[Any], Any]
    narrow: Callable[[Any], Any]


STORAGES = {
    torch.float16: Storage(np.uint16, np.float32, widen_float16, narrow_float16),
    torch.bfloat16: Storage(np.uint16, np.float32, widen_bfloat16, narrow_bfloat16),
    torch.float32: Storage(np.float32, np.float32, same, same),
    torch.float64: Storage(np.float64, np.float64, same, same),
}


def compute_dtype(storage: torch.dtype) -> torch.dtype:
    return torch.float64 if storage == torch.float64 else torch.float32


def compute_type(storage: torch.dtype) -> type:
    return np.float64 if storage == torch.float64 else np.float32


@functools.cache
def converters(storage: torch.dtype, real: type) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """load(element of memory) -> real and store(real) -> element of memory."""
    _, widened, widen, narrow = STORAGES[storage]

    @scalar
    def load(element):
        return real(widen(element))

    @scalar
    def store(x):
        return narrow(widened(x))

    return load, store
