"""Depth without factors: one step of the steepest mirror flow of x = w_1 * ... * w_L, from x and one number: the definition.

Factors whose balance |w_j|^q - |w_1|^q = balance >= 0 is the same for all j >= 2 and all coordinates [Def. 4.6] follow from x:

    z (z + balance)^(L-1) = |x|^q,  z >= 0;    w_2 = ... = w_L = (z + balance)^(1/q);    w_1 = x / w_2^(L-1), |w_1|^q = z

The step rebuilds them, moves each as factor_step.py does, and forms x again; the balance then follows Lemma 4.5:

    g <- g / grad_scale;  g <- -g if maximize
    w_1' <- w_1 (1 - lr weight_decay) - lr u(g w_2^(L-1))                u(c) = sign(c) |c|^(q-1)
    w_2' <- w_2 (1 - lr weight_decay) - lr u(g w_1 w_2^(L-2))
    x <- x + (w_1' w_2'^(L-1) - w_1 w_2^(L-1))
    balance <- balance (1 - lr weight_decay)^q                           by the caller, once all weights are written

First order in lr: the flow of the factors, not the bits of their descent. Everything in float64, x rounded once to the compute
dtype and stored as rounding.py says; the other homes compute in float32 for 16- and 32-bit tensors. Their change of w_1
is a product with (z + balance)^(L-1), whose digits are lost where it is below 2^-126: at balance 0 for tiny x, if |g| > 1e10.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..number import Number
from ..rounding import NEAREST, Rounding
from .rounding import load, store
from .signed_power import signed_power
from .steepest_step import double

ITERATIONS = 200  # of Newton's method, which ends far sooner


def balanced_factors(x: Tensor, q: float, depth: int, balance: Number) -> tuple[Tensor, Tensor]:
    """w_1 and w_2 = ... = w_L in float64, for a balance >= 0."""
    x = x.double()
    balance = torch.as_tensor(balance, dtype=torch.float64, device=x.device)
    n, root = depth - 1, x.abs() ** (q / depth)
    # In units of the larger of the two the solution y = z + balance lies between 1 and 2. Newton's method comes down to it from
    # above, where (y - balance) y^n is convex.
    unit = torch.maximum(root, balance)
    unit = torch.where(unit == 0, 1.0, unit)
    low, size = balance / unit, root / unit
    y = low + size
    for _ in range(ITERATIONS):
        step = ((y - low) * y**n - size**depth) / (y ** (n - 1) * (depth * y - n * low))
        lower = torch.maximum(y - step.nan_to_num(0.0), torch.maximum(low, size))
        if not bool((lower < y).any()):
            break
        y = torch.minimum(y, lower)
    rest = (unit * y) ** (1 / q)
    others = rest**n
    first = torch.where(others > 0, x / others, torch.zeros_like(x).copysign(x))  # where |w_1| = z^(1/q) would lose digits
    return torch.where(x.isnan(), x, first), torch.where(x.isnan(), x, rest)


@torch.no_grad()
def mirror_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    balances: Sequence[Tensor],
    *,
    depth: int,
    lr: Number,
    q: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Number,
    found_inf: Number,
    rounding: Rounding = NEAREST,
) -> None:
    """Update `weights` in place; where `found_inf` is not 0 they keep their values.

    `balances` holds a float64 tensor of one element for each weight, on its device; it is not written.
    """
    for i, (weight, gradient, balance) in enumerate(zip(weights, gradients, balances, strict=True)):
        x, rate = load(weight, rounding, i).double(), double(lr)
        g = gradient.double() / double(grad_scale)
        g = -g if maximize else g
        first, rest = balanced_factors(x, q, depth, balance)
        kept = 1.0 - rate * weight_decay
        new_first = first * kept - rate * signed_power(g * rest ** (depth - 1), q)
        new_rest = rest * kept - rate * signed_power(g * first * rest ** (depth - 2), q)
        change = new_first * new_rest ** (depth - 1) - first * rest ** (depth - 1)
        skip = torch.as_tensor(found_inf, device=x.device) != 0
        store(weight, x + change, skip, rounding, i)
