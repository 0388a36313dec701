"""Depth without factors: a step of the steepest mirror flow of a weight, from it and one number [Def. 4.6, Thm 4.8, Lemma 4.5].

The definition is reference/mirror_step.py; method and order of operations are those of csrc/math/mirror_step.h. Weight and
gradient are flat arrays that share one element order. A kernel is compiled, once per process, for each `Kind`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..number import Number
from ..rounding import NEAREST, Rounding
from .dtype import STORAGES, compute_dtype, compute_type, converters, scalar
from .factor_step import highest_bit, power_loop
from .parallel import BLOCK, block_of, elements_of, for_each_chunk, loop, run
from .rounding import mode_of, rounded, tensors_and_arguments
from .signed_power import Exponent, Power, exponent_of, power_of, scalar_functions
from .steepest_step import gradient_factor

MOST_ITERATIONS = 6  # of Halley's; the few that are left then are bisected


class Kind(NamedTuple):
    """What a kernel is compiled for."""

    power: Power
    weight: torch.dtype
    gradient: torch.dtype
    rounding: str = "nearest"  # mode of the weights


class Numbers(NamedTuple):
    """The options, each rounded once from float64 to the compute type."""

    gradient_factor: float
    step: float
    decay_rate: float  # lr weight_decay
    depth: float  # L
    others: float  # L - 1
    at_one: float  # this and the next two are of the first guess
    slope: float
    curvature: float
    close: float  # so close iterates make the next one right to 2 ulp
    root: Exponent  # q / L
    direction: Exponent  # q - 1


@njit(forceinline=True, error_model="numpy")
def numbers_from(values):
    return Numbers(
        values[0],
        values[1],
        values[2],
        values[3],
        values[4],
        values[5],
        values[6],
        values[7],
        values[8],
        Exponent(values[9], values[10], values[11]),
        Exponent(values[12], values[13], values[14]),
    )


# -- y = z + balance, in units of the larger of balance and root = |x|^(q/L):
#
#     (r - low) r^(L-1) = size^L,   low = balance / unit, size = root / unit,   1 <= r = y / unit <= 1 + at_one


@functools.lru_cache(maxsize=64)
def at_one(depth: int) -> float:
    """The solution of at_one (1 + at_one)^(L-1) = 1."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * (1 + middle) ** (depth - 1) < 1 else (low, middle)
    return low


@scalar
def guess(low, size_power, numbers):
    """Exact where low or size^L is 0 or 1, within 3 % of the solution in between."""
    one = type(low)(1)
    between = numbers.at_one + size_power * (one - numbers.at_one)
    return one + low * (numbers.slope + numbers.curvature * low) * size_power / between


@scalar
def halley(r, power, low, size_power, numbers):
    """One step of Halley's iteration; power = r^(L-1). The function is increasing and convex."""
    one, two = type(r)(1), type(r)(2)
    value = (r - low) * power - size_power
    # Times r: the derivatives are r^-1 and r^-2 of these.
    first = power * (numbers.depth * r - numbers.others * low)
    second = numbers.others * power * (numbers.depth * r - (numbers.others - one) * low)
    return r - r * (two * value * first) / (two * first * first - value * second)


@loop
def safeguarded(y, low, size_power, n, depth, numbers):
    """Bisection as long as Halley's step leaves the bracket."""
    for i in range(n):
        r = y[i]
        below, above = type(r)(1), type(r)(1) + numbers.at_one
        for _ in range(100):
            power = r
            for bit in range(highest_bit(depth - 1) - 1, -1, -1):
                power = power * power * (r if (depth - 1) >> bit & 1 else type(r)(1))
            if (r - low[i]) * power < size_power[i]:
                below = r
            else:
                above = r
            following = halley(r, power, low[i], size_power[i], numbers)
            if not below <= following <= above:
                following = type(r)(0.5) * (below + above)
            change = abs(following - r)
            r = following
            if not change > numbers.close * r:
                break
        y[i] = r


@functools.cache
def solver(storage: torch.dtype) -> Callable[..., None]:
    """solve(y, n, depth, balance, numbers): root -> y in place, for a balance > 0."""
    real, fill_power = compute_type(storage), power_loop(storage)

    @loop
    def solve(y, n, depth, balance, numbers):
        unit, low, size_power, power = block_of(real), block_of(real), block_of(real), block_of(real)
        for i in range(n):
            unit[i] = y[i] if y[i] > balance else balance
            low[i] = balance / unit[i]
            y[i] = y[i] / unit[i]
        fill_power(size_power, y, depth, n)
        for i in range(n):
            y[i] = guess(low[i], size_power[i], numbers)
        far = np.int32(1)
        for _ in range(MOST_ITERATIONS):
            fill_power(power, y, depth - 1, n)
            far = np.int32(0)
            for i in range(n):
                following = halley(y[i], power[i], low[i], size_power[i], numbers)
                far += np.int32(abs(following - y[i]) > numbers.close)
                y[i] = following
            if far == 0:
                break
        if far != 0:
            safeguarded(y, low, size_power, n, depth, numbers)
        for i in range(n):
            y[i] = y[i] * unit[i]

    return solve


# -- the step


@functools.cache
def powers_loop(power: Power, real: type) -> Callable[..., None]:
    """raise_all(c, n, exponent): c -> sign(c) |c|^exponent in place."""
    logarithm, signed_power = scalar_functions(power, real)
    general, none = power is Power.GENERAL, real(0)

    @loop
    def raise_all(c, n, exponent):
        if general:
            whole, fraction = block_of(real), block_of(real)
            for i in range(n):
                whole[i], fraction[i] = logarithm(c[i])
            for i in range(n):
                c[i] = signed_power(c[i], whole[i], fraction[i], exponent)
        else:
            for i in range(n):
                c[i] = signed_power(c[i], none, none, exponent)

    return raise_all


