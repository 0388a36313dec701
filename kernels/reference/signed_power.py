"""The direction of steepest descent: the definition."""

import numpy as np
import torch
from torch import Tensor


def square_root(x: Tensor) -> Tensor:
    """Rounded to nearest. torch.sqrt on a CPU is not: the vector library behind it errs by an ulp in a fifth of all cases."""
    return torch.from_numpy(np.asarray(np.sqrt(x.numpy()))) if x.device.type == "cpu" else x.sqrt()


def signed_power(c: Tensor, q: float) -> Tensor:
    """u(c) = sign(c) |c|^(q-1), elementwise [Eq. 3].

    u(+-0) = +-0 for every q, NaN stays NaN, and at q = 1 u(+-inf) = +-1. For a q other than 1, 1.5 and 2 the power is taken
    in float64 and rounded once.
    """
    if q == 1:
        power = torch.ones_like(c)
    elif q == 1.5:
        power = square_root(c.abs())
    elif q == 2:
        power = c.abs()
    else:
        power = c.abs().double().pow(q - 1).to(c.dtype)
    return torch.where((c == 0) | c.isnan(), c, power.copysign(c))
