"""The theory as functions: metric, mirror map, potential, balance, bounds and margin of x = w_1 * ... * w_L.

Source: "Never Saddle for Reparameterized Steepest Descent as Mirror Flow" (ICLR 2026), whose labels stand in brackets. Where
the formula differs from the paper's print, the docstring says how.

With u(g) = sign(g) |g|^(q-1), factors whose balance |w_j|^q - |w_1|^q is the same number lam for all j >= 2 follow the flow

    dx = -M(x) u(df/dx) dt,    that is    d mirror_map(x) = -u(df/dx) dt    with    d mirror_map / dx = R''(x) = 1 / M(x)

and M(x) = (z + lam)^(L-1) + (L-1) z (z + lam)^(L-2), where z (z + lam)^(L-1) = |x|^q defines z = |w_1|^q >= 0.

Arguments are numbers, NumPy arrays or torch tensors that broadcast against each other; everything is computed in float64. A
tensor among them makes the result a float64 tensor on its device; else it is an array, or a number (numpy.float64) where all
of them are. A TypeError names a tensor that is not dense or holds no numbers, a ValueError the argument that is out of its
range, its value and the range:

    x, y    finite numbers
    q       numbers in [1, 2]; 1/p + 1/q = 1 for steepest descent in L_p
    depth   L, integers >= 1
    lam     the balance, finite numbers >= 0; the power q of a length in w, so (w_1, w_j) = (0, s) has lam = s^q

Where a tensor requires a gradient, the result has one with respect to x, y and x_0 of the metric, the mirror maps, the
potentials, the divergence, the escape time and the regularizers, and this gradient differentiates in turn, by torch.autograd,
not torch.func. Elsewhere a ValueError names the tensor: detach it.

Integrals of the metric have twelve digits for depths up to 1000, lam 0 or from 1e-15 to 1e6 and any x; a result that is no
float is inf or 0. `steepest_reparameterization` and `linf_margin` need scipy >= 1.15.

>>> from pysteep import theory
>>> theory.mirror_map([0.1, 0.2], q=2, depth=2, lam=0.1)
array([0.72181774, 1.04735627])
"""

from ._bounds import (
    balance,
    coercivity,
    convergence_bound,
    convergence_rate,
    coupled_regularizer,
    manifold_regularizer,
    predicted_balance,
)
from ._geometry import (
    balanced_factors,
    bregman_divergence,
    escape_time,
    hyperbolic_entropy,
    inverse_metric,
    inverse_mirror_map,
    is_bregman,
    metric_exponent,
    mirror_map,
    potential,
)
from ._limits import LinfMargin, Reparameterization, linf_margin, steepest_reparameterization

__all__ = [
    "LinfMargin",
    "Reparameterization",
    "balance",
    "balanced_factors",
    "bregman_divergence",
    "coercivity",
    "convergence_bound",
    "convergence_rate",
    "coupled_regularizer",
    "escape_time",
    "hyperbolic_entropy",
    "inverse_metric",
    "inverse_mirror_map",
    "is_bregman",
    "linf_margin",
    "manifold_regularizer",
    "metric_exponent",
    "mirror_map",
    "potential",
    "predicted_balance",
    "steepest_reparameterization",
]
