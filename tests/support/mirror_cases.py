"""What the tests of mirror_step share: balances, and a step in float64 that says how well it is known."""

from __future__ import annotations

import torch

from pysteep.kernels.reference import mirror_step as reference
from pysteep.kernels.reference.signed_power import signed_power
from tests.support.tolerances import EPS

BALANCES = (0.0, 1e-3, 0.1, 1.0, 5.0)


def balance(value):
    return torch.tensor(value, dtype=torch.float64)


def exact_step(x, g, lam, *, depth, lr, q, weight_decay):
    """The new x in float64; the size of the terms that its change is a sum of; and how wrong this may be itself.

    The definition subtracts two products of x's size.
    """
    x, g = x.double(), g.double()
    first, rest = reference.balanced_factors(x, q, depth, lam)
    moves = [lr * (signed_power(g * rest ** (depth - 1), q).abs() + weight_decay * first.abs())]
    moves.append(lr * (signed_power(g * first * rest ** (depth - 2), q).abs() + weight_decay * rest))
    size = moves[0] * (rest + moves[1]) ** (depth - 1) + (depth - 1) * moves[1] * first.abs() * (rest + moves[1]) ** (depth - 2)
    new = x.clone()
    reference.mirror_step(
        [new],
        [g],
        [balance(lam)],
        depth=depth,
        lr=lr,
        q=q,
        weight_decay=weight_decay,
        maximize=False,
        grad_scale=1.0,
        found_inf=0.0,
    )
    return new, size, 4 * depth * EPS[torch.float64] * x.abs()
