"""Depth without factors: one step of the steepest mirror flow of x = w_1 * ... * w_L, one pass over memory.

The definition is reference/mirror_step.py. The arithmetic is that of csrc/math/mirror_step.h, which derives the step; a block
iterates until all of its elements have come close.
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
from .factor_product import block_of
from .factor_step import bits_below_highest, integer_power
from .rounding import draws_at, draws_of
from .signed_power import power_of, signed_power, square_root
from .steepest_step import LAUNCH, address, load, load_rounded, store_rounded, value
from .tensor_table import chunk_of, operand, tables

MOST_ITERATIONS = tl.constexpr(6)  # of Halley's alone; a bracket holds the few that are left then
MOST_BISECTIONS = tl.constexpr(100)

# ---- y = z + balance, in units of the larger of balance and root -------------------------------------------------------------


@triton.constexpr_function
def largest_excess(depth: int) -> float:
    """a of a (1 + a)^(L-1) = 1, from below."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle < (1 + middle) ** (1 - depth) else (low, middle)
    return low


@triton.constexpr_function
def closeness(depth: int, single: bool) -> float:
    """So close iterates make the next one right to 2 ulp: Halley's iteration cubes the error, times (L^2 - 1) / 12 at most."""
    return (6e-3 if single else 8e-6) / depth ** (2 / 3)


@triton.jit
def divided(a, b):
    """Rounded to nearest."""
    # div_rn is for float32 alone; the quotient of float64 is correctly rounded anyway.
    return tl.div_rn(a, b) if b.dtype == tl.float32 else a / b


@triton.jit
def guess(low, size_power, DEPTH: tl.constexpr):
    """Exact where low or size^L is 0 or 1, within 3 % of the solution in between."""
    EXCESS: tl.constexpr = largest_excess(DEPTH)
    numerator = low * (1 / DEPTH + (EXCESS - 1 / DEPTH) * low) * size_power
    return 1.0 + divided(numerator, EXCESS + size_power * (1.0 - EXCESS))


@triton.jit
def halley(r, low, size_power, DEPTH: tl.constexpr):
    """The next r, and (r - low) r^(L-1), which is size^L at the solution."""
    power = integer_power(r, DEPTH - 1)
    reached = (r - low) * power
    excess = reached - size_power
    # Times r and r^2 the derivatives.
    first = power * (DEPTH * r - (DEPTH - 1) * low)
    second = (DEPTH - 1) * power * (DEPTH * r - (DEPTH - 2) * low)
    return r - divided(r * (2.0 * excess * first), 2.0 * first * first - excess * second), reached


@triton.jit
def any_beyond(x, bound):
    return tl.max((x > bound).to(tl.int32), 0) > 0


@triton.jit
def solve(root, balance, DEPTH: tl.constexpr):
    """y from root = |x|^(q/L)."""
    EXCESS: tl.constexpr = largest_excess(DEPTH)
    CLOSE: tl.constexpr = closeness(DEPTH, root.dtype == tl.float32)
    unit = tl.where(root > balance, root, balance)
    low = divided(balance, unit)
    size_power = integer_power(divided(root, unit), DEPTH)
    r = guess(low, size_power, DEPTH)
    left = MOST_ITERATIONS  # -1 once all are close
    while left > 0:
        ahead, _ = halley(r, low, size_power, DEPTH)
        left = tl.where(any_beyond(tl.abs(ahead - r), CLOSE), left - 1, -1)
        r = ahead
    below, above = tl.full(r.shape, 1.0, r.dtype), tl.full(r.shape, 1.0 + EXCESS, r.dtype)
    left = tl.where(left == 0, MOST_BISECTIONS, 0)
    while left > 0:
        ahead, reached = halley(r, low, size_power, DEPTH)
        below, above = tl.where(reached < size_power, r, below), tl.where(reached < size_power, above, r)
        ahead = tl.where((ahead >= below) & (ahead <= above), ahead, 0.5 * (below + above))
        left = tl.where(any_beyond(tl.abs(ahead - r), CLOSE * r), left - 1, 0)
        r = ahead
    return r * unit


# ---- the step ----------------------------------------------------------------------------------------------------------------


@triton.jit
def step_two(x, of_x, u, step, decay_rate, balance, POWER: tl.constexpr):
    """The whole step at depth 2, which needs no factor, only z + y = 2 sqrt((balance/2)^2 + |x|^q)."""
    size, half = tl.abs(x), 0.5 * balance
    if POWER == "sign":
        middle = square_root(half * half + size)
    else:
        root = size if POWER == "identity" else square_root(size) * square_root(tl.abs(of_x))
        large, small = tl.where(root > half, root, half), tl.where(root > half, half, root)
        ratio = tl.where(large == 0.0, 0.0, divided(small, large))
        middle = tl.where(root != root, root, large * square_root(1.0 + ratio * ratio))
    kept, move = 1.0 - decay_rate, step * u
    return x - (decay_rate * (1.0 + kept) * x + move * (kept * (middle + middle) - move * of_x))


@triton.jit
def relative_power(e, N: tl.constexpr):
    """(1 + e)^N - 1 without subtracting two powers, so that a step far smaller than x loses no digits."""
    BITS: tl.constexpr = bits_below_highest(N)
    result = e
    for i in tl.static_range(len(BITS)):
        result = result * (2.0 + result)
        if BITS[i]:
            result = result + e * (1.0 + result)
    return result


