"""Depth without factors: a step of the steepest mirror flow of a weight, from it and one number [Def. 4.6, Thm 4.8, Lemma 4.5].

The definition is reference/mirror_step.py; method and order of operations are those of csrc/math/mirror_step.h. Weight and
gradient are flat arrays that share one element order. A kernel is compiled, once per process, for each `Kind`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .dtype import STORAGES, compute_dtype, compute_type, converters, scalar
from .factor_step import highest_bit, power_loop
from .parallel import BLOCK, block_of, elements_of, for_each_chunk, loop, run, tensors_of
from .signed_power import Exponent, Power, exponent_of, power_of, scalar_functions
from .steepest_step import Number, gradient_factor

MOST_ITERATIONS = 6  # of Halley's; the few that are left then are bisected


class Kind(NamedTuple):
    """What a kernel is compiled for."""

    power: Power
    weight: torch.dtype
    gradient: torch.dtype


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
    inverse_depth: Exponent
    inverse_q: Exponent
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
        Exponent(values[15], values[16], values[17]),
        Exponent(values[18], values[19], values[20]),
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


# -- the factors


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


@scalar
def depth_two(root, balance):
    """y = balance/2 + sqrt((balance/2)^2 + root^2), without overflow."""
    half = type(root)(0.5) * balance
    large, small = (root, half) if root > half else (half, root)
    ratio = small / large
    return half + large * type(root)(np.sqrt(type(root)(1) + ratio * ratio))


@scalar
def depth_two_sign(size, balance):
    """The same at q = 1, where root^2 = |x|."""
    half = type(size)(0.5) * balance
    return half + type(size)(np.sqrt(half * half + size))


@functools.cache
def rest_loop(power: Power, storage: torch.dtype) -> Callable[..., None]:
    """find_rest(rest, n, depth, balance, numbers): |x| -> w_2 = ... = w_L in place."""
    real, solve = compute_type(storage), solver(storage)
    take_roots, raise_all = powers_loop(Power.ROOT, real), powers_loop(Power.GENERAL, real)
    sign, identity = power is Power.SIGN, power is Power.IDENTITY

    @loop
    def find_rest(rest, n, depth, balance, numbers):
        if balance == 0:
            if depth == 2:
                take_roots(rest, n, numbers.inverse_depth)
            else:
                raise_all(rest, n, numbers.inverse_depth)
            return
        if depth == 2 and sign:
            for i in range(n):
                rest[i] = depth_two_sign(rest[i], balance)
        elif depth == 2:
            if not identity:
                raise_all(rest, n, numbers.root)
            for i in range(n):
                rest[i] = depth_two(rest[i], balance)
        else:
            raise_all(rest, n, numbers.root)
            solve(rest, n, depth, balance, numbers)
        if identity:
            take_roots(rest, n, numbers.inverse_q)
        elif not sign:
            raise_all(rest, n, numbers.inverse_q)

    return find_rest


# (rest + move)^n - rest^n = `difference` beside rest^n = `power`, formed without subtracting two powers, so that a step far
# smaller than x loses no digits.
@loop
def fill_differences(power, difference, rest, move, exponent, n):
    for i in range(n):
        power[i], difference[i] = rest[i], move[i]
    for bit in range(highest_bit(exponent) - 1, -1, -1):
        times_rest = exponent >> bit & 1 != 0
        for i in range(n):
            p, d = power[i], difference[i]
            p, d = p * p, d * (p + p + d)
            if times_rest:
                p, d = p * rest[i], d * (rest[i] + move[i]) + p * move[i]
            power[i], difference[i] = p, d


@functools.cache
def step_kernel(kind: Kind) -> Callable[..., None]:
    """Roles: weights, gradients, balances."""
    real, computing = compute_type(kind.weight), compute_dtype(kind.weight)
    zero = real(0)
    load, store = converters(kind.weight, real)
    load_gradient, _ = converters(kind.gradient, real)
    weights_of, gradients_of, balance_of = (
        elements_of(memory) for memory in (STORAGES[kind.weight].memory, STORAGES[kind.gradient].memory, np.float64)
    )
    find_rest, fill_power, raise_all = rest_loop(kind.power, computing), power_loop(computing), powers_loop(kind.power, real)

    @njit(nogil=True, error_model="numpy")
    def step_chunk(tensor, begin, n, chunk, addresses, values, depth):
        numbers, balance = numbers_from(values), real(balance_of(addresses, 2, tensor, 0, 1)[0])
        first, rest, others = block_of(real), block_of(real), block_of(real)  # others = rest^(L-2)
        of_first, of_rest, power, difference = block_of(real), block_of(real), block_of(real), block_of(real)
        for at in range(begin, begin + n, BLOCK):
            size = min(BLOCK, begin + n - at)
            weights, gradients = weights_of(addresses, 0, tensor, at, size), gradients_of(addresses, 1, tensor, at, size)
            for i in range(size):
                rest[i] = abs(load(weights[i]))
            find_rest(rest, size, depth, balance, numbers)
            fill_power(others, rest, depth - 2, size)
            for i in range(size):
                x, gradient = load(weights[i]), load_gradient(gradients[i]) * numbers.gradient_factor
                product = others[i] * rest[i]
                first[i] = x * zero if product == zero else x / product
                of_first[i] = gradient * product
                of_rest[i] = gradient * (first[i] * others[i])
            raise_all(of_first, size, numbers.direction)
            raise_all(of_rest, size, numbers.direction)
            for i in range(size):
                of_first[i] = -(numbers.decay_rate * first[i] + numbers.step * of_first[i])
                of_rest[i] = -(numbers.decay_rate * rest[i] + numbers.step * of_rest[i])
            fill_differences(power, difference, rest, of_rest, depth - 1, size)
            for i in range(size):
                change = first[i] * difference[i] + of_first[i] * (power[i] + difference[i])
                weights[i] = store(load(weights[i]) + change)

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
) -> None:
    """Update `weights` in place; where `found_inf` is not 0 they keep their values.

    `balances` holds a float64 tensor of one element for each weight; it is not written.
    """
    if not weights or float(found_inf) != 0:
        return
    kind = Kind(power_of(q), weights[0].dtype, gradients[0].dtype)
    real, rate, largest = compute_type(kind.weight), float(lr), at_one(depth)
    # Halley's iteration cubes the error, times (L^2 - 1) / 12 at most.
    close = (6e-3 if real is np.float32 else 8e-6) / depth ** (2 / 3)
    factor = gradient_factor(maximize, grad_scale)
    numbers = factor, rate, rate * weight_decay, depth, depth - 1, largest, 1 / depth, largest - 1 / depth, close
    exponents = (exponent_of(exponent, real) for exponent in (q / depth, 1 / depth, 1 / q, q - 1))
    values: np.ndarray = np.array((*numbers, *(part for exponent in exponents for part in exponent)), real)
    run(step_kernel(kind), tensors_of(weights, gradients, balances), values, depth)
