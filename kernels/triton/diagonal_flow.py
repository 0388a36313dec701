"""Whole training runs of diagonal networks: x = w_1 * ... * w_L fitted to y by Z x [Sec. 5, App. F, App. I].

The definition is reference/diagonal_flow.py. A program keeps the factors of one run in registers for all its steps, and goes
over the rows of Z once a step: predictions of some rows, their slopes, and what they add to the gradient. One launch for the
runs of each power.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dtype import STORAGES, number
from .signed_power import power_of, square_root
from .steepest_step import moved, numbers_of

WARPS = 4
TILE = 16384  # bytes of Z at a time
MOST_DEPTH_BITS = tl.constexpr(6)


@triton.jit
def runtime_power(x, n):
    """x^n for 0 <= n < 64, the bits of n from the highest down."""
    result = tl.full(x.shape, 1.0, x.dtype)
    for i in tl.static_range(MOST_DEPTH_BITS):
        result = result * result
        result = tl.where(((n >> (MOST_DEPTH_BITS - 1 - i)) & 1) != 0, result * x, result)
    return result


@triton.jit
def slope(prediction, y, weight, EXPONENTIAL: tl.constexpr):
    """df/dp of some rows."""
    if EXPONENTIAL:
        most = 88.0 if y.dtype == tl.float32 else 709.0  # exp of more overflows
        exponent = -y * prediction
        return -y * weight * tl.exp(tl.where(exponent < most, exponent, most))
    else:
        return 2.0 * (prediction - y) * weight


@triton.jit
def drawn_rows(seed, step, j, rows):
    """Row floor(rows u / 2^32) for the j-th word u of the step."""
    word0, word1, word2, word3 = tl.philox(seed, step.to(tl.uint32), (step >> 32).to(tl.uint32), (j >> 2).to(tl.uint32), 0)
    low = tl.where((j & 1) != 0, word1, word0)
    word = tl.where((j & 2) != 0, tl.where((j & 1) != 0, word3, word2), low)
    return ((word.to(tl.uint32, bitcast=True).to(tl.uint64) * rows.to(tl.uint64)) >> 32).to(tl.int64)


@triton.jit
def stepped(w, g, first, second, numbers, rate, inverse_root_bias, epsilon, POWER: tl.constexpr, ADAM: tl.constexpr):
    """The factor after its step, and its moments."""
    if ADAM:
        g = g + numbers.coupled * w
        first = numbers.beta1 * first + numbers.one_minus_beta1 * g
        second = numbers.beta2 * second + numbers.one_minus_beta2 * g * g
        root = square_root(second) * inverse_root_bias
        w = w * numbers.decay - rate * (first / (root + epsilon))
    else:
        w, _ = moved(w, g, g, numbers, None, POWER, True)
    return w, first, second


@triton.jit(do_not_specialize=["runs", "k", "n", "begin", "end"])
def flow_kernel(
    selected,
    first_at,
    rest_at,
    moments_at,
    Z_at,
    y_at,
    problem_at,
    depth_at,
    seed_at,
    q_at,
    lr_at,
    decay_at,
    coupled_at,
    runs,
    k,
    n,
    begin,
    end,
    batch_size,
    beta1: tl.float64,
    beta2: tl.float64,
    epsilon: tl.float64,
    weight: tl.float64,
    POWER: tl.constexpr,
    REAL: tl.constexpr,
    ADAM: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    run = tl.load(selected + tl.program_id(0))
    problem, depth, seed = tl.load(problem_at + run), tl.load(depth_at + run), tl.load(seed_at + run)
    lr, q = tl.load(lr_at + run), tl.load(q_at + run)
    one, decay, coupled = number(1.0), tl.load(decay_at + run), tl.load(coupled_at + run)
    numbers = numbers_of(lr, one, one, decay, coupled, number(beta1), number(beta2), q - 1.0, False, REAL)
    column = tl.arange(0, COLUMNS)
    inside = column < n
    at = run * n + column
    w, r = tl.load(first_at + at, inside, 0.0), tl.load(rest_at + at, inside, 0.0)
    m1, v1, m2, v2 = w, w, w, w
    if ADAM:
        size = runs * n
        m1, v1 = tl.load(moments_at + at, inside, 0.0), tl.load(moments_at + size + at, inside, 0.0)
        m2, v2 = tl.load(moments_at + 2 * size + at, inside, 0.0), tl.load(moments_at + 3 * size + at, inside, 0.0)
    count = k if batch_size == 0 else batch_size
    of_row, least = number(weight).to(REAL), number(epsilon).to(REAL)
    for step in range(begin, end):
        others = runtime_power(r, tl.maximum(depth - 2, 0))
        x = tl.where(depth > 1, w * (others * r), w)
        g = tl.zeros((COLUMNS,), REAL)
        for start in range(0, count, ROWS):
            j = start + tl.arange(0, ROWS)
            row = j.to(tl.int64)
            if batch_size != 0:
                row = drawn_rows(seed, step + tl.zeros((ROWS,), tl.int64), j, k)
            used = j < count
            block = tl.load(Z_at + (problem * k + row)[:, None] * n + column[None, :], used[:, None] & inside[None, :], 0.0)
            y = tl.load(y_at + problem * k + row, used, 0.0)
            slopes = slope(tl.sum(block * x[None, :], 1), y, of_row, EXPONENTIAL)
            g += tl.sum(block * tl.where(used, slopes, 0.0)[:, None], 0)
        rate, inverse_root_bias = lr, lr
        if ADAM:
            power = number(step + 1)
            rate = lr / (1.0 - tl.exp(power * tl.log(number(beta1))))
            inverse_root_bias = 1.0 / tl.sqrt(1.0 - tl.exp(power * tl.log(number(beta2))))
        rate, inverse_root_bias = rate.to(REAL), inverse_root_bias.to(REAL)
        of_first, of_rest = tl.where(depth > 1, g * (others * r), g), g * (w * others)
        w, m1, v1 = stepped(w, of_first, m1, v1, numbers, rate, inverse_root_bias, least, POWER, ADAM)
        after, m2, v2 = stepped(r, of_rest, m2, v2, numbers, rate, inverse_root_bias, least, POWER, ADAM)
        r = tl.where(depth > 1, after, r)
    tl.store(first_at + at, w, inside)
    tl.store(rest_at + at, r, inside)
    if ADAM:
        size = runs * n
        tl.store(moments_at + at, m1, inside)
        tl.store(moments_at + size + at, v1, inside)
        tl.store(moments_at + 2 * size + at, tl.where(depth > 1, m2, 0.0), inside)
        tl.store(moments_at + 3 * size + at, tl.where(depth > 1, v2, 0.0), inside)


def blocks(count: int, n: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows of a tile and columns, for `count` rows a step."""
    columns = triton.next_power_of_2(n)
    return {"ROWS": min(triton.next_power_of_2(count), max(1, TILE // (columns * dtype.itemsize))), "COLUMNS": columns}


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
    runs, k, n = len(first), Z.shape[1], Z.shape[2]
    powers = [power_of(value) for value in q.tolist()]
    with torch.accelerator.device_index(first.device.index):
        for power in sorted(set(powers)):
            selected = torch.tensor([i for i, own in enumerate(powers) if own == power], device=first.device)
            flow_kernel[(len(selected),)](
                selected,
                first,
                rest,
                first if moments is None else moments,
                Z,
                y,
                problem,
                depth,
                seed,
                q,
                lr,
                weight_decay,
                coupled_weight_decay,
                runs,
                k,
                n,
                begin,
                end,
                batch_size,
                *betas,
                epsilon,
                1 / (batch_size or k) if reduction == "mean" else 1.0,
                POWER=power,
                REAL=STORAGES[first.dtype],
                ADAM=moments is not None,
                EXPONENTIAL=loss == "exponential",
                **blocks(batch_size or k, n, first.dtype),
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
