"""Signs as bits, and the majority of them: the definition is reference/sign_vote.py.

Numbers are told apart by their bits, as in csrc/math/sign_vote.h. A kernel is compiled, once per process, for each size of
them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .parallel import BLOCK, Tensors, block_of, elements_of, for_each_chunk, run


class Pattern(NamedTuple):
    """Numbers of a storage type as unsigned integers, which compare as numbers of one sign do."""

    integer: type
    one: int
    infinity: int
    sign: int


PATTERNS = {
    torch.float16: Pattern(np.uint16, 0x3C00, 0x7C00, 1 << 15),
    torch.bfloat16: Pattern(np.uint16, 0x3F80, 0x7F80, 1 << 15),
    torch.float32: Pattern(np.uint32, 127 << 23, 255 << 23, 1 << 31),
    torch.float64: Pattern(np.uint64, 1023 << 52, 2047 << 52, 1 << 63),
}


@functools.cache
def pack_kernel(integer: type) -> Callable[..., None]:
    """Roles: rows of gradients, rows of words; a chunk has elements, those past the end among them."""
    zero = integer(0)
    elements, bytes_of = elements_of(integer), elements_of(np.uint8)

    @njit(forceinline=True)
    def bit(x, turn, ends):
        infinity, minus_zero, minus_infinity = ends
        positive = zero < x <= infinity
        return np.uint8(positive) | np.uint8(not (positive or minus_zero < x <= minus_infinity)) & turn

    @njit(nogil=True, error_model="numpy")
    def pack_chunk(row, begin, n, chunk, addresses, numel, phase, ends):
        there = max(min(numel - begin, n), 0)
        values = elements(addresses, 0, row, begin, there)
        words = bytes_of(addresses, 1, row, begin // 8, n // 8)
        even, odd = np.uint8(1 - phase), np.uint8(phase)
        whole = there // 8
        for i in range(whole):
            byte = np.uint8(0)
            for j in range(4):
                k = 8 * i + 2 * j
                byte |= bit(values[k], even, ends) << (2 * j) | bit(values[k + 1], odd, ends) << (2 * j + 1)
            words[i] = byte
        for i in range(whole, n // 8):
            byte = np.uint8(0)
            for j in range(8 * i, min(8 * i + 8, there)):
                byte |= bit(values[j], odd if j & 1 else even, ends) << (j & 7)
            words[i] = byte

    return for_each_chunk(pack_chunk)


@functools.cache
def count_kernel(integer: type) -> Callable[..., None]:
    """Roles: results, words."""
    zero = integer(0)
    elements, bytes_of = elements_of(integer), elements_of(np.uint8)

    @njit(nogil=True, error_model="numpy")
    def count_chunk(tensor, begin, n, chunk, addresses, voters, row_bytes, ones):
        counts = block_of(np.int32)
        one, minus_one = ones
        for at in range(begin, begin + n, BLOCK):
            size = min(BLOCK, begin + n - at)
            for i in range(size):
                counts[i] = 0
            for voter in range(voters):
                words = bytes_of(addresses, 1, tensor, voter * row_bytes + at // 8, (size + 7) // 8)
                for i in range(size):
                    counts[i] += words[i >> 3] >> (i & 7) & 1
            results = elements(addresses, 0, tensor, at, size)
            for i in range(size):
                twice = 2 * counts[i]
                results[i] = one if twice > voters else minus_one if twice < voters else zero

    return for_each_chunk(count_chunk)


# -- the ops


def rows_of(*tensors: Tensor) -> Any:
    """The address of each row of each tensor: int64 [tensors, rows]."""
    return np.array([[t.data_ptr() + row * t.stride(0) * t.itemsize for row in range(len(t))] for t in tensors], np.int64)


def pack_signs(gradient: Tensor, words: Tensor, phase: int) -> None:
    """Write the signs of `gradient` [rows, n] to `words`, uint8 [rows, bytes] with 8 bytes >= n."""
    bits = np.full(len(words), 8 * words.shape[1], np.int64)
    tensors = Tensors(rows_of(gradient, words), bits, ((gradient,), (words,)))
    integer, _, infinity, sign = PATTERNS[gradient.dtype]
    ends = integer(infinity), integer(sign), integer(sign + infinity)
    run(pack_kernel(integer), tensors, gradient.shape[1], phase & 1, ends)


def count_votes(words: Tensor, result: Tensor) -> None:
    """Write to `result` [n] what the voters of `words`, uint8 [voters, bytes] with 8 bytes >= n, agree on."""
    addresses = np.array([[result.data_ptr()], [words.data_ptr()]], np.int64)
    tensors = Tensors(addresses, np.array([result.numel()], np.int64), ((result,), (words,)))
    integer, one, _, sign = PATTERNS[result.dtype]
    run(count_kernel(integer), tensors, len(words), words.shape[1], (integer(one), integer(one + sign)))