@triton.jit
def step_deep(x, of_x, u, step, decay_rate, balance, q, DEPTH: tl.constexpr):
    root = signed_power(tl.abs(x), q / DEPTH, "general")
    if balance == 0.0:
        y = root
    else:
        y = solve(root, balance, DEPTH)
    relative_move = -(decay_rate + tl.where(of_x == 0.0, 0.0, step * u * divided(of_x, y)))  # of w_2, in units of itself
    growth = relative_power(relative_move, DEPTH - 1)
    move = -(decay_rate * x + step * u * integer_power(y, DEPTH - 1))  # of w_1, times w_2^(L-1)
    return x + (move + (x + move) * growth)


@triton.jit
def mirror_block(
    weight,
    gradient,
    compensation,
    offsets,
    mask,
    draws,
    gradient_factor,
    step,
    decay_rate,
    balance,
    q,
    POWER: tl.constexpr,
    DEPTH: tl.constexpr,
    MODE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    REAL: tl.constexpr = gradient_factor.dtype
    x = load_rounded(weight, compensation, offsets, mask, REAL, MODE)
    if mask is not None:
        x = tl.where(mask, x, 0.0)  # else what lies there might not come close
    g = load(gradient, offsets, mask, REAL) * gradient_factor
    of_x, u = signed_power(x, q - 1.0, POWER), signed_power(g, q - 1.0, POWER)
    if DEPTH == 2:
        x = step_two(x, of_x, u, step, decay_rate, balance, POWER)
    else:
        x = step_deep(x, of_x, u, step, decay_rate, balance, q, DEPTH)
    store_rounded(weight, compensation, offsets, mask, x, draws, MODE, ALIGNED)


@triton.jit(do_not_specialize=["count", "lr_at", "grad_scale_at", "found_inf_at", "step_at", "seed", "step"])
def mirror_kernel(
    table,
    count,
    lr_at,
    grad_scale_at,
    found_inf_at,
    lr: tl.float64,
    grad_scale: tl.float64,
    weight_decay: tl.float64,
    q: tl.float64,
    step_at,
    step: tl.float64,
    seed: tl.uint64,
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    POWER: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    MODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Operands: x, its gradient, its compensation if it has one, the balance."""
    REAL: tl.constexpr = tl.float64 if WEIGHT == tl.float64 else tl.float32
    BALANCE: tl.constexpr = 3 if MODE == "compensated" else 2
    column, start, stop = chunk_of(table, count, 5 if MODE == "stochastic" else BALANCE + 1, CHUNK)
    if found_inf_at is not None:
        stop = tl.where(tl.load(found_inf_at) != 0, start, stop)
    weight, gradient = operand(column, count, 0, WEIGHT, ALIGNED), operand(column, count, 1, GRADIENT, ALIGNED)
    compensation = operand(column, count, 2, tl.int16, ALIGNED) if MODE == "compensated" else gradient
    balance = tl.load(operand(column, count, BALANCE, tl.float64, False)).to(REAL)
    draws = draws_of(column, count, 2 + 3, seed, step_at, step, MODE)
    rate, exponent = number(lr, lr_at), number(q)
    gradient_factor = ((-1.0 if MAXIMIZE else 1.0) / number(grad_scale, grad_scale_at)).to(REAL)
    step_size, decay_rate = rate.to(REAL), (rate * number(weight_decay)).to(REAL)
    for block in range(CHUNK // BLOCK):
        first = tl.multiple_of(start + block * BLOCK, BLOCK)
        at = first + tl.arange(0, BLOCK)
        own = draws_at(draws, first)
        if first + BLOCK <= stop:
            mirror_block(
                weight,
                gradient,
                compensation,
                at,
                None,
                own,
                gradient_factor,
                step_size,
                decay_rate,
                balance,
                exponent,
                POWER,
                DEPTH,
                MODE,
                ALIGNED,
            )
        elif first < stop:
            mask = at < stop
            mirror_block(
                weight,
                gradient,
                compensation,
                at,
                mask,
                own,
                gradient_factor,
                step_size,
                decay_rate,
                balance,
                exponent,
                POWER,
                DEPTH,
                MODE,
                ALIGNED,
            )


# ---- launches ----------------------------------------------------------------------------------------------------------------


def held(dtype: torch.dtype) -> int:
    """Elements by a thread at once. More would take too many registers."""
    return 2 if dtype == torch.float64 else 4


def mirror_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    balances: Sequence[Tensor],
    *,
    depth: int,
    lr: Number,
    q: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Number,
    found_inf: Number,
    rounding: Rounding = NEAREST,
) -> None:
    """Update `weights` in place; where `found_inf` is not 0 they keep their values.

    `balances` holds a float64 tensor of one element for each weight, on its device; it is not written.
    """
    if value(found_inf) != 0:
        return
    compiled_for = LAUNCH | {
        "WEIGHT": STORAGES[weights[0].dtype],
        "GRADIENT": STORAGES[gradients[0].dtype],
        "POWER": power_of(q),
        "MAXIMIZE": maximize,
        "DEPTH": depth,
        "BLOCK": block_of(held(weights[0].dtype)),
    }
    mode = roundings.mode_of(rounding, weights[0].dtype)
    operands = [weights, gradients, *roundings.compensations_of(rounding, mode)]
    columns, how = roundings.columns_of(rounding, mode), roundings.arguments(rounding, mode)
    with torch.accelerator.device_index(weights[0].device.index):
        for table in tables(*operands, balances, vectors=len(operands), numbers=columns):
            mirror_kernel[(table.chunks,)](
                table.rows,
                table.tensors,
                *map(address, (lr, grad_scale, found_inf)),
                *map(value, (lr, grad_scale)),
                weight_decay,
                q,
                ALIGNED=table.aligned,
                **how,
                **compiled_for,
            )
