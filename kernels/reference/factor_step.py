"""Steepest descent on the factors of a weight, x = w_1 * ... * w_L, given the gradient of x: the definition [Eq. 5, Sec. 4].

    g <- g / grad_scale;  g <- -g if maximize
    g_i <- g prod_{j != i} w_j              all at the old factors
    w_i, m_i <- steepest_step(w_i, g_i, m_i)     for each i: decay, momentum and power as in steepest_step.py
    x <- w_1 ... w_L

Full: L factors, gradients and product as in factor_product.py. Tied: w_2 = ... = w_L = r, which equal gradients keep equal, so
two factors w_1 and r stand for L:

    g_1 = g r^(L-1);  g_r = g (w_1 r^(L-2));  x = w_1 r^(L-1);  r^(L-1) = r^(L-2) r

with r^(L-2) by squaring. Each operation is rounded on its own. Factors are stored as rounding.py says; x is the product of the
factors as they are stored, with their compensations, to the nearest: nothing is computed from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..number import Number
from ..rounding import NEAREST, Rounding
from .factor_product import factor_gradients, product
from .rounding import load, of_tensor
from .steepest_step import compute_dtype, double, rounded, steepest_step


def integer_power(x: Tensor, n: int) -> Tensor:
    """x^n for n >= 0: the bits of n from the highest down, squaring for each, times x where it is 1."""
    if n == 0:
        return torch.ones_like(x)
    result = x
    for bit in bin(n)[3:]:
        result = result * result
        if bit == "1":
            result = result * x
    return result


def gradients_of(gradient: Tensor, factors: Sequence[Tensor], depth: int) -> list[Tensor]:
    """g_i for each factor that is stored."""
    if len(factors) == depth:
        return factor_gradients(gradient, factors)
    first, rest = factors
    power = integer_power(rest, depth - 2)
    return [gradient * (power * rest), gradient * (first * power)]


def product_of(factors: Sequence[Tensor], depth: int) -> Tensor:
    """x, from the factors that are stored."""
    if len(factors) == depth:
        return product(factors)
    first, rest = factors
    return first * (integer_power(rest, depth - 2) * rest)


@torch.no_grad()
def factor_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    factors: Sequence[Sequence[Tensor]],
    momenta: Sequence[Sequence[Tensor]] | None,
    *,
    depth: int,
    maximize: bool,
    grad_scale: Number,
    found_inf: Number,
    rounding: Rounding = NEAREST,
    **options: Any,
) -> None:
    """Write `weights` and update `factors` and `momenta` in place; where `found_inf` is not 0 they keep their values.

    factors[k][i] is the k-th factor that is stored of weight i: k < depth, or k < 2 (tied). `momenta` is alike. `options`: lr,
    q, betas, weight_decay and coupled_weight_decay as of steepest_step.
    """
    for i, weight in enumerate(weights):
        dtype, device = compute_dtype(weight.dtype), weight.device
        stored = [role[i] for role in factors]
        buffers = None if momenta is None else [role[i] for role in momenta]
        g = gradients[i].to(dtype) * rounded(1.0 / double(grad_scale), dtype, device)
        of_factors = gradients_of(-g if maximize else g, [load(w, rounding, i, k) for k, w in enumerate(stored)], depth)
        plain: dict[str, Any] = {"maximize": False, "step_scale": 1.0, "grad_scale": 1.0, "found_inf": found_inf, **options}
        for k, w in enumerate(stored):
            buffer = None if buffers is None else [buffers[k]]
            steepest_step([w], [of_factors[k]], buffer, rounding=of_tensor(rounding, i), role=k, **plain)
        skip = rounded(found_inf, dtype, device) != 0
        x = product_of([load(w, rounding, i, k) for k, w in enumerate(stored)], depth)
        weight.copy_(torch.where(skip, weight.to(dtype), x))
