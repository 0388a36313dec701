"""Steepest descent in L_p, 1/p + 1/q = 1, one pass over memory [Eq. 3, Eq. 5, Alg. 2]. Definition: reference/steepest_step.py.

A tensor is a flat array at its address: weight, gradient and momentum are dense blocks that share one element order. One launch
serves all tensors whose addresses allow 128-bit loads and stores, a second one the others. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..number import Number
from ..rounding import NEAREST, Rounding
from . import rounding as roundings
from .dtype import STORAGES, narrow, number, widen
from .rounding import draws_at, draws_of, rounded, widened
from .signed_power import power_of, signed_power
from .tensor_table import CHUNK, chunk_of, operand, tables

WARPS = 4
THREADS = WARPS * (64 if torch.version.hip else 32)
HELD = 8  # elements by a thread at once: 128 bits of bfloat16
BLOCK = HELD * THREADS
# Every operation is rounded on its own: no fusion.
LAUNCH = {"CHUNK": CHUNK, "BLOCK": BLOCK, "num_warps": WARPS, "enable_fp_fusion": False}
# Neither the alignment of a number nor a count of tensors is worth another compilation.
UNSPECIALISED = ["count", "lr_at", "step_scale_at", "grad_scale_at", "found_inf_at", "beta1_at", "beta2_at"]
UNSPECIALISED += ["partial_sums", "step_at", "seed", "step"]


class Numbers(NamedTuple):
    """The options, each rounded once from float64 to the compute type, but for the exponent q - 1."""

    gradient_factor: Any
    coupled: Any
    beta1: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    decay: Any
    step: Any
    exponent: Any


class Operands(NamedTuple):
    """Addresses. What there is not, the gradient stands in its place: Triton 3.6 has no tuple with None in it."""

    weight: Any
    gradient: Any
    momentum: Any
    compensation: Any


# ---- kernels -----------------------------------------------------------------------------------------------------------------


@triton.jit
def numbers_of(
    lr, step_scale, grad_scale, weight_decay, coupled, beta1, beta2, exponent, MAXIMIZE: tl.constexpr, REAL: tl.constexpr
):
    return Numbers(
        ((-1.0 if MAXIMIZE else 1.0) / grad_scale).to(REAL),
        number(coupled).to(REAL),
        beta1.to(REAL),
        (1.0 - beta1).to(REAL),
        beta2.to(REAL),
        (1.0 - beta2).to(REAL),
        (1.0 - lr * number(weight_decay)).to(REAL),
        (lr * step_scale).to(REAL),
        number(exponent),
    )


@triton.jit
def operands_of(
    column,
    count,
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    MOMENTUM: tl.constexpr,
    MODE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    LAST: tl.constexpr = 2 if MOMENTUM is None else 3
    weight, gradient = operand(column, count, 0, WEIGHT, ALIGNED), operand(column, count, 1, GRADIENT, ALIGNED)
    momentum = gradient if MOMENTUM is None else operand(column, count, 2, MOMENTUM, ALIGNED)
    compensation = operand(column, count, LAST, tl.int16, ALIGNED) if MODE == "compensated" else gradient
    return Operands(weight, gradient, momentum, compensation)


@triton.constexpr_function
def rows_of(momentum: object, mode: str) -> int:
    """Of a table, beyond numel and chunks."""
    return (2 if momentum is None else 3) + {"nearest": 0, "compensated": 1, "stochastic": 2}[mode]


@triton.jit
def load(address, offsets, mask, REAL: tl.constexpr):
    return widen(tl.load(address + offsets, mask=mask), REAL)


@triton.jit
def store(address, offsets, mask, x):
    tl.store(address + offsets, narrow(x, address.dtype.element_ty), mask=mask)


@triton.jit
def load_rounded(address, compensation, offsets, mask, REAL: tl.constexpr, MODE: tl.constexpr):
    """Weights that were stored by store_rounded."""
    stored = tl.load(address + offsets, mask=mask)
    low = tl.load(compensation + offsets, mask=mask) if MODE == "compensated" else stored
    return widened(stored, low, REAL, MODE)


@triton.jit
def store_rounded(address, compensation, offsets, mask, x, draws, MODE: tl.constexpr, ALIGNED: tl.constexpr):
    stored, low = rounded(x, draws, 0, address.dtype.element_ty, MODE, ALIGNED)
    tl.store(address + offsets, stored, mask=mask)
    if MODE == "compensated":
        tl.store(compensation + offsets, low, mask=mask)


@triton.jit
def direction(w, g, m, numbers, MOMENTUM: tl.constexpr, COUPLED: tl.constexpr):
    """The gradient that momentum sees, and c, the vector that the step follows; `g` is scaled already."""
    if COUPLED:
        g = g + numbers.coupled * w
    if MOMENTUM is None:
        return g, g
    else:
        return g, numbers.beta1 * m + numbers.one_minus_beta1 * g


@triton.jit
def moved(w, g, m, numbers, MOMENTUM: tl.constexpr, POWER: tl.constexpr, COUPLED: tl.constexpr):
    """The new weight and the new momentum; `g` is scaled already."""
    g, c = direction(w, g, m, numbers, MOMENTUM, COUPLED)
    w = w * numbers.decay - numbers.step * signed_power(c, numbers.exponent, POWER)
    if MOMENTUM is None:
        return w, m
    else:
        return w, numbers.beta2 * m + numbers.one_minus_beta2 * g


@triton.jit
def load_operands(operands, offsets, mask, numbers, MOMENTUM: tl.constexpr, MODE: tl.constexpr):
    """w, g and m, of which g is scaled."""
    REAL: tl.constexpr = numbers.gradient_factor.dtype
    w = load_rounded(operands.weight, operands.compensation, offsets, mask, REAL, MODE)
    g = load(operands.gradient, offsets, mask, REAL) * numbers.gradient_factor
    m = g if MOMENTUM is None else load(operands.momentum, offsets, mask, REAL)
    return w, g, m


@triton.jit
def step_block(
    operands,
    offsets,
    mask,
    numbers,
    draws,
    MOMENTUM: tl.constexpr,
    POWER: tl.constexpr,
    COUPLED: tl.constexpr,
    MODE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    w, g, m = load_operands(operands, offsets, mask, numbers, MOMENTUM, MODE)
    w, m = moved(w, g, m, numbers, MOMENTUM, POWER, COUPLED)
    store_rounded(operands.weight, operands.compensation, offsets, mask, w, draws, MODE, ALIGNED)
    if MOMENTUM is not None:
        store(operands.momentum, offsets, mask, m)


@triton.jit
def power_block(
    operands,
    offsets,
    mask,
    numbers,
    MOMENTUM: tl.constexpr,
    POWER: tl.constexpr,
    COUPLED: tl.constexpr,
    MODE: tl.constexpr,
):
    """|c|^q = c u(c) in float64."""
    w, g, m = load_operands(operands, offsets, mask, numbers, MOMENTUM, MODE)
    _, c = direction(w, g, m, numbers, MOMENTUM, COUPLED)
    return c.to(tl.float64) * signed_power(c, numbers.exponent, POWER).to(tl.float64)


# In both kernels only a tensor's last block has a mask: one that may end anywhere splits the 128-bit loads and stores.


@triton.jit(do_not_specialize=UNSPECIALISED)
def step_kernel(
    table,
    count,
    lr_at,
    step_scale_at,
    grad_scale_at,
    found_inf_at,
    beta1_at,
    beta2_at,
    lr: tl.float64,
    step_scale: tl.float64,
    grad_scale: tl.float64,
    weight_decay: tl.float64,
    coupled: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    exponent: tl.float64,
    step_at,
    step: tl.float64,
    seed: tl.uint64,
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    MOMENTUM: tl.constexpr,
    POWER: tl.constexpr,
    COUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    MODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    REAL: tl.constexpr = tl.float64 if WEIGHT == tl.float64 else tl.float32
    column, start, stop = chunk_of(table, count, rows_of(MOMENTUM, MODE), CHUNK)
    if found_inf_at is not None:
        stop = tl.where(tl.load(found_inf_at) != 0, start, stop)
    operands = operands_of(column, count, WEIGHT, GRADIENT, MOMENTUM, MODE, ALIGNED)
    rate, scale, unscale = number(lr, lr_at), number(step_scale, step_scale_at), number(grad_scale, grad_scale_at)
    beta1, beta2 = number(beta1, beta1_at), number(beta2, beta2_at)
    numbers = numbers_of(rate, scale, unscale, weight_decay, coupled, beta1, beta2, exponent, MAXIMIZE, REAL)
    draws = draws_of(column, count, rows_of(MOMENTUM, "nearest") + 2, seed, step_at, step, MODE)
    for block in range(CHUNK // BLOCK):
        first = tl.multiple_of(start + block * BLOCK, BLOCK)
        offsets = first + tl.arange(0, BLOCK)
        if first + BLOCK <= stop:
            step_block(operands, offsets, None, numbers, draws_at(draws, first), MOMENTUM, POWER, COUPLED, MODE, ALIGNED)
        elif first < stop:
            mask = offsets < stop
            step_block(operands, offsets, mask, numbers, draws_at(draws, first), MOMENTUM, POWER, COUPLED, MODE, ALIGNED)


@triton.jit(do_not_specialize=UNSPECIALISED)
def power_sum_kernel(
    table,
    count,
    partial_sums,
    grad_scale_at,
    beta1_at,
    grad_scale: tl.float64,
    coupled: tl.float64,
    beta1: tl.float64,
    exponent: tl.float64,
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    MOMENTUM: tl.constexpr,
    POWER: tl.constexpr,
    COUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    MODE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    REAL: tl.constexpr = tl.float64 if WEIGHT == tl.float64 else tl.float32
    column, start, stop = chunk_of(table, count, rows_of(MOMENTUM, MODE), CHUNK)
    operands = operands_of(column, count, WEIGHT, GRADIENT, MOMENTUM, MODE, ALIGNED)
    none, unscale = number(0.0), number(grad_scale, grad_scale_at)
    numbers = numbers_of(none, none, unscale, 0.0, coupled, number(beta1, beta1_at), none, exponent, MAXIMIZE, REAL)
    total = tl.zeros((BLOCK,), tl.float64)
    for block in range(CHUNK // BLOCK):
        first = tl.multiple_of(start + block * BLOCK, BLOCK)
        offsets = first + tl.arange(0, BLOCK)
        if first + BLOCK <= stop:
            total += power_block(operands, offsets, None, numbers, MOMENTUM, POWER, COUPLED, MODE)
        elif first < stop:
            mask = offsets < stop
            total += tl.where(mask, power_block(operands, offsets, mask, numbers, MOMENTUM, POWER, COUPLED, MODE), 0.0)
    tl.store(partial_sums + tl.program_id(0), tl.sum(total, 0))


# ---- launches ----------------------------------------------------------------------------------------------------------------


def value(number: Number) -> float:
    return 0.0 if isinstance(number, Tensor) else float(number)


def address(number: Number) -> Tensor | None:
    return number if isinstance(number, Tensor) else None


def specialisation(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    q: float,
    coupled_weight_decay: float,
    maximize: bool,
) -> dict[str, Any]:
    """What a kernel is compiled for."""
    return {
        "WEIGHT": STORAGES[weights[0].dtype],
        "GRADIENT": STORAGES[gradients[0].dtype],
        "MOMENTUM": None if momenta is None else STORAGES[momenta[0].dtype],
        "POWER": power_of(q),
        "COUPLED": coupled_weight_decay != 0,
        "MAXIMIZE": maximize,
    }


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
    if value(found_inf) != 0:
        return
    tensors: list[Sequence[Tensor]] = [weights, gradients] if momenta is None else [weights, gradients, momenta]
    compiled_for = specialisation(weights, gradients, momenta, q, coupled_weight_decay, maximize) | LAUNCH
    mode = roundings.mode_of(rounding, weights[0].dtype)
    tensors.extend(roundings.compensations_of(rounding, mode))
    how = roundings.arguments(rounding, mode)
    with torch.accelerator.device_index(weights[0].device.index):
        for table in tables(*tensors, numbers=roundings.columns_of(rounding, mode)):
            step_kernel[(table.chunks,)](
                table.rows,
                table.tensors,
                *map(address, (lr, step_scale, grad_scale, found_inf, *betas)),
                *map(value, (lr, step_scale, grad_scale)),
                weight_decay,
                coupled_weight_decay,
                *map(value, betas),
                q - 1,
                ALIGNED=table.aligned,
                **how,
                **compiled_for,
            )


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
    """sum |c|^q over all elements of all tensors: a 0-dim float64 tensor. ||c||_q^(2-q) is its power (2-q)/q."""
    tensors: list[Sequence[Tensor]] = [weights, gradients] if momenta is None else [weights, gradients, momenta]
    compiled_for = specialisation(weights, gradients, momenta, q, coupled_weight_decay, maximize) | LAUNCH
    mode = roundings.mode_of_reading(rounding, weights[0].dtype)
    tensors.extend(roundings.compensations_of(rounding, mode))
    with torch.accelerator.device_index(weights[0].device.index):
        launches = tables(*tensors)
        # One sum for each program, added in an order that does not depend on which of them ends first.
        programs = [table.chunks for table in launches]
        sums = weights[0].new_empty(sum(programs), dtype=torch.float64)
        for part, table in zip(sums.split(programs), launches, strict=True):
            power_sum_kernel[(table.chunks,)](
                table.rows,
                table.tensors,
                part,
                address(grad_scale),
                address(betas[0]),
                value(grad_scale),
                coupled_weight_decay,
                value(betas[0]),
                q - 1,
                MODE=mode,
                ALIGNED=table.aligned,
                **compiled_for,
            )
        return sums.sum()
