"""Signs as bits, and the majority of them: the definition is reference/sign_vote.py.

Numbers are told apart by their bits, as in csrc/math/sign_vote.h: the kernels see signed integers of their size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # bytes of the words of a program
WARPS = 4


class Pattern(NamedTuple):
    """Numbers of a storage type as signed integers."""

    integer: torch.dtype
    one: int
    infinity: int


PATTERNS = {
    torch.float16: Pattern(torch.int16, 0x3C00, 0x7C00),
    torch.bfloat16: Pattern(torch.int16, 0x3F80, 0x7F80),
    torch.float32: Pattern(torch.int32, 127 << 23, 255 << 23),
    torch.float64: Pattern(torch.int64, 1023 << 52, 2047 << 52),
}


@triton.jit(do_not_specialize=["rows", "numel", "row_bytes", "phase"])
def pack_kernel(
    values, words, rows, numel, row_bytes, phase, INFINITY: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, place = at // row_bytes, tl.arange(0, 8)[None, :]
    element = 8 * (at - row * row_bytes)[:, None] + place
    inside = (row < rows)[:, None] & (element < numel)
    x = tl.load(values + row[:, None] * numel + element, inside, 0)
    magnitude = x & LARGEST
    is_number = (magnitude > 0) & (magnitude <= INFINITY)
    turn = ((element + phase) & 1) == 0
    bits = tl.where(is_number, x > 0, turn) & inside
    tl.store(words + at, tl.sum(bits.to(tl.int32) << place, 1).to(tl.uint8), row < rows)


@triton.jit(do_not_specialize=["voters", "numel", "row_bytes"])
def count_kernel(words, results, voters, numel, row_bytes, ONE: tl.constexpr, MINUS_ONE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, 8)[None, :]
    element = 8 * at[:, None] + place
    count = tl.zeros((BLOCK, 8), tl.int32)
    pointers = words + at
    for _ in range(voters):
        count += (tl.load(pointers, 8 * at < numel, 0).to(tl.int32)[:, None] >> place) & 1
        pointers += row_bytes
    twice = 2 * count
    vote = tl.where(twice > voters, ONE, tl.where(twice < voters, MINUS_ONE, 0))
    tl.store(results + element, vote.to(results.dtype.element_ty), element < numel)


def pack_signs(gradient: Tensor, words: Tensor, phase: int) -> None:
    """Write the signs of `gradient` [rows, n] to `words`, uint8 [rows, bytes] with 8 bytes >= n."""
    pattern = PATTERNS[gradient.dtype]
    rows, row_bytes = words.shape
    with torch.accelerator.device_index(gradient.device.index):
        pack_kernel[(triton.cdiv(rows * row_bytes, BLOCK),)](
            gradient.view(pattern.integer),
            words,
            rows,
            gradient.shape[1],
            row_bytes,
            phase & 1,
            INFINITY=pattern.infinity,
            LARGEST=torch.iinfo(pattern.integer).max,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def count_votes(words: Tensor, result: Tensor) -> None:
    """Write to `result` [n] what the voters of `words`, uint8 [voters, bytes] with 8 bytes >= n, agree on."""
    pattern = PATTERNS[result.dtype]
    voters, row_bytes = words.shape
    with torch.accelerator.device_index(words.device.index):
        count_kernel[(triton.cdiv(result.numel(), 8 * BLOCK),)](
            words,
            result.view(pattern.integer),
            voters,
            result.numel(),
            row_bytes,
            ONE=pattern.one,
            MINUS_ONE=pattern.one + torch.iinfo(pattern.integer).min,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
