"""What the tests of factor_product share: factors to multiply, and both derivatives."""

from __future__ import annotations

import torch

from pysteep.functional import factor_product
from tests.support.cases import random_values


def leaves(depth, shape, dtype=torch.float32, **kind):
    """Factors that ask for gradients, a gradient of the product and a tangent for each factor."""
    factors = [random_values(shape, dtype, **kind).requires_grad_() for _ in range(depth)]
    return factors, random_values(shape, dtype, **kind).requires_grad_(), [random_values(shape, dtype, **kind) for _ in factors]


def derivatives(factors, gradient, tangents, backend):
    """x, dw_1 ... dw_L, ddx, ddw_1 ... ddw_L."""
    x = factor_product(factors, backend=backend)
    first = torch.autograd.grad(x, factors, gradient, create_graph=True)
    second = torch.autograd.grad(first, [gradient, *factors], tangents, allow_unused=True)
    return [x, *first, *(torch.zeros_like(x) if t is None else t for t in second)]
