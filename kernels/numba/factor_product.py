"""Weights as products of factors, with two derivatives, each in one pass over memory.

The definition is reference/factor_product.py. All tensors of a call are flat arrays that share one element order. A kernel is
compiled, once per process, for a dtype; the number of factors is read by its loops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from numba import njit
from torch import Tensor

from .dtype import STORAGES, compute_type, converters
from .parallel import block_of, elements_of, for_each_chunk, row_length, rows_of, run, shared, tensors_of
from .rounding import Rounded, rounded


def tails_loop(factor: Rounded) -> Callable[..., None]:
    """fill_tails(tails, depth, addresses, role, tensor, begin, n, arguments): tails[k] = w_{k+1} ... w_{L-1}.

    w_0 has this role; tails[L-1] is 1 before; `arguments` are those of factor.elements.
    """
    elements, load, _ = factor

    @shared
    def fill_tails(tails, depth, addresses, role, tensor, begin, n, arguments):
        for k in range(depth - 1, 0, -1):
            factors, after, tail = elements(addresses, role + k, tensor, begin, n, k, arguments), tails[k], tails[k - 1]
            for i in range(n):
                tail[i] = load(factors, i) * after[i]

    return fill_tails


@functools.cache
def product_kernel(storage: torch.dtype) -> Callable[..., None]:
    """Roles: factors, result."""
    real = compute_type(storage)
    load, store = converters(storage, real)
    elements = elements_of(STORAGES[storage].memory)

    @njit(nogil=True, error_model="numpy")
    def product_chunk(tensor, begin, n, chunk, addresses, depth, length):
        product = block_of(real)
        for at in range(begin, begin + n, length):
            size = min(length, begin + n - at)
            factors, results = elements(addresses, 0, tensor, at, size), elements(addresses, depth, tensor, at, size)
            for i in range(size):
                product[i] = load(factors[i])
            for k in range(1, depth):
                factors = elements(addresses, k, tensor, at, size)
                for i in range(size):
                    product[i] = product[i] * load(factors[i])
            for i in range(size):
                results[i] = store(product[i])

    return for_each_chunk(product_chunk)


@functools.cache
def backward_kernel(storage: torch.dtype) -> Callable[..., None]:
    """Roles: gradient, factors, results."""
    real = compute_type(storage)
    load, store = converters(storage, real)
    elements, rows, fill_tails = elements_of(STORAGES[storage].memory), rows_of(real), tails_loop(rounded(storage, real))

    @njit(nogil=True, error_model="numpy")
    def backward_chunk(tensor, begin, n, chunk, addresses, depth, length):
        tails, head = rows(depth, length), block_of(real)
        tails[depth - 1] = 1
        for at in range(begin, begin + n, length):
            size = min(length, begin + n - at)
            fill_tails(tails, depth, addresses, 1, tensor, at, size, ())
            gradients = elements(addresses, 0, tensor, at, size)
            for i in range(size):
                head[i] = load(gradients[i])
            for k in range(depth):
                factors, tail = elements(addresses, 1 + k, tensor, at, size), tails[k]
                results = elements(addresses, 1 + depth + k, tensor, at, size)
                for i in range(size):
                    results[i] = store(head[i] * tail[i])
                    head[i] = head[i] * load(factors[i])

    return for_each_chunk(backward_chunk)


@functools.cache
def double_backward_kernel(storage: torch.dtype) -> Callable[..., None]:
    """Roles: gradient, factors, tangents, result, results."""
    real = compute_type(storage)
    load, store = converters(storage, real)
    elements, rows, fill_tails = elements_of(STORAGES[storage].memory), rows_of(real), tails_loop(rounded(storage, real))

    @njit(nogil=True, error_model="numpy")
    def double_backward_chunk(tensor, begin, n, chunk, addresses, depth, length):
        both = rows(2 * depth, length)
        tails, slopes = both[:depth], both[depth:]  # a slope is the tangent of a tail
        head, slope_of_head = block_of(real), block_of(real)
        tails[depth - 1] = 1
        slopes[depth - 1] = 0
        for at in range(begin, begin + n, length):
            size = min(length, begin + n - at)
            fill_tails(tails, depth, addresses, 1, tensor, at, size, ())
            for k in range(depth - 1, 0, -1):
                factors = elements(addresses, 1 + k, tensor, at, size)
                tangents = elements(addresses, 1 + depth + k, tensor, at, size)
                tail, slope, slope_of_tail = tails[k], slopes[k], slopes[k - 1]
                for i in range(size):
                    slope_of_tail[i] = load(tangents[i]) * tail[i] + load(factors[i]) * slope[i]
            head[:size] = 1
            slope_of_head[:size] = 0
            gradients = elements(addresses, 0, tensor, at, size)
            for k in range(depth):
                factors = elements(addresses, 1 + k, tensor, at, size)
                tangents = elements(addresses, 1 + depth + k, tensor, at, size)
                results = elements(addresses, 2 + 2 * depth + k, tensor, at, size)
                tail, slope = tails[k], slopes[k]
                for i in range(size):
                    factor, h, s = load(factors[i]), head[i], slope_of_head[i]
                    results[i] = store(load(gradients[i]) * (s * tail[i] + h * slope[i]))
                    head[i] = h * factor
                    slope_of_head[i] = s * factor + h * load(tangents[i])
            results = elements(addresses, 1 + 2 * depth, tensor, at, size)
            for i in range(size):
                results[i] = store(slope_of_head[i])

    return for_each_chunk(double_backward_chunk)


# -- the ops


def run_on(kernel: Callable[[torch.dtype], Any], depth: int, rows: int, *tensors: Tensor) -> None:
    storage = tensors[0].dtype
    length = row_length(STORAGES[storage].memory, compute_type(storage), rows)
    run(kernel(storage), tensors_of(*((tensor,) for tensor in tensors)), depth, length)


def factor_product(factors: Sequence[Tensor], result: Tensor) -> None:
    """Write x."""
    run_on(product_kernel, len(factors), 1, *factors, result)


def factor_product_backward(gradient: Tensor, factors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """Write dw_i to `results[i]`."""
    depth = len(factors)
    run_on(backward_kernel, depth, depth, gradient, *factors, *results)


def factor_product_double_backward(
    gradient: Tensor, factors: Sequence[Tensor], tangents: Sequence[Tensor], result: Tensor, results: Sequence[Tensor]
) -> None:
    """Write ddx to `result` and ddw_i to `results[i]`."""
    depth = len(factors)
    run_on(double_backward_kernel, depth, 2 * depth, gradient, *factors, *tangents, result, *results)
