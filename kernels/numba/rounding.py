"""Rounding of 16-bit weights and factors: to the nearest, stochastically or with compensation.

The definition is reference/rounding.py; the arithmetic is that of csrc/math/rounding.h, in int32 instead of uint32: no
number that is used reaches 2^31.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ..rounding import Rounding
from .dtype import ABOVE_HALF, INFINITY, MAGNITUDE, REBIAS_HALF, SMALLEST_HALF, STORAGES, bits_of, converters, real_of, scalar
from .parallel import BLOCK, Tensors, elements_of, loop, shared, stack_of, tensors_of

# -- random numbers

WORD, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
NOISE = 4 * (BLOCK // 16 + 1)  # numbers of 64 bits for a block of elements, wherever it begins


@scalar
def philox(c0, c1, c2, c3, seed, rounds):
    """The block Philox4x32 [Salmon et al. 2011] of a counter of four words under the key `seed`, all uint64.

    The words that come back are the low halves; what is above is left over.
    """
    k0, k1 = seed & WORD, seed >> HALF
    for _ in range(rounds):
        first, second = np.uint64(0xD2511F53) * (c0 & WORD), np.uint64(0xCD9E8D57) * (c2 & WORD)
        c0, c1, c2, c3 = (second >> HALF) ^ c1 ^ k0, second, (first >> HALF) ^ c3 ^ k1, first
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & WORD, (k1 + np.uint64(0xBB67AE85)) & WORD
    return c0, c1, c2, c3


@loop
def fill_noise(noise, pairs, first_pair, role, step, stream, seed):
    """The numbers below 2^16 of each pair of eights, the second inverted: four an element of `noise`, the lower bits first."""
    for i in range(pairs):
        pair = first_pair + np.uint64(i)
        high = (pair >> HALF) | (role << np.uint64(16))
        c0, c1, c2, c3 = philox(pair, high, step, stream, seed, 7)
        front, back = (c0 & WORD) | (c1 << HALF), (c2 & WORD) | (c3 << HALF)
        noise[4 * i] = front
        noise[4 * i + 1] = back
        noise[4 * i + 2] = ~front
        noise[4 * i + 3] = ~back


# -- one number


class Format(NamedTuple):
    """|x| in units of 2^-16 of the last place: `extended` of a float32, `contracted` the way back."""

    extended: Callable[[Any], Any]  # of infinity and NaN the 16 lowest bits are 0
    contracted: Callable[[Any], Any]
    infinity: Any


@scalar
def extended_bfloat16(x):
    magnitude = np.int32(bits_of(x) & MAGNITUDE)
    return np.int32(np.int32(magnitude | 0x400000) & np.int32(-0x10000)) if magnitude > INFINITY else magnitude


@scalar
def contracted_bfloat16(extended):
    return real_of(extended)


@scalar
def extended_float16(x):
    magnitude = np.int32(bits_of(x) & MAGNITUDE)
    normal = np.int32(np.int32(magnitude - REBIAS_HALF) << 3)
    is_subnormal = magnitude < SMALLEST_HALF
    subnormal = np.int32(real_of(magnitude if is_subnormal else np.int32(0)) * np.float32(2.0**40))
    result = subnormal if is_subnormal else normal
    result = np.int32(0x7C000000) if magnitude >= ABOVE_HALF else result
    return np.int32(0x7E000000) if magnitude > INFINITY else result


@scalar
def contracted_float16(extended):
    is_subnormal = extended < np.int32(0x0400 << 16)
    subnormal = np.float32(extended if is_subnormal else np.int32(0)) * np.float32(2.0**-40)
    return subnormal if is_subnormal else real_of(np.int32(np.int32(extended >> 3) + REBIAS_HALF))


FORMATS = {
    torch.float16: Format(extended_float16, contracted_float16, np.int32(0x7C00)),
    torch.bfloat16: Format(extended_bfloat16, contracted_bfloat16, np.int32(0x7F80)),
}


@scalar
def with_sign_of(magnitude, x):
    return np.uint16(magnitude | np.int32(np.int32(bits_of(x) >> 16) & 0x8000))


class Splitting(NamedTuple):
    """The scalar functions of a 16-bit format."""

    round_stochastically: Callable[[Any, Any], Any]  # float32, noise -> stored
    round_compensated: Callable[[Any], tuple[Any, Any]]  # float32 -> stored, compensation
    widen_compensated: Callable[[Any, Any], Any]  # stored, compensation -> float32


@functools.cache
def splitting(storage: torch.dtype) -> Splitting:
    widen, (extended, contracted, infinity) = STORAGES[storage].widen, FORMATS[storage]

    @scalar
    def round_stochastically(x, noise):
        return with_sign_of(np.int32(np.int32(extended(x) + np.int32(noise)) >> 16), x)

    @scalar
    def round_compensated(x):
        everything = extended(x)
        return with_sign_of(np.int32(np.int32(everything + np.int32(0x8000)) >> 16), x), np.int16(everything)

    @scalar
    def widen_compensated(x, compensation):
        """A compensation that is left of another number does not turn the sign."""
        word = np.int32(x)
        magnitude = np.int32(word & 0x7FFF)
        everything = np.int32(np.int32(magnitude << 16) + np.int32(compensation))
        size = contracted(everything if everything > np.int32(0) else np.int32(0))
        signed = real_of(np.int32(bits_of(size) | np.int32(np.int32(word & 0x8000) << 16)))
        return widen(x) if magnitude >= infinity else signed

    return Splitting(round_stochastically, round_compensated, widen_compensated)


# -- the elements of a weight or factor


def mode_of(rounding: Rounding, storage: torch.dtype) -> str:
    """That of numbers stored so: wider ones are stored as they were computed."""
    return rounding.mode if storage in FORMATS else "nearest"


def mode_of_reading(mode: str) -> str:
    """That of numbers that are not written: only a compensation makes a difference."""
    return "compensated" if mode == "compensated" else "nearest"


def tensors_and_arguments(rounding: Rounding, mode: str, *roles: Sequence[Tensor]) -> tuple[Tensors, tuple[Any, ...]]:
    """Those of a call, its compensations last, and what Rounded.elements takes as `arguments`."""
    if mode == "compensated":
        return tensors_of(*roles, *rounding.compensations), (len(roles),)
    tensors = tensors_of(*roles)
    if mode == "nearest":
        return tensors, ()
    streams, firsts = (np.array(numbers, np.int64) for numbers in (rounding.streams, rounding.firsts))
    return tensors, (np.uint64(rounding.seed), np.uint64(int(rounding.step)), streams, firsts)


class Rounded(NamedTuple):
    """How numbers are read and written. `elements` are memory and what goes with the mode."""

    elements: Callable[..., Any]  # addresses, role, tensor, begin, n, which, arguments -> elements
    load: Callable[[Any, Any], Any]  # elements, i -> number
    store: Callable[[Any, Any, Any], Any]  # elements, i, number -> the number as it is stored


@functools.cache
def rounded(storage: torch.dtype, real: type, mode: str = "nearest") -> Rounded:
    """Of a storage, for numbers of type `real`.

    `which`: the role of the numbers in reference/rounding.py. Stochastic elements are BLOCK at most, each to be written once.
    """
    return {"nearest": nearest, "stochastic": stochastic, "compensated": compensated}[mode](storage, real)


def nearest(storage: torch.dtype, real: type) -> Rounded:
    load_element, store_element = converters(storage, real)
    memory = elements_of(STORAGES[storage].memory)

    @scalar
    def elements(addresses, role, tensor, begin, n, which, arguments):
        return memory(addresses, role, tensor, begin, n)

    @scalar
    def load(elements, i):
        return load_element(elements[i])

    @scalar
    def store(elements, i, x):
        stored = store_element(x)
        elements[i] = stored
        return load_element(stored)

    return Rounded(elements, load, store)


def stochastic(storage: torch.dtype, real: type) -> Rounded:
    load_element, _ = converters(storage, real)
    memory, round_stochastically = elements_of(STORAGES[storage].memory), splitting(storage).round_stochastically

    @shared  # the noise is on the stack
    def elements(addresses, role, tensor, begin, n, which, arguments):
        seed, step, streams, firsts = arguments
        first = np.uint64(firsts[tensor] + begin)
        skipped = np.int64(first & np.uint64(15))
        noise = carray(stack_of(np.uint64, NOISE), NOISE)
        stream = np.uint64(streams[tensor])
        fill_noise(noise, (skipped + n + 15) >> 4, first >> np.uint64(4), np.uint64(which), step, stream, seed)
        # Lower bits first in memory too: numba serves little-endian machines alone.
        return memory(addresses, role, tensor, begin, n), noise.view(np.uint16), skipped

    @scalar
    def load(elements, i):
        return load_element(elements[0][i])

    @scalar
    def store(elements, i, x):
        numbers, noise, skipped = elements
        stored = round_stochastically(np.float32(x), noise[skipped + i])
        numbers[i] = stored
        return load_element(stored)

    return Rounded(elements, load, store)


def compensated(storage: torch.dtype, real: type) -> Rounded:
    memory, compensations = elements_of(STORAGES[storage].memory), elements_of(np.int16)
    _, round_compensated, widen_compensated = splitting(storage)

    @scalar
    def elements(addresses, role, tensor, begin, n, which, arguments):
        return memory(addresses, role, tensor, begin, n), compensations(addresses, arguments[0] + which, tensor, begin, n)

    @scalar
    def load(elements, i):
        return real(widen_compensated(elements[0][i], elements[1][i]))

    @scalar
    def store(elements, i, x):
        stored, compensation = round_compensated(np.float32(x))
        elements[0][i] = stored
        elements[1][i] = compensation
        return real(widen_compensated(stored, compensation))

    return Rounded(elements, load, store)
