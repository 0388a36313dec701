"""What the tests of steepest_step share: operands of many sizes, and what one step may make of them."""

from __future__ import annotations

import torch

from tests.support.cases import float64_bounds, random_values

SIZES = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 127, 511, 512, 513, 1025, 4096, 4097, 16385, 40001)
BETAS = ((0.0, 0.0), (0.9, 0.99))


def operands(sizes=SIZES, dtype=torch.float32, *, betas=(0.0, 0.0), wide=True, special=False):
    """Weights, gradients and, if `betas` ask for them, momenta."""
    roles = [[random_values((n,), dtype, wide=wide, special=special) for n in sizes] for _ in range(3)]
    return roles if tuple(betas) != (0.0, 0.0) else [*roles[:2], None]


def cloned(*roles):
    return [None if role is None else [tensor.clone() for tensor in role] for role in roles]


def check_bounds(weights, gradients, momenta, updated, updated_momenta, step):
    """What one step made of `weights` and `momenta` lies where the definition in float64 and the roundings allow."""
    for i, w in enumerate(updated):
        bounds = float64_bounds(weights[i], gradients[i], None if momenta is None else momenta[i], step)
        assert bool((bounds.low <= w.double()).all())
        assert bool((w.double() <= bounds.high).all())
        if momenta is not None:
            assert bool(((updated_momenta[i].double() - bounds.momentum).abs() <= bounds.momentum_error).all())
