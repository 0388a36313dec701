"""Steepest descent on the factors of a weight, given the weight's gradient, in one pass over memory [Eq. 5, Sec. 4].

The definition is reference/factor_step.py. The tensors of a weight are flat arrays that share one element order. A kernel is
compiled, once per process, for each `Kind` that a call asks for; the number of factors is read by its loops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from numba import njit
from torch import Tensor

from ..number import Number
from ..rounding import NEAREST, Rounding
from . import steepest_step
from .dtype import STORAGES, compute_dtype, compute_type, converters, scalar
from .factor_product import tails_loop
from .parallel import block_of, elements_of, for_each_chunk, row_length, rows_of, run, shared
from .rounding import Rounded, mode_of, mode_of_reading, rounded, tensors_and_arguments
from .signed_power import power_of
from .steepest_step import gradient_factor, numbers_from, plain_step_loop, step_loop, values_of


class Kind(NamedTuple):
    """What a kernel is compiled for."""

    weight: torch.dtype
    gradient: torch.dtype
    factor: steepest_step.Kind  # of the step of each factor, whose gradient is in the compute type


@scalar
def highest_bit(n):
    bit = 0
    while n >> (bit + 1) != 0:
        bit += 1
    return bit


@functools.cache
def power_loop(storage: torch.dtype, mode: str = "nearest") -> Callable[..., None]:
    """fill_power(power, bases, exponent, n), exponent >= 0: its bits from the highest down, squaring for each.

    `bases` are the elements of a `Rounded`.
    """
    real = compute_type(storage)
    load, one = rounded(storage, real, mode).load, real(1)

    @shared
    def fill_power(power, bases, exponent, n):
        for i in range(n):
            power[i] = load(bases, i) if exponent > 0 else one
        for bit in range(highest_bit(exponent) - 1, -1, -1):
            if exponent >> bit & 1:
                for i in range(n):
                    power[i] = power[i] * power[i] * load(bases, i)
            else:
                for i in range(n):
                    power[i] = power[i] * power[i]

    return fill_power


class Loops(NamedTuple):
    """What the kernels of a kind are made of: the elements of each role, and conversions."""

    weights: Callable[..., Any]
    gradients: Callable[..., Any]
    momenta: Callable[..., Any]
    store_weight: Callable[[Any], Any]
    load_gradient: Callable[[Any], Any]
    factor: Rounded


def loops_of(kind: Kind) -> Loops:
    real, factor = compute_type(kind.weight), kind.factor
    storages = kind.weight, kind.gradient, factor.momentum or factor.weight
    weights, gradients, momenta = (elements_of(STORAGES[storage].memory) for storage in storages)
    (_, store_weight), (load_gradient, _) = (converters(storage, real) for storage in storages[:2])
    return Loops(weights, gradients, momenta, store_weight, load_gradient, rounded(factor.weight, real, factor.rounding))


@functools.cache
def full_kernel(kind: Kind) -> Callable[..., None]:
    """Roles: weights, gradients, factors, momenta."""
    real, has_momentum = compute_type(kind.weight), kind.factor.momentum is not None
    weights_of, gradients_of, momenta_of, store_weight, load_gradient, factor = loops_of(kind)
    factors_of, rows = factor.elements, rows_of(real)
    fill_tails = tails_loop(rounded(kind.factor.weight, real, mode_of_reading(kind.factor.rounding)))

    @scalar
    def gradient_at(products, i):
        head, tail, _ = products
        return head[i] * tail[i]

    @scalar
    def after(products, i, factor, stored):
        head, _, product = products
        head[i] = head[i] * factor
        product[i] = product[i] * stored

    step = step_loop(kind.factor, gradient_at, after)

    @njit(nogil=True, error_model="numpy")
    def full_chunk(tensor, begin, n, chunk, addresses, values, scale, depth, length, arguments):
        numbers = numbers_from(values)
        tails, head, product = rows(depth, length), block_of(real), block_of(real)
        tails[depth - 1] = 1
        for at in range(begin, begin + n, length):
            size = min(length, begin + n - at)
            fill_tails(tails, depth, addresses, 2, tensor, at, size, arguments)
            gradients, weights = gradients_of(addresses, 1, tensor, at, size), weights_of(addresses, 0, tensor, at, size)
            for i in range(size):
                head[i] = load_gradient(gradients[i]) * scale
            product[:size] = 1
            for k in range(depth):
                factors = factors_of(addresses, 2 + k, tensor, at, size, k, arguments)
                momenta = momenta_of(addresses, 2 + k + (depth if has_momentum else 0), tensor, at, size)
                step(factors, (head, tails[k], product), momenta, size, numbers)
            for i in range(size):
                weights[i] = store_weight(product[i])

    return for_each_chunk(full_chunk)


@functools.cache
def tied_kernel(kind: Kind) -> Callable[..., None]:
    """Roles: weights, gradients, w_1, w_2 = ... = w_L, their momenta."""
    real, has_momentum = compute_type(kind.weight), kind.factor.momentum is not None
    weights_of, gradients_of, momenta_of, store_weight, load_gradient, factor = loops_of(kind)
    factors_of, load, _ = factor
    step, fill_power = plain_step_loop(kind.factor), power_loop(kind.factor.weight, kind.factor.rounding)

    @njit(nogil=True, error_model="numpy")
    def tied_chunk(tensor, begin, n, chunk, addresses, values, scale, depth, length, arguments):
        numbers = numbers_from(values)
        others, of_first, of_rest = block_of(real), block_of(real), block_of(real)  # others = rest^(L-2)
        for at in range(begin, begin + n, length):
            size = min(length, begin + n - at)
            firsts = factors_of(addresses, 2, tensor, at, size, 0, arguments)
            rests = factors_of(addresses, 3, tensor, at, size, 1, arguments)
            gradients, weights = gradients_of(addresses, 1, tensor, at, size), weights_of(addresses, 0, tensor, at, size)
            fill_power(others, rests, depth - 2, size)
            for i in range(size):
                gradient, first, rest = load_gradient(gradients[i]) * scale, load(firsts, i), load(rests, i)
                of_first[i] = gradient * (others[i] * rest)
                of_rest[i] = gradient * (first * others[i])
            step(firsts, of_first, momenta_of(addresses, 4 if has_momentum else 2, tensor, at, size), size, numbers)
            step(rests, of_rest, momenta_of(addresses, 5 if has_momentum else 3, tensor, at, size), size, numbers)
            fill_power(others, rests, depth - 2, size)
            for i in range(size):
                weights[i] = store_weight(load(firsts, i) * (others[i] * load(rests, i)))

    return for_each_chunk(tied_chunk)


# -- the op


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
    if not weights or float(found_inf) != 0:
        return
    real = compute_type(weights[0].dtype)
    momentum = momenta[0][0].dtype if momenta is not None else None
    storage, computing = factors[0][0].dtype, compute_dtype(weights[0].dtype)
    mode = mode_of(rounding, storage)
    step = steepest_step.Kind(power_of(q), storage, computing, momentum, coupled_weight_decay != 0, mode)
    kind = Kind(weights[0].dtype, gradients[0].dtype, step)
    rate = float(lr)
    values = values_of(
        step,
        q=q,
        betas=betas,
        coupled_weight_decay=coupled_weight_decay,
        maximize=False,
        grad_scale=1.0,  # each factor's gradient is a product with the scaled one
        decay=1.0 - rate * weight_decay,
        step=rate,
    )
    scale = real(gradient_factor(maximize, grad_scale))
    full = len(factors) == depth
    length = row_length(STORAGES[step.weight].memory, real, depth if full else 1)
    tensors, arguments = tensors_and_arguments(rounding, mode, weights, gradients, *factors, *(momenta or ()))
    run(full_kernel(kind) if full else tied_kernel(kind), tensors, values, scale, depth, length, arguments)
