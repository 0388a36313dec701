"""Weights as products of L factors, x = w_1 * ... * w_L elementwise, with two derivatives: the definition.

    x      = ((w_1 w_2) w_3) ... w_L
    dw_i   = (dx w_1 ... w_{i-1}) (w_{i+1} ... w_L)

by products from the front and from the back, never by division, so a factor of 0 is exact. With a tangent v_i beside each w_i,
a product of pairs is (a, da) (b, db) = (a b, da b + a db), and

    ddx    = tangent of (w_1, v_1) ... (w_L, v_L)
    ddw_i  = dx * tangent of ((w_1, v_1) ... (w_{i-1}, v_{i-1})) ((w_{i+1}, v_{i+1}) ... (w_L, v_L))

are the gradients of sum_i v_i dw_i with respect to dx and w_i: what a Hessian-vector product needs.

Each operation is rounded on its own, in float32 for 16- and 32-bit tensors and in float64 for 64-bit ones; a result is rounded
to its tensor's dtype once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .steepest_step import compute_dtype

Dual = tuple[Tensor, Tensor]  # a number and its tangent


def product(factors: Sequence[Tensor]) -> Tensor:
    """w_1 ... w_L, from the front."""
    x = factors[0]
    for w in factors[1:]:
        x = x * w
    return x


def suffixes(factors: Sequence[Tensor]) -> list[Tensor]:
    """w_{i+1} ... w_L for each i, from the back; 1 for the last."""
    result = [torch.ones_like(factors[0])]
    for w in reversed(factors[1:]):
        result.append(w * result[-1])
    return result[::-1]


def factor_gradients(gradient: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """dw_1, ..., dw_L from dx."""
    result, head = [], gradient
    for w, tail in zip(factors, suffixes(factors), strict=True):
        result.append(head * tail)
        head = head * w
    return result


def dual_product(a: Dual, b: Dual) -> Dual:
    return a[0] * b[0], a[1] * b[0] + a[0] * b[1]


def second_gradients(gradient: Tensor, factors: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """ddx, and ddw_1, ..., ddw_L."""
    one = (torch.ones_like(gradient), torch.zeros_like(gradient))
    duals = list(zip(factors, tangents, strict=True))
    tails = [one]
    for dual in reversed(duals[1:]):
        tails.append(dual_product(dual, tails[-1]))
    result, head = [], one
    for dual, tail in zip(duals, reversed(tails), strict=True):
        result.append(gradient * dual_product(head, tail)[1])
        head = dual_product(head, dual)
    return head[1], result


@torch.no_grad()
def factor_product(factors: Sequence[Tensor], result: Tensor) -> None:
    """Write x."""
    dtype = compute_dtype(result.dtype)
    result.copy_(product([w.to(dtype) for w in factors]))


@torch.no_grad()
def factor_product_backward(gradient: Tensor, factors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """Write dw_i to `results[i]`."""
    dtype = compute_dtype(gradient.dtype)
    for result, value in zip(results, factor_gradients(gradient.to(dtype), [w.to(dtype) for w in factors]), strict=True):
        result.copy_(value)


@torch.no_grad()
def factor_product_double_backward(
    gradient: Tensor, factors: Sequence[Tensor], tangents: Sequence[Tensor], result: Tensor, results: Sequence[Tensor]
) -> None:
    """Write ddx to `result` and ddw_i to `results[i]`."""
    dtype = compute_dtype(gradient.dtype)
    duals = [[t.to(dtype) for t in tensors] for tensors in (factors, tangents)]
    of_gradient, of_factors = second_gradients(gradient.to(dtype), *duals)
    result.copy_(of_gradient)
    for target, value in zip(results, of_factors, strict=True):
        target.copy_(value)
