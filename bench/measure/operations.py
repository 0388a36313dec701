"""Floating-point operations of an op for each weight, in float32 and 16 bits, counted in the scalar functions of csrc/math.

A fused multiply-add counts two; integer operations and choices, none. Peers with the same result are credited with as many.
"""

from __future__ import annotations


def power(q: float) -> int:
    """sign(c) |c|^(q-1)."""
    if q in (1.0, 2.0):
        return 0
    if q == 1.5:
        return 1  # a square root
    return 17 + 22  # a logarithm by a polynomial of degree 7, an exponential by one of degree 5


STEP = 3  # w (1 - lr wd) - lr u
SCALED = 1  # a gradient, by 1 / grad_scale


def steepest_step(q: float) -> int:
    return SCALED + power(q) + STEP


def integer_power(exponent: int) -> int:
    """x^n by squaring."""
    return 0 if exponent < 2 else exponent.bit_length() - 1 + exponent.bit_count() - 1


def factor_step(depth: int, q: float, storage: str) -> int:
    """The factors' gradients, their steps, and the new product."""
    steps = (2 if storage == "tied" else depth) * steepest_step(q)
    if storage == "tied":
        return SCALED + 2 * integer_power(depth - 2) + 4 + steps + 2
    return SCALED + _gradients(depth) + steps + depth - 1


def _gradients(depth: int) -> int:
    """Products from either end, then one of two ends for each factor."""
    return 3 * depth - 4


def factor_product(depth: int) -> int:
    """Forward and backward."""
    return depth - 1 + _gradients(depth)


def mirror_step(depth: int, q: float) -> int | None:
    """At depth 2 in closed form; deeper, the number depends on the weight."""
    return SCALED + 2 * power(q) + 12 if depth == 2 else None


def diagonal_flow(k: int, n: int) -> int:
    """The two products with Z of a step of one run; what else it does grows with k + n only."""
    return 4 * k * n
