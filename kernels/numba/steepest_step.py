"""Steepest descent in L_p, 1/p + 1/q = 1, in one pass over memory [Eq. 3, Eq. 5, Alg. 2].

The definition is reference/steepest_step.py. A tensor is a flat array at its address: weight, gradient and momentum are dense
blocks that share one element order. A kernel is compiled, once per process, for each `Kind` that a call asks for.
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
from .dtype import STORAGES, compute_type, converters, scalar
from .parallel import BLOCK, CHUNK, block_of, elements_of, for_each_chunk, run, shared
from .rounding import Rounded, mode_of, mode_of_reading, rounded, tensors_and_arguments
from .signed_power import Exponent, Power, exponent_of, power_of, scalar_functions


class Kind(NamedTuple):
    """What a kernel is compiled for."""

    power: Power
    weight: torch.dtype
    gradient: torch.dtype
    momentum: torch.dtype | None
    coupled: bool
    rounding: str = "nearest"  # mode of the weights


class Numbers(NamedTuple):
    """The options, each rounded once from float64 to the compute type."""

    gradient_factor: float
    coupled: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    decay: float
    step: float
    exponent: Exponent


# -- the arithmetic


class Scalars(NamedTuple):
    direction: Callable[..., Any]  # weight, gradient, momentum, numbers -> c
    logarithm: Callable[[Any], Any]  # c -> whole, fraction
    signed_power: Callable[..., Any]  # c, whole, fraction, exponent -> u
    step: Callable[..., Any]  # weight, gradient, momentum, c, whole, fraction, numbers -> weight, momentum


def scalars_of(kind: Kind) -> Scalars:
    logarithm, signed_power = scalar_functions(kind.power, compute_type(kind.weight))
    has_momentum, has_coupled = kind.momentum is not None, kind.coupled

    @scalar
    def gradient_seen(weight, gradient, numbers):
        gradient = gradient * numbers.gradient_factor
        if has_coupled:
            gradient = gradient + numbers.coupled * weight
        return gradient

    @scalar
    def direction(weight, gradient, momentum, numbers):
        c = gradient_seen(weight, gradient, numbers)
        if has_momentum:
            c = numbers.beta1 * momentum + numbers.one_minus_beta1 * c
        return c

    @scalar
    def step(weight, gradient, momentum, c, whole, fraction, numbers):
        if has_momentum:
            momentum = numbers.beta2 * momentum + numbers.one_minus_beta2 * gradient_seen(weight, gradient, numbers)
        return weight * numbers.decay - numbers.step * signed_power(c, whole, fraction, numbers.exponent), momentum

    return Scalars(direction, logarithm, signed_power, step)


# -- the loops


@njit(forceinline=True, error_model="numpy")
def numbers_from(values):
    exponent = Exponent(values[8], values[9], values[10])
    return Numbers(values[0], values[1], values[2], values[3], values[4], values[5], values[6], values[7], exponent)


def rounded_weights(kind: Kind) -> Rounded:
    return rounded(kind.weight, compute_type(kind.weight), kind.rounding)


def operands_of(kind: Kind) -> Callable[..., Any]:
    """operands(addresses, tensor, begin, n, arguments) -> weights, gradients and momenta of n elements from `begin` on."""
    has_momentum, weights = kind.momentum is not None, rounded_weights(kind).elements
    gradients, momenta = (elements_of(STORAGES[storage].memory) for storage in (kind.gradient, kind.momentum or kind.weight))

    @shared  # weights may lie beside noise on the stack
    def operands(addresses, tensor, begin, n, arguments):
        return (
            weights(addresses, 0, tensor, begin, n, 0, arguments),
            gradients(addresses, 1, tensor, begin, n),
            momenta(addresses, 2 if has_momentum else 0, tensor, begin, n),
        )

    return operands


def step_loop(kind: Kind, gradient_at: Callable[..., Any], after: Callable[..., None]) -> Callable[..., None]:
    """step_elements(weights, gradients, momenta, n, numbers): at general q or stochastic BLOCK elements at most.

    `gradients` is what gradient_at(gradients, i) reads. Then after(gradients, i, weight, stored) is told the weight as it was
    and as it is stored.
    """
    real = compute_type(kind.weight)
    direction, logarithm, _, step = scalars_of(kind)
    _, load_weight, store_weight = rounded_weights(kind)
    load_momentum, store_momentum = converters(kind.momentum or kind.weight, real)
    has_momentum, none = kind.momentum is not None, real(0)

    @shared
    def step_elements(weights, gradients, momenta, n, numbers):
        for i in range(n):
            weight, gradient, m = load_weight(weights, i), gradient_at(gradients, i), load_momentum(momenta[i])
            c = direction(weight, gradient, m, numbers)
            new, m = step(weight, gradient, m, c, none, none, numbers)
            stored = store_weight(weights, i, new)
            after(gradients, i, weight, stored)
            if has_momentum:
                momenta[i] = store_momentum(m)

    # In two loops each half finds its constants and intermediate results in registers.
    @shared
    def step_elements_in_halves(weights, gradients, momenta, n, numbers):
        c, whole, fraction = block_of(real), block_of(real), block_of(real)
        for i in range(n):
            weight, gradient, m = load_weight(weights, i), gradient_at(gradients, i), load_momentum(momenta[i])
            c[i] = direction(weight, gradient, m, numbers)
            whole[i], fraction[i] = logarithm(c[i])
        for i in range(n):
            weight, gradient, m = load_weight(weights, i), gradient_at(gradients, i), load_momentum(momenta[i])
            new, m = step(weight, gradient, m, c[i], whole[i], fraction[i], numbers)
            stored = store_weight(weights, i, new)
            after(gradients, i, weight, stored)
            if has_momentum:
                momenta[i] = store_momentum(m)

    return step_elements_in_halves if kind.power is Power.GENERAL else step_elements


def plain_step_loop(kind: Kind) -> Callable[..., None]:
    load, _ = converters(kind.gradient, compute_type(kind.weight))

    @scalar
    def gradient_at(gradients, i):
        return load(gradients[i])

    @scalar
    def after(gradients, i, weight, stored):
        pass

    return step_loop(kind, gradient_at, after)


@functools.cache
def step_kernel(kind: Kind) -> Callable[..., None]:
    operands, step_elements = operands_of(kind), plain_step_loop(kind)

    @njit(nogil=True, error_model="numpy")
    def step_chunk(tensor, begin, n, chunk, addresses, values, arguments):
        weights, gradients, momenta = operands(addresses, tensor, begin, n, arguments)
        step_elements(weights, gradients, momenta, n, numbers_from(values))

    @njit(nogil=True, error_model="numpy")
    def step_chunk_in_blocks(tensor, begin, n, chunk, addresses, values, arguments):
        numbers = numbers_from(values)
        for at in range(begin, begin + n, BLOCK):
            size = min(BLOCK, begin + n - at)
            weights, gradients, momenta = operands(addresses, tensor, at, size, arguments)
            step_elements(weights, gradients, momenta, size, numbers)

    in_blocks = kind.power is Power.GENERAL or kind.rounding == "stochastic"
    return for_each_chunk(step_chunk_in_blocks if in_blocks else step_chunk)


@functools.cache
def power_kernel(kind: Kind) -> Callable[..., None]:
    real = compute_type(kind.weight)
    direction, logarithm, signed_power, _ = scalars_of(kind)
    load_weight = rounded_weights(kind).load
    load_gradient, _ = converters(kind.gradient, real)
    load_momentum, _ = converters(kind.momentum or kind.weight, real)
    operands, needs_logarithm = operands_of(kind), kind.power is Power.GENERAL

    @njit(nogil=True, error_model="numpy")
    def power_chunk(tensor, begin, n, chunk, addresses, values, sums, arguments):
        numbers = numbers_from(values)
        lanes = block_of(np.float64)
        used = 1  # more lanes would stay 0 and change no bit
        while used < min(n, BLOCK):
            used *= 2
        lanes[:used] = 0
        c, whole, fraction = block_of(real), block_of(real), block_of(real)
        for at in range(begin, begin + n, BLOCK):
            size = min(BLOCK, begin + n - at)
            weights, gradients, momenta = operands(addresses, tensor, at, size, arguments)
            for i in range(size):
                weight, gradient, m = load_weight(weights, i), load_gradient(gradients[i]), load_momentum(momenta[i])
                c[i] = direction(weight, gradient, m, numbers)
                if needs_logarithm:
                    whole[i], fraction[i] = logarithm(c[i])
            for i in range(size):
                lanes[i] += np.float64(c[i]) * np.float64(signed_power(c[i], whole[i], fraction[i], numbers.exponent))
        half = used // 2
        while half > 0:
            for i in range(half):
                lanes[i] += lanes[i + half]
            half //= 2
        sums[chunk] = lanes[0]

    return for_each_chunk(power_chunk)


# -- the ops


def kind_of(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    q: float,
    coupled_weight_decay: float,
    rounding: Rounding = NEAREST,
) -> Kind:
    storage, momentum = weights[0].dtype, momenta[0].dtype if momenta is not None else None
    return Kind(power_of(q), storage, gradients[0].dtype, momentum, coupled_weight_decay != 0, mode_of(rounding, storage))


def gradient_factor(maximize: bool, grad_scale: Number) -> float:
    return (-1.0 if maximize else 1.0) / float(grad_scale)


def values_of(
    kind: Kind,
    *,
    q: float,
    betas: tuple[Number, Number],
    coupled_weight_decay: float,
    maximize: bool,
    grad_scale: Number,
    decay: float = 1.0,
    step: float = 0.0,
) -> np.ndarray:
    """`Numbers` as an array of the compute type."""
    real = compute_type(kind.weight)
    beta1, beta2 = map(float, betas)
    factor = gradient_factor(maximize, grad_scale)
    numbers = (factor, coupled_weight_decay, beta1, 1.0 - beta1, beta2, 1.0 - beta2, decay, step, *exponent_of(q - 1, real))
    return np.array(numbers, real)


def steepest_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    *,
    lr: Number,
    q: float,
    betas: tuple[Number, Number],
    weight_decay: float,
    coupled_weight_decay: float,
    maximize: bool,
    step_scale: Number,
    grad_scale: Number,
    found_inf: Number,
    rounding: Rounding = NEAREST,
) -> None:
    """Update `weights` and `momenta` in place; where `found_inf` is not 0 they keep their values."""
    if not weights or float(found_inf) != 0:
        return
    kind = kind_of(weights, gradients, momenta, q, coupled_weight_decay, rounding)
    rate = float(lr)
    values = values_of(
        kind,
        q=q,
        betas=betas,
        coupled_weight_decay=coupled_weight_decay,
        maximize=maximize,
        grad_scale=grad_scale,
        decay=1.0 - rate * weight_decay,
        step=rate * float(step_scale),
    )
    roles = weights, gradients, *(() if momenta is None else (momenta,))
    tensors, arguments = tensors_and_arguments(rounding, kind.rounding, *roles)
    run(step_kernel(kind), tensors, values, arguments)


def steepest_power_sum(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    *,
    q: float,
    betas: tuple[Number, Number],
    coupled_weight_decay: float,
    maximize: bool,
    grad_scale: Number,
    rounding: Rounding = NEAREST,
) -> Tensor:
    """sum |c|^q over all elements of all tensors: a 0-dim float64 tensor, in the reference's order."""
    total = 0.0
    if weights:
        kind = kind_of(weights, gradients, momenta, q, coupled_weight_decay, rounding)
        kind = kind._replace(rounding=mode_of_reading(kind.rounding))
        values = values_of(
            kind, q=q, betas=betas, coupled_weight_decay=coupled_weight_decay, maximize=maximize, grad_scale=grad_scale
        )
        roles = weights, gradients, *(() if momenta is None else (momenta,))
        tensors, arguments = tensors_and_arguments(rounding, kind.rounding, *roles)
        chunks = int((-(-tensors.numel // CHUNK)).sum())
        sums = np.zeros(2 ** max(chunks - 1, 0).bit_length())
        run(power_kernel(kind), tensors, values, sums, arguments)
        while sums.size > 1:
            sums = sums[: sums.size // 2] + sums[sums.size // 2 :]
        total = sums.item()
    return torch.tensor(total, dtype=torch.float64, device="cpu")
