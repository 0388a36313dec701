"""Sign flips between two arrays of floats and the norms of both, each number read from memory once; in numba.

Signs are told from the bits, of as many numbers at once as a 64-bit word holds. The lanes of a word do not mix: a magnitude has
its top bit clear, and what is added to it is at most the top bit.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic

from ..kernels.numba.dtype import STORAGES, converters

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK = 1 << 15  # words that stay in the second-level cache between the pass over signs and those over norms
INFINITIES = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}


class Tally(NamedTuple):
    """What is known of two arrays. Infinities have a sign, NaN has none."""

    flips: int = 0
    non_finite_before: int = 0
    non_finite_after: int = 0
    l1_before: float = 0.0
    l2_before: float = 0.0  # squared
    l1_after: float = 0.0
    l2_after: float = 0.0  # squared

    def plus(self, other: Tally) -> Tally:
        return Tally(*map(operator.add, self, other))


def tally(before: Array, after: Array, dtype: torch.dtype, *, norms: bool) -> Tally:
    """Compare arrays [n] of one torch dtype, a key of INFINITIES, given as unsigned integers of its size.

    Norms are sums in float64, 0 where they are not asked for.
    """
    result = Tally()
    masks = _masks(dtype)
    for x, y in zip(_words(before), _words(after), strict=True):
        step = BLOCK if norms else max(1, len(x))
        for begin in range(0, len(x), step):
            a, b = x[begin : begin + step], y[begin : begin + step]
            sums = (0.0, 0.0, 0.0, 0.0)
            if norms:
                memory, power_sums = np.dtype(STORAGES[dtype].memory), _power_sums(dtype)
                sums = (*power_sums(a.view(memory)), *power_sums(b.view(memory)))
            result = result.plus(Tally(*_signs()(a, b, *masks), *sums))
    return result


def _words(numbers: Array) -> list[Array]:
    """64-bit words that hold the numbers, the last of them filled up with 0, of which neither signs nor norms know."""
    lanes = 8 // numbers.itemsize
    whole = len(numbers) // lanes * lanes
    words = numbers[:whole].view(np.uint64)
    rest = np.zeros(lanes, numbers.dtype)
    rest[: len(numbers) - whole] = numbers[whole:]
    return [words if words.flags.aligned else words.copy(), rest.view(np.uint64)]


@functools.cache
def _masks(dtype: torch.dtype) -> tuple[np.uint64, np.uint64, np.uint64]:
    """Per lane: the sign bit, and what lifts into it the magnitudes from infinity and from NaN on."""
    bits = 8 * dtype.itemsize
    sign, infinity = 1 << (bits - 1), INFINITIES[dtype]
    lanes = sum(1 << shift for shift in range(0, 64, bits))
    return np.uint64(sign * lanes), np.uint64((sign - infinity) * lanes), np.uint64((sign - infinity - 1) * lanes)


def _count_bits(_typing_context: Any, _word: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


_set_bits: Any = intrinsic(_count_bits)  # how many bits of a word are set


@functools.cache
def _signs() -> Callable[..., tuple[int, int, int]]:
    def signs(before, after, sign, from_infinity, from_nan):  # type: ignore[no-untyped-def]
        flips, first, second = np.uint64(0), np.uint64(0), np.uint64(0)
        for i in range(before.size):
            a, b = before[i] & ~sign, after[i] & ~sign
            known = (a + ~sign) & (b + ~sign) & ~(a + from_nan) & ~(b + from_nan)
            flips += _set_bits((before[i] ^ after[i]) & sign & known)
            first += _set_bits((a + from_infinity) & sign)
            second += _set_bits((b + from_infinity) & sign)
        return flips, first, second

    compiled: Callable[..., tuple[int, int, int]] = njit(nogil=True, error_model="numpy")(signs)
    return compiled


@functools.cache
def _power_sums(dtype: torch.dtype) -> Callable[[Array], tuple[float, float]]:
    load, _ = converters(dtype, np.float64)

    def power_sums(numbers):  # type: ignore[no-untyped-def]
        l1, l2 = 0.0, 0.0
        for i in range(numbers.size):
            x = load(numbers[i])
            l1 += abs(x)
            l2 += x * x
        return l1, l2

    # A sum in the order of the numbers would be one addition at a time.
    compiled: Callable[[Array], tuple[float, float]] = njit(nogil=True, error_model="numpy", fastmath={"reassoc"})(power_sums)
    return compiled
