"""Steepest descent on the factors of weights, x = w_1 * ... * w_L, one pass over memory. Definition: reference/factor_step.py.

Momenta and factors lie in the same groups: factor_product.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..number import Number
from ..rounding import NEAREST, Rounding
from . import rounding as roundings
from .dtype import STORAGES, number
from .factor_product import Block, group_and_tail, grouping, load_group, store_factor, suffixes
from .rounding import draws_at, draws_of, rounded, widened
from .signed_power import power_of
from .steepest_step import UNSPECIALISED, address, load, moved, numbers_of, store, value
from .tensor_table import chunk_of, operand, tables

# ---- kernels -----------------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def bits_below_highest(n: int) -> tuple[int, ...]:
    return tuple(int(bit) for bit in bin(n)[3:])


@triton.jit
def integer_power(x, N: tl.constexpr):
    """x^N for N >= 0: the bits of N from the highest down, squaring for each, times x where it is 1."""
    BITS: tl.constexpr = bits_below_highest(N)
    result = tl.full(x.shape, 1.0, x.dtype) if N == 0 else x
    for i in tl.static_range(len(BITS)):
        result = result * result
        if BITS[i]:
            result = result * x
    return result


@triton.jit
def tied_gradients(g, first, rest, others):
    """The gradients of w_1 and w_2 = ... = w_L = rest; others = rest^(L-2)."""
    return g * (others * rest), g * (first * others)


# Operands: x, its gradient, the factors, their momenta, the compensations of the factors: from row COMPENSATIONS, or None, on.


@triton.jit
def full_block(
    at,
    mask,
    numbers,
    draws,
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    FACTOR: tl.constexpr,
    MOMENTUM: tl.constexpr,
    POWER: tl.constexpr,
    COUPLED: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    MODE: tl.constexpr,
    COMPENSATIONS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    REAL: tl.constexpr = numbers.gradient_factor.dtype
    x = tl.full(at.offsets.shape, 1.0, REAL)
    head = load(operand(at.column, at.count, 1, GRADIENT, ALIGNED), at.offsets, mask, REAL) * numbers.gradient_factor
    for start in range(0, DEPTH, GROUP):
        old, tail = group_and_tail(at, mask, 2, start, FACTOR, DEPTH, GROUP, ALIGNED, COMPENSATIONS)
        if MOMENTUM is None:
            momenta = old
        else:
            momenta = load_group(at, mask, 2 + DEPTH, start, 0.0, MOMENTUM, DEPTH, GROUP, ALIGNED)
        tails = suffixes(old, tail, GROUP)
        for i in tl.static_range(GROUP):
            w, m = moved(old[i], head * tails[GROUP - 1 - i], momenta[i], numbers, MOMENTUM, POWER, COUPLED)
            head = head * old[i]
            stored, low = rounded(w, draws, start + i, FACTOR, MODE, ALIGNED)
            store_factor(at, mask, 2, start + i, stored, FACTOR, DEPTH, GROUP, ALIGNED)
            if COMPENSATIONS is not None:
                store_factor(at, mask, COMPENSATIONS, start + i, low, tl.int16, DEPTH, GROUP, ALIGNED)
            if MOMENTUM is not None:
                store_factor(at, mask, 2 + DEPTH, start + i, m, MOMENTUM, DEPTH, GROUP, ALIGNED)
            new = x * widened(stored, low, REAL, MODE)
            x = new if DEPTH % GROUP == 0 else tl.where(start + i < DEPTH, new, x)
    store(operand(at.column, at.count, 0, WEIGHT, ALIGNED), at.offsets, mask, x)


@triton.jit
def tied_block(
    at,
    mask,
    numbers,
    draws,
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    FACTOR: tl.constexpr,
    MOMENTUM: tl.constexpr,
    POWER: tl.constexpr,
    COUPLED: tl.constexpr,
    DEPTH: tl.constexpr,
    MODE: tl.constexpr,
    COMPENSATIONS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    REAL: tl.constexpr = numbers.gradient_factor.dtype
    g = load(operand(at.column, at.count, 1, GRADIENT, ALIGNED), at.offsets, mask, REAL) * numbers.gradient_factor
    first, rest = load_group(at, mask, 2, 0, 1.0, FACTOR, 2, 2, ALIGNED, COMPENSATIONS)
    momenta = (first, rest)
    if MOMENTUM is not None:
        momenta = load_group(at, mask, 4, 0, 0.0, MOMENTUM, 2, 2, ALIGNED)
    of_first, of_rest = tied_gradients(g, first, rest, integer_power(rest, DEPTH - 2))
    first, momentum_of_first = moved(first, of_first, momenta[0], numbers, MOMENTUM, POWER, COUPLED)
    rest, momentum_of_rest = moved(rest, of_rest, momenta[1], numbers, MOMENTUM, POWER, COUPLED)
    first, low_of_first = rounded(first, draws, 0, FACTOR, MODE, ALIGNED)
    rest, low_of_rest = rounded(rest, draws, 1, FACTOR, MODE, ALIGNED)
    store_factor(at, mask, 2, 0, first, FACTOR, 2, 2, ALIGNED)
    store_factor(at, mask, 2, 1, rest, FACTOR, 2, 2, ALIGNED)
    if COMPENSATIONS is not None:
        store_factor(at, mask, COMPENSATIONS, 0, low_of_first, tl.int16, 2, 2, ALIGNED)
        store_factor(at, mask, COMPENSATIONS, 1, low_of_rest, tl.int16, 2, 2, ALIGNED)
    if MOMENTUM is not None:
        store_factor(at, mask, 4, 0, momentum_of_first, MOMENTUM, 2, 2, ALIGNED)
        store_factor(at, mask, 4, 1, momentum_of_rest, MOMENTUM, 2, 2, ALIGNED)
    first, rest = widened(first, low_of_first, REAL, MODE), widened(rest, low_of_rest, REAL, MODE)
    x = first * (integer_power(rest, DEPTH - 2) * rest)
    store(operand(at.column, at.count, 0, WEIGHT, ALIGNED), at.offsets, mask, x)


@triton.constexpr_function
def compensations_at(stored: int, momentum: object, mode: str) -> int | None:
    """The operand that is the first compensation."""
    return 2 + stored * (1 if momentum is None else 2) if mode == "compensated" else None


@triton.jit
def factor_block(
    at,
    mask,
    numbers,
    draws,
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    FACTOR: tl.constexpr,
    MOMENTUM: tl.constexpr,
    POWER: tl.constexpr,
    COUPLED: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    TIED: tl.constexpr,
    MODE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    STORED: tl.constexpr = 2 if TIED else DEPTH
    LOW: tl.constexpr = compensations_at(STORED, MOMENTUM, MODE)
    if TIED:
        tied_block(at, mask, numbers, draws, WEIGHT, GRADIENT, FACTOR, MOMENTUM, POWER, COUPLED, DEPTH, MODE, LOW, ALIGNED)
    else:
        full_block(
            at, mask, numbers, draws, WEIGHT, GRADIENT, FACTOR, MOMENTUM, POWER, COUPLED, DEPTH, GROUP, MODE, LOW, ALIGNED
        )


@triton.jit(do_not_specialize=UNSPECIALISED)
def factor_kernel(
    table,
    count,
    lr_at,
    grad_scale_at,
    found_inf_at,
    beta1_at,
    beta2_at,
    lr: tl.float64,
    grad_scale: tl.float64,
    weight_decay: tl.float64,
    coupled: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    exponent: tl.float64,
    step_at,
    step: tl.float64,
    seed: tl.uint64,
    OPERANDS: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    FACTOR: tl.constexpr,
    MOMENTUM: tl.constexpr,
    POWER: tl.constexpr,
    COUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    TIED: tl.constexpr,
    MODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    REAL: tl.constexpr = tl.float64 if WEIGHT == tl.float64 else tl.float32
    column, start, stop = chunk_of(table, count, OPERANDS + (2 if MODE == "stochastic" else 0), CHUNK)
    if found_inf_at is not None:
        stop = tl.where(tl.load(found_inf_at) != 0, start, stop)
    rate, unscale = number(lr, lr_at), number(grad_scale, grad_scale_at)
    beta1, beta2 = number(beta1, beta1_at), number(beta2, beta2_at)
    numbers = numbers_of(rate, number(1.0), unscale, weight_decay, coupled, beta1, beta2, exponent, MAXIMIZE, REAL)
    draws = draws_of(column, count, 2 + OPERANDS, seed, step_at, step, MODE)
    # A mask that changes at multiples of eight alone keeps the accesses 128 bits wide, so that one copy of the code serves all
    # blocks. Up to seven elements are left, for which a copy with groups of one factor will do: less to compile.
    eights = stop // 8 * 8
    for begin in range(start, eights, BLOCK):
        first = tl.multiple_of(begin, BLOCK)
        at = Block(column, count, first + tl.arange(0, BLOCK))
        own, mask = draws_at(draws, first), at.offsets < eights
        factor_block(
            at, mask, numbers, own, WEIGHT, GRADIENT, FACTOR, MOMENTUM, POWER, COUPLED, DEPTH, GROUP, TIED, MODE, ALIGNED
        )
    if eights < stop:
        at = Block(column, count, eights + tl.arange(0, 8))
        own, mask = draws_at(draws, eights), at.offsets < stop
        factor_block(at, mask, numbers, own, WEIGHT, GRADIENT, FACTOR, MOMENTUM, POWER, COUPLED, DEPTH, 1, TIED, MODE, ALIGNED)


# ---- launches ----------------------------------------------------------------------------------------------------------------

MOST = {"nearest": 5, "stochastic": 5, "compensated": 4}  # factors of a group; the time to compile grows as their square
REGISTERS = {"nearest": 108, "stochastic": 90, "compensated": 90}  # as factor_product.REGISTERS


def step_grouping(stored: int, with_momentum: bool, dtype: torch.dtype, mode: str) -> dict[str, int]:
    """For each factor a thread holds it, the product behind it and its momentum."""
    return grouping(stored, 3 if with_momentum else 2, dtype, MOST[mode], REGISTERS[mode])


def factor_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    factors: Sequence[Sequence[Tensor]],
    momenta: Sequence[Sequence[Tensor]] | None,
    *,
    depth: int,
    lr: Number,
    q: float,
    betas: tuple[Number, Number],
    weight_decay: float,
    coupled_weight_decay: float,
    maximize: bool,
    grad_scale: Number,
    found_inf: Number,
    rounding: Rounding = NEAREST,
) -> None:
    """Write `weights` and update `factors` and `momenta` in place; where `found_inf` is not 0 they keep their values.

    factors[k][i] is the k-th factor that is stored of weight i: k < depth, or k < 2 (tied). `momenta` is alike.
    """
    if value(found_inf) != 0:
        return
    mode = roundings.mode_of(rounding, factors[0][0].dtype)
    operands = [weights, gradients, *factors, *(momenta or []), *roundings.compensations_of(rounding, mode)]
    compiled_for = step_grouping(len(factors), momenta is not None, weights[0].dtype, mode) | {
        "OPERANDS": len(operands),
        "WEIGHT": STORAGES[weights[0].dtype],
        "GRADIENT": STORAGES[gradients[0].dtype],
        "FACTOR": STORAGES[factors[0][0].dtype],
        "MOMENTUM": None if momenta is None else STORAGES[momenta[0][0].dtype],
        "POWER": power_of(q),
        "COUPLED": coupled_weight_decay != 0,
        "MAXIMIZE": maximize,
        "DEPTH": depth,
        "TIED": len(factors) < depth,
    }
    how = roundings.arguments(rounding, mode)
    with torch.accelerator.device_index(weights[0].device.index):
        for table in tables(*operands, numbers=roundings.columns_of(rounding, mode)):
            factor_kernel[(table.chunks,)](
                table.rows,
                table.tensors,
                *map(address, (lr, grad_scale, found_inf, *betas)),
                *map(value, (lr, grad_scale)),
                weight_decay,
                coupled_weight_decay,
                *map(value, betas),
                q - 1,
                ALIGNED=table.aligned,
                **how,
                **compiled_for,
            )
