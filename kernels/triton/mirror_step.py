"""Depth without factors: one step of the steepest mirror flow of x = w_1 * ... * w_L, one pass over memory.

The definition is reference/mirror_step.py. The arithmetic is that of csrc/math/mirror_step.h, which says why it is accurate; a
block iterates until all of its elements have come close.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dtype import STORAGES, number
from .factor_product import block_of
from .factor_step import bits_below_highest, integer_power, tied_gradients
from .signed_power import power_of, signed_power, square_root
from .steepest_step import LAUNCH, Number, address, load, store, value
from .tensor_table import chunk_of, operand, tables

MOST_ITERATIONS = tl.constexpr(6)  # of Halley's alone; a bracket holds the few that are left then
MOST_BISECTIONS = tl.constexpr(100)

# ---- balanced factors --------------------------------------------------------------------------------------------------------


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
def depth_two(root, balance):
    """y = balance/2 + sqrt((balance/2)^2 + root^2), without overflow; balance > 0."""
    half = 0.5 * balance
    large, small = tl.where(root > half, root, half), tl.where(root > half, half, root)
    ratio = divided(small, large)
    return half + large * square_root(1.0 + ratio * ratio)


@triton.jit
def depth_two_sign(size, balance):
    """The same at q = 1, where root^2 = |x|."""
    half = 0.5 * balance
    return half + square_root(half * half + size)


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
    """y = z + balance, from root = |x|^(q/L)."""
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


@triton.jit
def rest_of(x, balance, q, POWER: tl.constexpr, DEPTH: tl.constexpr):
    """w_2 = ... = w_L."""
    size = tl.abs(x)
    if balance == 0.0:
        rest = signed_power(size, number(1 / DEPTH), "root" if DEPTH == 2 else "general")
    else:
        if DEPTH == 2 and POWER == "sign":
            y = depth_two_sign(size, balance)
        elif DEPTH == 2:
            y = depth_two(size if POWER == "identity" else signed_power(size, q / DEPTH, "general"), balance)
        else:
            y = solve(signed_power(size, q / DEPTH, "general"), balance, DEPTH)
        if POWER == "sign":
            rest = y
        else:
            rest = signed_power(y, 1.0 / q, "root" if POWER == "identity" else "general")
    return rest


# ---- the step ----------------------------------------------------------------------------------------------------------------


@triton.jit
def power_difference(rest, move, EXPONENT: tl.constexpr):
    """rest^n and (rest + move)^n - rest^n.

    No two powers are subtracted, so that a step far smaller than x loses no digits.
    """
    BITS: tl.constexpr = bits_below_highest(EXPONENT)
    power, difference = rest, move
    for i in tl.static_range(len(BITS)):
        difference = difference * (power + power + difference)
        power = power * power
        if BITS[i]:
            difference = difference * (rest + move) + power * move
            power = power * rest
    return power, difference


@triton.jit
def mirror_block(
    weight,
    gradient,
    offsets,
    mask,
    gradient_factor,
    step,
    decay_rate,
    balance,
    q,
    POWER: tl.constexpr,
    DEPTH: tl.constexpr,
):
    REAL: tl.constexpr = gradient_factor.dtype
    x = load(weight, offsets, mask, REAL)
    if mask is not None:
        x = tl.where(mask, x, 0.0)  # else what lies there might not come close
    g = load(gradient, offsets, mask, REAL) * gradient_factor
    rest = rest_of(x, balance, q, POWER, DEPTH)
    others = integer_power(rest, DEPTH - 2)
    power = others * rest
    first = tl.where(power == 0.0, x * 0.0, divided(x, power))
    of_first, of_rest = tied_gradients(g, first, rest, others)
    move_of_first = -(decay_rate * first + step * signed_power(of_first, q - 1.0, POWER))
    move_of_rest = -(decay_rate * rest + step * signed_power(of_rest, q - 1.0, POWER))
    power, difference = power_difference(rest, move_of_rest, DEPTH - 1)
    store(weight, offsets, mask, x + (first * difference + move_of_first * (power + difference)))


@triton.jit(do_not_specialize=["count", "lr_at", "grad_scale_at", "found_inf_at"])
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
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    POWER: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Operands: x, its gradient, the balance."""
    REAL: tl.constexpr = tl.float64 if WEIGHT == tl.float64 else tl.float32
    column, start, stop = chunk_of(table, count, 3, CHUNK)
    if found_inf_at is not None:
        stop = tl.where(tl.load(found_inf_at) != 0, start, stop)
    weight, gradient = operand(column, count, 0, WEIGHT, ALIGNED), operand(column, count, 1, GRADIENT, ALIGNED)
    balance = tl.load(operand(column, count, 2, tl.float64, False)).to(REAL)
    rate, exponent = number(lr, lr_at), number(q)
    gradient_factor = ((-1.0 if MAXIMIZE else 1.0) / number(grad_scale, grad_scale_at)).to(REAL)
    step, decay_rate = rate.to(REAL), (rate * number(weight_decay)).to(REAL)
    for block in range(CHUNK // BLOCK):
        first = tl.multiple_of(start + block * BLOCK, BLOCK)
        at = first + tl.arange(0, BLOCK)
        if first + BLOCK <= stop:
            mirror_block(weight, gradient, at, None, gradient_factor, step, decay_rate, balance, exponent, POWER, DEPTH)
        elif first < stop:
            mask = at < stop
            mirror_block(weight, gradient, at, mask, gradient_factor, step, decay_rate, balance, exponent, POWER, DEPTH)


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
    with torch.accelerator.device_index(weights[0].device.index):
        for table in tables(weights, gradients, balances, vectors=2):
            mirror_kernel[(table.chunks,)](
                table.rows,
                table.tensors,
                *map(address, (lr, grad_scale, found_inf)),
                *map(value, (lr, grad_scale)),
                weight_decay,
                q,
                ALIGNED=table.aligned,
                **compiled_for,
            )