@functools.cache
def step_two(power: Power) -> Callable[..., Any]:
    """step(x, of_x, u, balance, numbers), the whole step at depth 2: it needs no factor, only z + y."""
    sign, identity = power is Power.SIGN, power is Power.IDENTITY

    @scalar
    def root_of(x, of_x):
        """sqrt(|x|^q)."""
        return abs(x) if identity else type(x)(np.sqrt(abs(x))) * type(x)(np.sqrt(abs(of_x)))

    @scalar
    def step(x, of_x, u, balance, numbers):
        zero, one, half = type(x)(0), type(x)(1), type(x)(0.5) * balance
        if sign:
            middle = type(x)(np.sqrt(half * half + abs(x)))  # (z + y) / 2
        else:
            root = root_of(x, of_x)
            large, small = (root, half) if root > half else (half, root)
            ratio = zero if large == zero else small / large
            middle = large * type(x)(np.sqrt(one + ratio * ratio))
            middle = root if root != root else middle
        kept, move = one - numbers.decay_rate, numbers.step * u
        return x - (numbers.decay_rate * (one + kept) * x + move * (kept * (middle + middle) - move * of_x))

    return step


@scalar
def relative_move(of_x, u, y, numbers):
    """How far w_2 moves, in units of itself: its gradient is g x / w_2."""
    zero = type(y)(0)
    return -(numbers.decay_rate + (zero if of_x == zero else numbers.step * u * (of_x / y)))


@loop
def fill_relative_powers(power, e, exponent, n):
    """(1 + e)^exponent - 1 without subtracting two powers, so that a step far smaller than x loses no digits."""
    for i in range(n):
        power[i] = e[i]
    for bit in range(highest_bit(exponent) - 1, -1, -1):
        times_once = exponent >> bit & 1 != 0
        for i in range(n):
            one, two, p = type(e[i])(1), type(e[i])(2), power[i]
            p = p * (two + p)
            power[i] = p + e[i] * (one + p) if times_once else p


@scalar
def moved(x, u, power, growth, numbers):
    """The new x: power = y^(L-1), growth = (1 + relative move)^(L-1) - 1."""
    move = -(numbers.decay_rate * x + numbers.step * u * power)  # of w_1, times w_2^(L-1)
    return x + (move + (x + move) * growth)


@functools.cache
def step_kernel(kind: Kind) -> Callable[..., None]:
    """Roles: weights, gradients, balances."""
    real, computing = compute_type(kind.weight), compute_dtype(kind.weight)
    weights_of, load, store = rounded(kind.weight, real, kind.rounding)
    load_gradient, _ = converters(kind.gradient, real)
    gradients_of, balance_of = elements_of(STORAGES[kind.gradient].memory), elements_of(np.float64)
    raise_all, take_roots = powers_loop(kind.power, real), powers_loop(Power.GENERAL, real)
    solve, fill_power, step_of_two = solver(computing), power_loop(computing), step_two(kind.power)

    @njit(nogil=True, error_model="numpy")
    def step_chunk(tensor, begin, n, chunk, addresses, values, depth, arguments):
        numbers, balance = numbers_from(values), real(balance_of(addresses, 2, tensor, 0, 1)[0])
        of_x, u = block_of(real), block_of(real)
        y, power, e, growth = block_of(real), block_of(real), block_of(real), block_of(real)
        for at in range(begin, begin + n, BLOCK):
            size = min(BLOCK, begin + n - at)
            weights = weights_of(addresses, 0, tensor, at, size, 0, arguments)
            gradients = gradients_of(addresses, 1, tensor, at, size)
            for i in range(size):
                of_x[i], u[i] = load(weights, i), load_gradient(gradients[i]) * numbers.gradient_factor
            raise_all(of_x, size, numbers.direction)
            raise_all(u, size, numbers.direction)
            if depth == 2:
                for i in range(size):
                    store(weights, i, step_of_two(load(weights, i), of_x[i], u[i], balance, numbers))
                continue
            for i in range(size):
                y[i] = abs(load(weights, i))
            take_roots(y, size, numbers.root)
            if balance > 0:
                solve(y, size, depth, balance, numbers)
            fill_power(power, y, depth - 1, size)
            for i in range(size):
                e[i] = relative_move(of_x[i], u[i], y[i], numbers)
            fill_relative_powers(growth, e, depth - 1, size)
            for i in range(size):
                store(weights, i, moved(load(weights, i), u[i], power[i], growth[i], numbers))

    return for_each_chunk(step_chunk)


# -- the op


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

    `balances` holds a float64 tensor of one element for each weight; it is not written.
    """
    if not weights or float(found_inf) != 0:
        return
    storage = weights[0].dtype
    kind = Kind(power_of(q), storage, gradients[0].dtype, mode_of(rounding, storage))
    real, rate, largest = compute_type(kind.weight), float(lr), at_one(depth)
    # Halley's iteration cubes the error, times (L^2 - 1) / 12 at most.
    close = (6e-3 if real is np.float32 else 8e-6) / depth ** (2 / 3)
    factor = gradient_factor(maximize, grad_scale)
    numbers = factor, rate, rate * weight_decay, depth, depth - 1, largest, 1 / depth, largest - 1 / depth, close
    exponents = (exponent_of(exponent, real) for exponent in (q / depth, q - 1))
    values: np.ndarray = np.array((*numbers, *(part for exponent in exponents for part in exponent)), real)
    tensors, arguments = tensors_and_arguments(rounding, kind.rounding, weights, gradients, balances)
    run(step_kernel(kind), tensors, values, depth, arguments)
