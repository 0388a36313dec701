"""Whole training runs of diagonal networks: x = w_1 * ... * w_L fitted to y by Z x [Sec. 5, App. F, App. I].

The definition is reference/diagonal_flow.py. A thread takes one run after another, so its numbers depend on nothing else in the
call. A kernel is compiled, once per process, for each power, type and optimiser that a call asks for.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .dtype import compute_type, scalar
from .factor_step import power_loop
from .parallel import loop, submit_others
from .rounding import HALF, WORD, philox
from .signed_power import Power, power_of
from .steepest_step import Kind, numbers_from, scalars_of, values_of

MOST = {torch.float32: 88.0, torch.float64: 709.0}  # exp of more overflows


@scalar
def philox_word(seed, step, j):
    """Word j % 4 of Philox's block of counter (step, j / 4) under the key `seed`."""
    low, high, word = np.uint64(step), np.uint64(j >> 2), j & 3
    c0, c1, c2, c3 = philox(low, low >> HALF, high, high >> HALF, np.uint64(seed), 10)
    return (c0 if word == 0 else c1 if word == 1 else c2 if word == 2 else c3) & WORD


@scalar
def adam_step(w, g, first, second, rate, root_bias, epsilon, numbers):
    """w and its moments; rate and root_bias are without the bias of their start at 0."""
    g = g + numbers.coupled * w
    first = numbers.beta1 * first + numbers.one_minus_beta1 * g
    second = numbers.beta2 * second + numbers.one_minus_beta2 * g * g
    root = type(w)(np.sqrt(second)) * root_bias
    return w * numbers.decay - rate * (first / (root + epsilon)), first, second


@functools.cache
def steps_kernel(power: Power, real: type, adam: bool, storage: torch.dtype) -> Callable[..., None]:
    """take_steps(w_1, r, moments, Z, its transpose, y, integers, values, adams, begin, end) for one run."""
    direction, logarithm, _, step_of_factor = scalars_of(Kind(power, storage, storage, None, coupled=True))
    fill_power, most = power_loop(storage), real(MOST[storage])
    zero, one, two = real(0), real(1), real(2)

    @loop
    def fill_slopes(slopes, predictions, y, rows, weight, exponential):
        if exponential:
            for i in range(rows):
                slopes[i] = -y[i] * weight * real(math.exp(min(-y[i] * predictions[i], most)))
        else:
            for i in range(rows):
                slopes[i] = two * (predictions[i] - y[i]) * weight

    @loop
    def steepest(w, g, n, numbers):
        for i in range(n):
            c = direction(w[i], g[i], zero, numbers)
            whole, fraction = logarithm(c)
            w[i], _ = step_of_factor(w[i], g[i], zero, c, whole, fraction, numbers)

    @loop
    def adaptive(w, g, first, second, n, step, numbers, adams):
        lr, beta1, beta2, epsilon = adams
        rate = real(lr / (1 - beta1 ** (step + 1)))
        root_bias = real(1 / math.sqrt(1 - beta2 ** (step + 1)))
        for i in range(n):
            w[i], first[i], second[i] = adam_step(w[i], g[i], first[i], second[i], rate, root_bias, real(epsilon), numbers)

    @njit(nogil=True, error_model="numpy")
    def take_steps(w, r, moments, Z, transposed, y, integers, values, adams, begin, end):
        numbers = numbers_from(values)
        depth, seed, batch_size, exponential, mean = integers
        k, n = Z.shape
        rows = batch_size if batch_size > 0 else k
        weight = real(1 / rows) if mean else one
        x, others, g, of_first, of_rest = np.empty((5, n), real)
        predictions, targets, slopes = np.empty((3, rows), real)
        drawn = np.empty(rows, np.int64)
        for step in range(begin, end):
            fill_power(others, r, max(depth - 2, 0), n)
            for l in range(n):  # noqa: E741
                x[l] = w[l] * (others[l] * r[l]) if depth > 1 else w[l]
                g[l] = zero
            if batch_size > 0:
                for j in range(rows):
                    drawn[j] = np.int64(philox_word(seed, step, j) * np.uint64(k) >> np.uint64(32))
                    targets[j], total = y[drawn[j]], zero
                    for l in range(n):  # noqa: E741
                        total += Z[drawn[j], l] * x[l]
                    predictions[j] = total
                fill_slopes(slopes, predictions, targets, rows, weight, exponential)
                for j in range(rows):
                    for l in range(n):  # noqa: E741
                        g[l] += slopes[j] * Z[drawn[j], l]
            else:
                for i in range(k):
                    predictions[i] = zero
                for l in range(n):  # noqa: E741
                    for i in range(k):
                        predictions[i] += transposed[l, i] * x[l]
                fill_slopes(slopes, predictions, y, rows, weight, exponential)
                for i in range(k):
                    for l in range(n):  # noqa: E741
                        g[l] += slopes[i] * Z[i, l]
            for l in range(n):  # noqa: E741
                of_first[l] = g[l] * (others[l] * r[l]) if depth > 1 else g[l]
                of_rest[l] = g[l] * (w[l] * others[l])
            if adam:
                adaptive(w, of_first, moments[0], moments[1], n, step, numbers, adams)
                if depth > 1:
                    adaptive(r, of_rest, moments[2], moments[3], n, step, numbers, adams)
            else:
                steepest(w, of_first, n, numbers)
                if depth > 1:
                    steepest(r, of_rest, n, numbers)

    return take_steps


def diagonal_flow(
    first: Tensor,
    rest: Tensor,
    moments: Tensor | None,
    Z: Tensor,
    y: Tensor,
    *,
    problem: Tensor,
    depth: Tensor,
    seed: Tensor,
    q: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    coupled_weight_decay: Tensor,
    batch_size: int,
    loss: str,
    reduction: str,
    betas: tuple[float, float],
    epsilon: float,
    begin: int,
    end: int,
) -> None:
    """As reference/diagonal_flow.py."""
    real = compute_type(first.dtype)
    data, targets = Z.numpy(), y.numpy()
    transposed = np.ascontiguousarray(data.transpose(0, 2, 1))
    none: Any = np.empty((4, 0), real)

    def take(run: int) -> None:
        power, rate, of_run = power_of(float(q[run])), float(lr[run]), int(problem[run])
        values = values_of(
            Kind(power, first.dtype, first.dtype, None, coupled=True),
            q=float(q[run]),
            betas=betas,
            coupled_weight_decay=float(coupled_weight_decay[run]),
            maximize=False,
            grad_scale=1.0,
            decay=1 - rate * float(weight_decay[run]),
            step=rate,
        )
        steps_kernel(power, real, moments is not None, first.dtype)(
            first[run].numpy(),
            rest[run].numpy(),
            none if moments is None else moments[:, run].numpy(),
            data[of_run],
            transposed[of_run],
            targets[of_run],
            (int(depth[run]), int(seed[run]), batch_size, loss == "exponential", reduction == "mean"),
            values,
            (rate, *betas, epsilon),
            begin,
            end,
        )

    runs = deque(range(len(first)))

    def work() -> None:
        while runs:
            try:
                run = runs.popleft()
            except IndexError:  # another thread took the last one
                return
            take(run)

    threads = min(torch.get_num_threads(), len(first))
    others = submit_others(threads, threads - 1, work)
    work()
    for other in others:
        other.result()
