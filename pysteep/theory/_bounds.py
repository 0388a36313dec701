"""Balance, what decay regularises, and how fast a flow converges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ._arguments import Numbers, checked, exponent_of, like, sum_last


def balance(factors: Sequence[Numbers] | NDArray[Any] | Tensor, q: Numbers) -> Any:
    """(L-1, ...): |w_j|^q - |w_1|^q for j >= 2, of L factors of one shape or an array (L, ...) [Lemma 4.5]."""
    parts = [factors] if isinstance(factors, Tensor | np.ndarray) else list(factors)
    arrays = [checked(factors=part)[0] for part in parts]
    if len({array.shape for array in arrays}) != 1:
        raise ValueError(f"factors must be one or more of one shape; got shapes {[array.shape for array in arrays]}")
    w = arrays[0] if isinstance(factors, Tensor | np.ndarray) else np.stack(arrays)
    if w.ndim == 0 or len(w) == 0:
        raise ValueError(f"factors must be an array (L, ...) with L >= 1; got shape {w.shape}")
    power = checked(factors=w[0], q=q)[1]
    powers = np.abs(w) ** power
    return like(powers[1:] - powers[:1], *parts, q)


def predicted_balance(initial: Numbers, q: Numbers, lr: Numbers, weight_decay: Numbers, steps: int) -> Any:
    """Balance after `steps` steps: initial prod_t |1 - lr_t weight_decay_t|^q, up to O(lr) [Lemma 4.5].

    initial: of any shape, against which q broadcasts. lr, weight_decay: one number >= 0, or one for each step.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"steps must be an int >= 0; got {steps!r}")
    start, power = checked(initial=initial, q=q)
    rates, decays = checked(lr=lr)[0], checked(weight_decay=weight_decay)[0]
    for name, array in (("lr", rates), ("weight_decay", decays)):
        if array.shape not in ((), (steps,)):
            raise ValueError(f"{name} must be one number or one for each of {steps} steps; got shape {array.shape}")
    kept = np.broadcast_to(np.abs(1 - rates * decays), (steps,)).prod()
    return like(start * kept**power, initial, q, lr, weight_decay)


def manifold_regularizer(x: Numbers, q: Numbers, depth: Numbers) -> Any:
    """What decoupled decay adds to the objective's side of the mirror flow at lam = 0 [Thm 4.16], for a decay of 1.

    The sum over the last axis of |x|^(2-m) L / (L (2-q) + q), of log|x| where m = 2, which is q = 2 at depth inf. Its
    gradient is L x / M(x). depth: inf is allowed.
    """
    a, *geometry = checked(x=x, q=q, depth_or_inf=depth)
    power = 2 - exponent_of(*geometry)
    with np.errstate(divide="ignore"):
        terms = np.where(power == 0, np.log(np.abs(a)), np.abs(a) ** power / np.where(power == 0, 1.0, power))
    return like(sum_last(terms), x, q, depth)


def coupled_regularizer(x: Numbers, depth: Numbers) -> Any:
    """Sum over the last axis of L |x|^(2/L), the least |w_1|^2 + ... + |w_L|^2; coupled decay c adds c/2 of it to the loss.

    At lam = 0 it is what the factors have; less L, it goes to the sum of 2 log|x| as L grows [Table 1].
    """
    a, deep = checked(x=x, depth=depth)
    return like(sum_last(deep * np.abs(a) ** (2 / deep)), x, depth)


def coercivity(q: Numbers, depth: Numbers, *, lam: Numbers | None = None, scale: Numbers | None = None) -> Any:
    """mu = lam^(L-1), the least M(x) [Def. 4.1, Cor. 4.9]; with `scale` s > 0 in place of lam, s^(q(L-1)): w_j = s, w_1 = 0.

    The paper calls s lambda in [Cor. 4.10].
    """
    if (lam is None) == (scale is None):
        raise ValueError(f"lam or scale must be given, not both; got lam {lam!r}, scale {scale!r}")
    if lam is not None:
        power, deep, level = checked(q=q, depth=depth, lam=lam)
        return like(np.broadcast_arrays(level ** (deep - 1), power)[0], q, depth, lam)
    power, deep, level = checked(q=q, depth=depth, scale=scale)  # type: ignore[arg-type]
    return like(level ** (power * (deep - 1)), q, depth, scale)


def convergence_bound(q: Numbers, depth: Numbers, lam: Numbers, loss_gap: Numbers, gradient_bound: Numbers) -> Any:
    """What the integral of |grad f|_2^2 over all time cannot exceed: B^(2-q) (f(x_0) - f(x_inf)) / mu [Thm 4.2].

    loss_gap: f(x_0) - f(x_inf) >= 0 (the paper prints its negative). gradient_bound: B > 0, no |df/dx_i| of the flow is more.
    """
    power, deep, level, gap, bound = checked(q=q, depth=depth, lam=lam, loss_gap=loss_gap, gradient_bound=gradient_bound)
    with np.errstate(divide="ignore", invalid="ignore"):
        result = np.where(gap == 0, 0.0, bound ** (2 - power) * gap / level ** (deep - 1))
    return like(result, q, depth, lam, loss_gap, gradient_bound)


def convergence_rate(q: Numbers, depth: Numbers, lam: Numbers, pl_constant: Numbers, gradient_bound: Numbers) -> Any:
    """Rate r of f(x_t) - f* <= exp(-r t) (f(x_0) - f*): 2 mu B^(q-2) Lambda [Thm 4.2].

    pl_constant: Lambda > 0 with |grad f|_2^2 / 2 >= Lambda (f - f*) [Def. B.2], a strongly convex f's constant. The paper
    prints half this rate, as its proof leaves out the 2 of its definition. gradient_bound: B, as of `convergence_bound`.
    """
    power, deep, level, constant, bound = checked(
        q=q, depth=depth, lam=lam, pl_constant=pl_constant, gradient_bound=gradient_bound
    )
    result = 2 * level ** (deep - 1) * bound ** (power - 2) * constant
    return like(result, q, depth, lam, pl_constant, gradient_bound)
