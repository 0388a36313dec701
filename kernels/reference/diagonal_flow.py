"""Whole training runs of diagonal networks, x = w_1 * ... * w_L fitted to y by Z x: the definition [Sec. 5, App. F, App. I].

Of a run, whose factors w_2 = ... = w_L = r start equal and so stay:

    rows <- all k of Z, or batch_size draws with replacement: row floor(k u / 2^32) for the j-th 32-bit word u of Philox4x32-10
            with the run's seed as its key and (step, j // 4) as its counter
    p <- Z x                                         of these rows; x = w_1 r^(L-1), at L = 1 x = w_1
    loss "mse": mean (p - y)^2                       df/dp <- 2 (p - y) / number of rows
    loss "exponential": mean exp(-y p)               df/dp <- -y exp(-y p) / number of rows; -y p is cut off where exp overflows
    reduction "sum": neither is divided
    g <- Z^T df/dp;  g_1 <- g r^(L-1);  g_r <- g (w_1 r^(L-2))
    w_1, r <- steepest_step, or Adam's step with decoupled and coupled decay, at the factors' old values
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .factor_step import gradients_of, product_of
from .rounding import MASK, philox
from .steepest_step import steepest_step

MOST = {torch.float32: 88.0, torch.float64: 709.0}  # exp of more overflows


def words(seed: int, step: int, count: int) -> np.ndarray:
    """`count` 32-bit words of Philox4x32-10 as int64, from the counters (step, 0), (step, 1), ..."""
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    of_step = [np.full_like(blocks, word) for word in (step & 0xFFFFFFFF, step >> 32)]
    return (
        np.stack(philox([*of_step, blocks & MASK, blocks >> np.uint64(32)], seed, rounds=10), -1)
        .reshape(-1)[:count]
        .astype(np.int64)
    )


def drawn_rows(seed: int, step: int, batch_size: int, rows: int) -> Tensor:
    """The rows of a step's batch: int64 [batch_size]."""
    return torch.from_numpy(words(seed, step, batch_size) * rows >> 32)


def slope(predictions: Tensor, y: Tensor, loss: str, reduction: str) -> Tensor:
    """df/dp."""
    weight = 1 / len(y) if reduction == "mean" else 1.0
    if loss == "mse":
        return 2 * (predictions - y) * weight
    return -y * weight * (-y * predictions).clamp(max=MOST[y.dtype]).exp()


def adam_step(
    w: Tensor,
    g: Tensor,
    moments: Sequence[Tensor],
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    coupled_weight_decay: float,
) -> None:
    """torch.optim.AdamW's step, counted from 0, and torch.optim.Adam's by `coupled_weight_decay`; writes w and its moments."""
    first, second = moments
    g = g + coupled_weight_decay * w
    first.copy_(betas[0] * first + (1 - betas[0]) * g)
    second.copy_(betas[1] * second + (1 - betas[1]) * g * g)
    root = second.sqrt() / math.sqrt(1 - betas[1] ** (step + 1))
    w.copy_(w * (1 - lr * weight_decay) - lr / (1 - betas[0] ** (step + 1)) * (first / (root + epsilon)))


@torch.no_grad()
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
    """The steps [begin, end) of every run, counted from 0. All tensors are contiguous, on the CPU.

    Args:
        first, rest: w_1 and r, [runs, n], float32 or float64; updated. At depth 1 r is not used.
        moments: [4, runs, n], Adam's first and second of w_1 and of r; updated. None: steepest_step.
        Z, y: [problems, k, n] and [problems, k], of the same dtype.
        problem, depth, seed: int64 [runs].
        q, lr, weight_decay, coupled_weight_decay: float64 [runs].
        batch_size: 0 for all rows.
        loss: "mse" or "exponential".
        reduction: "mean" or "sum".
        betas, epsilon: Adam's.
    """
    for i in range(len(first)):
        of_run: dict[str, Any] = {
            "lr": float(lr[i]),
            "weight_decay": float(weight_decay[i]),
            "coupled_weight_decay": float(coupled_weight_decay[i]),
        }
        factors = [first[i], rest[i]] if depth[i] > 1 else [first[i]]
        of_factors = [] if moments is None else [moments[2 * j : 2 * j + 2, i] for j in range(len(factors))]
        all_rows, all_y = Z[problem[i]], y[problem[i]]
        for step in range(begin, end):
            rows = drawn_rows(int(seed[i]), step, batch_size, len(all_rows)) if batch_size else slice(None)
            z, target = all_rows[rows], all_y[rows]
            x = product_of(factors, int(depth[i]))
            g = z.T @ slope(z @ x, target, loss, reduction)
            gradients = gradients_of(g, factors, int(depth[i]))
            if moments is None:
                steepest_step(
                    factors,
                    gradients,
                    None,
                    q=float(q[i]),
                    betas=(0.0, 0.0),
                    maximize=False,
                    step_scale=1.0,
                    grad_scale=1.0,
                    found_inf=0.0,
                    **of_run,
                )
            else:
                for w, of_w, own in zip(factors, gradients, of_factors, strict=True):
                    adam_step(w, of_w, list(own), step, betas=betas, epsilon=epsilon, **of_run)
