"""Weights as products of L factors, with two derivatives, one pass over memory. Definition: reference/factor_product.py.

A thread holds a group of factors of its elements, up to MOST, and loads them all before it needs one, so that their latencies
overlap. More factors come in equal groups: the product of those behind a group is formed anew for each, from values that the
program has read before and finds in a cache. What the last group lacks is filled with factors of 1, which change no bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dtype import INTERPRETED, STORAGES
from .rounding import widen_compensated
from .steepest_step import HELD, LAUNCH, THREADS, load, store
from .tensor_table import CHUNK, chunk_of, operand, tables

MOST = 16  # factors of a group
REGISTERS = 120  # of a thread, for the numbers that it holds; two thirds of it where arithmetic in float64 takes more


class Block(NamedTuple):
    """Elements of one weight: its column of a table of `count` columns, and their places."""

    column: Any
    count: Any
    offsets: Any


# ---- groups of factors -------------------------------------------------------------------------------------------------------


@triton.jit
def load_factor(
    at,
    mask,
    row,
    k,
    FILL: tl.constexpr,
    STORAGE: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    COMPENSATIONS: tl.constexpr,
):
    """Operand row + k; FILL where there is no factor k. Its compensation is operand COMPENSATIONS + k, unless that is None."""
    REAL: tl.constexpr = tl.float64 if STORAGE == tl.float64 else tl.float32
    there = k if DEPTH % GROUP == 0 else tl.minimum(k, DEPTH - 1)
    address = operand(at.column, at.count, row + there, STORAGE, ALIGNED)
    if COMPENSATIONS is None:
        x = load(address, at.offsets, mask, REAL)
    else:
        low = operand(at.column, at.count, COMPENSATIONS + there, tl.int16, ALIGNED)
        x = widen_compensated(tl.load(address + at.offsets, mask=mask), tl.load(low + at.offsets, mask=mask))
    return x if DEPTH % GROUP == 0 else tl.where(k < DEPTH, x, FILL)


@triton.jit
def store_factor(at, mask, row, k, x, STORAGE: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr):
    """Write x to operand row + k; nothing where there is no factor k."""
    if DEPTH % GROUP == 0:
        store(operand(at.column, at.count, row + k, STORAGE, ALIGNED), at.offsets, mask, x)
    else:
        # Masked: a branch would end the block of code in which instructions may move.
        there = k < DEPTH if mask is None else mask & (k < DEPTH)
        store(operand(at.column, at.count, row + tl.minimum(k, DEPTH - 1), STORAGE, ALIGNED), at.offsets, there, x)


@triton.jit
def load_group(
    at,
    mask,
    row,
    start,
    FILL: tl.constexpr,
    STORAGE: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    COMPENSATIONS: tl.constexpr = None,
):
    """Operands row + k for k = start, ..., start + GROUP - 1; FILL where there is no factor k."""
    group = ()
    for i in tl.static_range(GROUP):
        group += (load_factor(at, mask, row, start + i, FILL, STORAGE, DEPTH, GROUP, ALIGNED, COMPENSATIONS),)  # type: ignore[assignment]
    return group


@triton.jit
def suffixes(group, tail, GROUP: tl.constexpr):
    """For each factor of the group, the last one first, the product of those behind it, from the back; `tail` is the first."""
    tails = (tail,)
    for i in tl.static_range(1, GROUP):
        tails += (group[GROUP - i] * tails[i - 1],)  # type: ignore[assignment]
    return tails


@triton.jit
def filled(like, FILL: tl.constexpr, REAL: tl.constexpr, GROUP: tl.constexpr):
    group = ()
    for _ in tl.static_range(GROUP):
        group += (tl.full(like.shape, FILL, REAL),)  # type: ignore[assignment]
    return group


@triton.jit
def group_and_tail(
    at,
    mask,
    row,
    start,
    STORAGE: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    COMPENSATIONS: tl.constexpr = None,
):
    """The group at `start` and the product, from the back, of the factors behind it."""
    REAL: tl.constexpr = tl.float64 if STORAGE == tl.float64 else tl.float32
    LAST: tl.constexpr = (DEPTH - 1) // GROUP * GROUP
    tail = tl.full(at.offsets.shape, 1.0, REAL)
    if DEPTH == GROUP:
        w = load_group(at, mask, row, 0, 1.0, STORAGE, DEPTH, GROUP, ALIGNED, COMPENSATIONS)
    else:
        w = filled(at.offsets, 1.0, REAL, GROUP)
        for back in range(0, LAST - start + GROUP, GROUP):
            tail = w[0] * suffixes(w, tail, GROUP)[GROUP - 1]
            w = load_group(at, mask, row, LAST - back, 1.0, STORAGE, DEPTH, GROUP, ALIGNED, COMPENSATIONS)
    return w, tail


# ---- the product and its derivatives -----------------------------------------------------------------------------------------


@triton.jit
def product_block(at, mask, STORAGE: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr):
    """Operands: x, the factors."""
    REAL: tl.constexpr = tl.float64 if STORAGE == tl.float64 else tl.float32
    x = tl.full(at.offsets.shape, 1.0, REAL)
    for start in range(0, DEPTH, GROUP):
        w = load_group(at, mask, 1, start, 1.0, STORAGE, DEPTH, GROUP, ALIGNED)
        for i in tl.static_range(GROUP):
            x = x * w[i]
    store(operand(at.column, at.count, 0, STORAGE, ALIGNED), at.offsets, mask, x)


@triton.jit
def gradient_block(at, mask, STORAGE: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr):
    """Operands: dx, the factors, the dw_i."""
    REAL: tl.constexpr = tl.float64 if STORAGE == tl.float64 else tl.float32
    head = load(operand(at.column, at.count, 0, STORAGE, ALIGNED), at.offsets, mask, REAL)
    for start in range(0, DEPTH, GROUP):
        w, tail = group_and_tail(at, mask, 1, start, STORAGE, DEPTH, GROUP, ALIGNED)
        tails = suffixes(w, tail, GROUP)
        for i in tl.static_range(GROUP):
            store_factor(at, mask, 1 + DEPTH, start + i, head * tails[GROUP - 1 - i], STORAGE, DEPTH, GROUP, ALIGNED)
            head = head * w[i]


@triton.jit
def tangent(a, da, b, db):
    """Of the product of pairs (a, da) (b, db)."""
    return da * b + a * db


@triton.jit
def tangent_suffixes(w, v, tails, dtail, GROUP: tl.constexpr):
    """The tangents of `suffixes`."""
    dtails = (dtail,)
    for i in tl.static_range(1, GROUP):
        dtails += (tangent(w[GROUP - i], v[GROUP - i], tails[i - 1], dtails[i - 1]),)  # type: ignore[assignment]
    return dtails


@triton.jit
def second_gradient_block(at, mask, STORAGE: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr):
    """Operands: dx, ddx, the factors, their tangents, the ddw_i."""
    REAL: tl.constexpr = tl.float64 if STORAGE == tl.float64 else tl.float32
    LAST: tl.constexpr = (DEPTH - 1) // GROUP * GROUP
    g = load(operand(at.column, at.count, 0, STORAGE, ALIGNED), at.offsets, mask, REAL)
    head, dhead = tl.full(at.offsets.shape, 1.0, REAL), tl.zeros(at.offsets.shape, REAL)
    for start in range(0, DEPTH, GROUP):
        # As group_and_tail, with tangents.
        tail, dtail = tl.full(at.offsets.shape, 1.0, REAL), tl.zeros(at.offsets.shape, REAL)
        if DEPTH != GROUP:
            for back in range(0, LAST - start, GROUP):
                w = load_group(at, mask, 2, LAST - back, 1.0, STORAGE, DEPTH, GROUP, ALIGNED)
                v = load_group(at, mask, 2 + DEPTH, LAST - back, 0.0, STORAGE, DEPTH, GROUP, ALIGNED)
                tails = suffixes(w, tail, GROUP)
                dtail = tangent(w[0], v[0], tails[GROUP - 1], tangent_suffixes(w, v, tails, dtail, GROUP)[GROUP - 1])
                tail = w[0] * tails[GROUP - 1]
        w = load_group(at, mask, 2, start, 1.0, STORAGE, DEPTH, GROUP, ALIGNED)
        v = load_group(at, mask, 2 + DEPTH, start, 0.0, STORAGE, DEPTH, GROUP, ALIGNED)
        tails = suffixes(w, tail, GROUP)
        dtails = tangent_suffixes(w, v, tails, dtail, GROUP)
        for i in tl.static_range(GROUP):
            ddw = g * tangent(head, dhead, tails[GROUP - 1 - i], dtails[GROUP - 1 - i])
            store_factor(at, mask, 2 + 2 * DEPTH, start + i, ddw, STORAGE, DEPTH, GROUP, ALIGNED)
            # A pair (1, 0) that fills a group would change an infinity and a -0.
            ahead = tangent(head, dhead, w[i], v[i])
            dhead = ahead if DEPTH % GROUP == 0 else tl.where(start + i < DEPTH, ahead, dhead)
            head = head * w[i]
    store(operand(at.column, at.count, 1, STORAGE, ALIGNED), at.offsets, mask, dhead)


@triton.jit
def any_block(
    at,
    mask,
    ORDER: tl.constexpr,
    STORAGE: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    if ORDER == 0:
        product_block(at, mask, STORAGE, DEPTH, GROUP, ALIGNED)
    elif ORDER == 1:
        gradient_block(at, mask, STORAGE, DEPTH, GROUP, ALIGNED)
    else:
        second_gradient_block(at, mask, STORAGE, DEPTH, GROUP, ALIGNED)


@triton.jit(do_not_specialize=["count"])
def product_kernel(
    table,
    count,
    ORDER: tl.constexpr,
    OPERANDS: tl.constexpr,
    STORAGE: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column, start, stop = chunk_of(table, count, OPERANDS, CHUNK)
    for block in range(CHUNK // BLOCK):
        first = tl.multiple_of(start + block * BLOCK, BLOCK)
        at = Block(column, count, first + tl.arange(0, BLOCK))
        if first + BLOCK <= stop:
            any_block(at, None, ORDER, STORAGE, DEPTH, GROUP, ALIGNED)
        elif first < stop:
            any_block(at, at.offsets < stop, ORDER, STORAGE, DEPTH, GROUP, ALIGNED)


# ---- launches ----------------------------------------------------------------------------------------------------------------


def block_of(elements: int) -> int:
    """Elements of a block, given those that a thread holds."""
    # The interpreter has no registers to spare, and takes as long for one element as for a thousand.
    return CHUNK // 2 if INTERPRETED.value else elements * THREADS


def grouping(depth: int, held: int, dtype: torch.dtype, most: int = MOST, registers: int = REGISTERS) -> dict[str, int]:
    """The constants of a kernel that holds `held` numbers for each factor of a group of at most `most`."""
    words, registers = (2, registers // 3 * 2) if dtype == torch.float64 else (1, registers)
    group = triton.cdiv(depth, triton.cdiv(depth, min(most, registers // (held * words))))
    elements = min(HELD, registers // (group * held * words))
    return LAUNCH | {"DEPTH": depth, "GROUP": group, "BLOCK": block_of(2 ** (elements.bit_length() - 1))}


def launch(order: int, depth: int, operands: Sequence[Tensor]) -> None:
    first = operands[0]
    compiled_for: dict[str, Any] = {"ORDER": order, "OPERANDS": len(operands), "STORAGE": STORAGES[first.dtype]}
    compiled_for |= grouping(depth, (1, 2, 4)[order], first.dtype)
    with torch.accelerator.device_index(first.device.index):
        for table in tables(*([tensor] for tensor in operands)):
            product_kernel[(table.chunks,)](table.rows, table.tensors, ALIGNED=table.aligned, **compiled_for)


def factor_product(factors: Sequence[Tensor], result: Tensor) -> None:
    """Write x."""
    launch(0, len(factors), [result, *factors])


def factor_product_backward(gradient: Tensor, factors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """Write dw_i to `results[i]`."""
    launch(1, len(factors), [gradient, *factors, *results])


def factor_product_double_backward(
    gradient: Tensor, factors: Sequence[Tensor], tangents: Sequence[Tensor], result: Tensor, results: Sequence[Tensor]
) -> None:
    """Write ddx to `result` and ddw_i to `results[i]`."""
    launch(2, len(factors), [gradient, result, *factors, *tangents, *results])
