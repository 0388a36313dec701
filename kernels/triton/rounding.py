"""How 16-bit weights and factors are rounded when they are stored: the scalar arithmetic. Definition: reference/rounding.py.

A kernel is compiled for one mode. Stochastic rounding takes further columns of its table, `first` and `stream`, compensated
rounding the addresses of the compensations. Where a tensor is aligned, which here means its `first` too, the words of one
counter serve the elements that a thread holds, up to eight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rounding import Rounding
from .dtype import narrow, number, widen

SIXTEEN = (torch.float16, torch.bfloat16)
THREADS = tl.constexpr(128)  # of a program; AMD's GPUs have twice as many, for which the random numbers then change hands


class Draws(NamedTuple):
    """What random numbers depend on, beside role and element. `first`: the element at which a block begins."""

    seed: Any
    step: Any
    stream: Any
    first: Any


# ---- random numbers ----------------------------------------------------------------------------------------------------------


@triton.jit
def draws_of(column, count, row, seed, step_at, step, MODE: tl.constexpr):
    """Of a tensor; `first` is in row `row` of the table, the stream in the next."""
    if MODE == "stochastic":
        first, stream = tl.load(column + row * count), tl.load(column + (row + 1) * count)
        return Draws(seed, number(step, step_at).to(tl.int64).to(tl.uint32), stream.to(tl.uint32), first)
    else:
        return Draws(0, 0, 0, 0)


@triton.jit
def draws_at(draws, start):
    """Those of the block that starts there."""
    return Draws(draws.seed, draws.step, draws.stream, draws.first + start)


@triton.jit
def philox(seed, counter0, counter1, counter2, counter3):
    """Philox4x32-7. The rounds are a loop: tl.philox writes them out, at the cost of seconds where there are many factors."""
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in range(7):
        low0, low2 = counter0 * 0xD2511F53, counter2 * 0xCD9E8D57
        high0, high2 = tl.umulhi(counter0, 0xD2511F53), tl.umulhi(counter2, 0xCD9E8D57)
        counter0, counter2 = high2 ^ counter1 ^ key0, high0 ^ counter3 ^ key1
        counter1, counter3 = low2, low0
        key0, key1 = key0 + 0x9E3779B9, key1 + 0xBB67AE85
    return counter0, counter1, counter2, counter3


@triton.jit
def words_of(draws, role, elements):
    """The four words of elements; of the second of two eights they are inverted."""
    # The interpreter wants the counter's words to be of one shape.
    zero = tl.zeros(elements.shape, tl.uint32)
    high = (elements >> 36).to(tl.uint32) | (role << 16)
    pair = (elements >> 4).to(tl.uint32)
    word0, word1, word2, word3 = philox(draws.seed, pair, high, zero + draws.step, zero + draws.stream)
    inverted = tl.where((elements & 8) != 0, zero + 0xFFFFFFFF, zero)
    return word0 ^ inverted, word1 ^ inverted, word2 ^ inverted, word3 ^ inverted


@triton.jit
def word_of(elements, word0, word1, word2, word3):
    low, high = tl.where((elements & 2) != 0, word1, word0), tl.where((elements & 2) != 0, word3, word2)
    return tl.where((elements & 4) != 0, high, low)


@triton.jit
def noise_of_each(draws, role, SIZE: tl.constexpr):
    """A counter for each element."""
    elements = draws.first + tl.arange(0, SIZE)
    word0, word1, word2, word3 = words_of(draws, role, elements)
    word = word_of(elements, word0, word1, word2, word3)
    return tl.where((elements & 1) != 0, word >> 16, word & 0xFFFF)


@triton.jit
def noise_of_some(draws, role, SIZE: tl.constexpr, HELD: tl.constexpr):
    """A counter for HELD elements; the first one is a multiple of eight."""
    elements = draws.first + tl.arange(0, SIZE // HELD) * HELD
    word0, word1, word2, word3 = words_of(draws, role, elements)
    # Each join adds a dimension, that of the next lower bit of an element's number.
    if HELD == 8:
        words = tl.join(tl.join(word0, word2), tl.join(word1, word3))
    elif HELD == 4:
        upper = (elements & 4) != 0
        words = tl.join(tl.where(upper, word2, word0), tl.where(upper, word3, word1))
    else:
        words = word_of(elements, word0, word1, word2, word3)
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (SIZE,))


@triton.jit
def noise(draws, role, SIZE: tl.constexpr, ALIGNED: tl.constexpr):
    """A random number below 2^16 for each of SIZE elements from `draws.first` on, which is a multiple of eight if ALIGNED."""
    if ALIGNED and SIZE >= 2 * THREADS:
        return noise_of_some(draws, role, SIZE, 8 if SIZE >= 8 * THREADS else SIZE // THREADS)
    else:
        return noise_of_each(draws, role, SIZE)


# ---- rounding ----------------------------------------------------------------------------------------------------------------


@triton.jit
def extended(x, STORAGE: tl.constexpr):
    """|x| of float32 in units of 2^-16 of the last place of STORAGE: uint32. Of infinity and NaN the 16 lowest bits are 0."""
    magnitude = x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    if STORAGE == tl.bfloat16:
        return tl.where(magnitude > 0x7F800000, (magnitude | 0x400000) & 0xFFFF0000, magnitude)
    else:
        is_subnormal = magnitude < ((127 - 14) << 23)
        small = tl.where(is_subnormal, magnitude, 0).to(tl.float32, bitcast=True) * 1099511627776.0  # 2^40
        result = tl.where(is_subnormal, small.to(tl.int32).to(tl.uint32), (magnitude - ((127 - 15) << 23)) << 3)
        result = tl.where(magnitude >= ((127 + 16) << 23), 0x7C000000, result)
        return tl.where(magnitude > 0x7F800000, 0x7E000000, result)


@triton.jit
def contracted(extended, STORAGE: tl.constexpr):
    """The float32 that `extended` makes this of."""
    if STORAGE == tl.bfloat16:
        return extended.to(tl.float32, bitcast=True)
    else:
        is_subnormal = extended < (0x0400 << 16)
        normal = ((extended >> 3) + ((127 - 15) << 23)).to(tl.float32, bitcast=True)
        small = tl.where(is_subnormal, extended, 0).to(tl.int32).to(tl.float32) * (1.0 / 1099511627776.0)
        return tl.where(is_subnormal, small, normal)


@triton.jit
def with_sign_of(magnitude, x, STORAGE: tl.constexpr):
    sign = (x.to(tl.uint32, bitcast=True) >> 16) & 0x8000
    return (magnitude | sign).to(tl.uint16).to(STORAGE, bitcast=True)


@triton.jit
def round_stochastically(x, noise, STORAGE: tl.constexpr):
    return with_sign_of((extended(x, STORAGE) + noise) >> 16, x, STORAGE)


@triton.jit
def round_compensated(x, STORAGE: tl.constexpr):
    """x as it is stored, and its compensation."""
    everything = extended(x, STORAGE)
    return with_sign_of((everything + 0x8000) >> 16, x, STORAGE), everything.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def widen_compensated(x, compensation):
    """What round_compensated has split. A compensation that is left of another number does not turn the sign."""
    STORAGE: tl.constexpr = x.dtype
    bits = x.to(tl.uint16, bitcast=True).to(tl.uint32)
    magnitude = bits & 0x7FFF
    everything = tl.maximum((magnitude << 16).to(tl.int32) + compensation.to(tl.int32), 0)
    size = contracted(everything.to(tl.uint32), STORAGE).to(tl.uint32, bitcast=True)
    value = (size | ((bits & 0x8000) << 16)).to(tl.float32, bitcast=True)
    return tl.where(magnitude >= (0x7F80 if STORAGE == tl.bfloat16 else 0x7C00), widen(x, tl.float32), value)


# ---- stored numbers ----------------------------------------------------------------------------------------------------------


@triton.jit
def rounded(x, draws, role, STORAGE: tl.constexpr, MODE: tl.constexpr, ALIGNED: tl.constexpr):
    """x as it is stored, and its compensation, where there is none once more x as it is stored."""
    if MODE == "compensated":
        return round_compensated(x, STORAGE)
    elif MODE == "stochastic":
        stored = round_stochastically(x, noise(draws, role, x.shape[0], ALIGNED), STORAGE)
        return stored, stored
    else:
        stored = narrow(x, STORAGE)
        return stored, stored


@triton.jit
def widened(stored, compensation, REAL: tl.constexpr, MODE: tl.constexpr):
    """What is stored in the compute type."""
    return widen_compensated(stored, compensation) if MODE == "compensated" else widen(stored, REAL)


# ---- on the host -------------------------------------------------------------------------------------------------------------


def mode_of(rounding: Rounding, dtype: torch.dtype) -> str:
    """What a kernel is compiled for."""
    return rounding.mode if dtype in SIXTEEN else "nearest"


def mode_of_reading(rounding: Rounding, dtype: torch.dtype) -> str:
    """The same for a kernel that stores nothing."""
    return mode_of(rounding, dtype) if rounding.mode == "compensated" else "nearest"


def compensations_of(rounding: Rounding, mode: str) -> Sequence[Sequence[Tensor]]:
    """Further operands: the compensations of each role."""
    return rounding.compensations if mode == "compensated" else ()


def columns_of(rounding: Rounding, mode: str) -> tuple[Sequence[int], ...]:
    """Further columns of the table."""
    return (rounding.firsts, rounding.streams) if mode == "stochastic" else ()


def arguments(rounding: Rounding, mode: str) -> dict[str, Any]:
    """A kernel's seed, step_at, step and MODE. The step changes with each call."""
    step = rounding.step if mode == "stochastic" else 0.0
    on_device = isinstance(step, Tensor)
    return {
        "seed": rounding.seed,
        "step_at": step if on_device else None,
        "step": 0.0 if on_device else float(step),
        "MODE": mode,
    }
