"""Balance, what decay regularises, and how fast a flow converges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._numbers import as_integer
from ._arguments import Floats, Numbers, checked, like, sum_last
from ._gradients import elementwise

TINY = np.finfo(np.float64).tiny


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
    return like(_difference_of_powers(np.abs(w[1:]), np.abs(w[:1]), power), *parts, q)


def _difference_of_powers(a: Floats, b: Floats, power: Floats) -> Floats:
    """a^power - b^power of numbers >= 0, with all digits where they are close."""
    small, large = np.minimum(a, b), np.maximum(a, b)
    near = small > large / 2
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        relative = -np.expm1(power * np.log1p((small - large) / large))
        size = np.where(near, large**power * relative, large**power - small**power)
    return np.copysign(size, a - b)


def predicted_balance(initial: Numbers, q: Numbers, lr: Numbers, weight_decay: Numbers, steps: int) -> Any:
    """Balance after `steps` steps: initial prod_t |1 - lr_t weight_decay_t|^q, up to O(lr) [Lemma 4.5].

    initial: of any shape, against which q broadcasts. lr, weight_decay: one number >= 0, or one for each step.
    """
    count = as_integer(steps)
    if count is None or count < 0:
        raise ValueError(f"steps must be an int >= 0; got {steps!r}")
    start, power = checked(initial=initial, q=q)
    rates, decays = checked(lr=lr)[0], checked(weight_decay=weight_decay)[0]
    for name, array in (("lr", rates), ("weight_decay", decays)):
        if array.shape not in ((), (count,)):
            raise ValueError(f"{name} must be one number or one for each of {count} steps; got shape {array.shape}")
    with np.errstate(divide="ignore", over="ignore", under="ignore"):
        decay = rates * decays
        log_kept = np.where(decay < 1, np.log1p(-np.minimum(decay, 1.0)), np.log(np.maximum(decay, 1.0) - 1))
        log_kept = log_kept.sum() if log_kept.ndim else log_kept * count if count else log_kept * 0.0
        result = np.where(start == 0, start, start * np.exp(power * log_kept))
    return like(result, initial, q, lr, weight_decay)


def manifold_regularizer(x: Numbers, q: Numbers, depth: Numbers) -> Any:
    """What decoupled decay adds to the objective's side of the mirror flow at lam = 0 [Thm 4.16], for a decay of 1.

    The sum over the last axis of |x|^(2-m) L / (L (2-q) + q), of log|x| where m = 2, which is q = 2 at depth inf. Its
    gradient is L x / M(x), and 0 is taken for it at x = 0. depth: inf is allowed.
    """

    def value(a: Floats, q: Floats, depth: Floats) -> Floats:
        power = (2 - q) + q / depth
        with np.errstate(divide="ignore"):
            return np.where(power == 0, np.log(np.abs(a)), np.abs(a) ** power / np.where(power == 0, 1.0, power))

    def slope(x: Tensor, q: Tensor, depth: Tensor) -> Tensor:
        return _power_slope(x, (1 - q) + q / depth)

    return sum_last(elementwise(value, {"x": slope}, {"x": x, "q": q, "depth_or_inf": depth}))


def _power_slope(x: Tensor, power: Tensor) -> Tensor:
    """sign(x) |x|^power, 0 at 0; x itself at power 1, which has a derivative there."""
    of_others = torch.where(x == 0, 0.0, x.sign() * torch.where(x == 0, 1.0, x.abs()) ** power)
    return torch.where(power == 1, x, of_others)


def coupled_regularizer(x: Numbers, depth: Numbers) -> Any:
    """Sum over the last axis of L |x|^(2/L), the least |w_1|^2 + ... + |w_L|^2; coupled decay c adds c/2 of it to the loss.

    At lam = 0 it is what the factors have; less L, it goes to the sum of 2 log|x| as L grows [Table 1]. At x = 0, 0 is taken
    for its gradient.
    """
    slopes = {"x": lambda x, depth: 2 * _power_slope(x, 2 / depth - 1)}
    return sum_last(elementwise(lambda a, depth: depth * np.abs(a) ** (2 / depth), slopes, {"x": x, "depth": depth}))


def _product(*powers: tuple[Any, Any]) -> Floats:
    """Product of base^exponent, of bases >= 0: in logarithms where one of the powers is no normal float."""
    with np.errstate(all="ignore"):
        values = [np.asarray(base**exponent) for base, exponent in powers]
        plain = np.logical_and.reduce(np.broadcast_arrays(*((v >= TINY) & (v < np.inf) for v in values)))
        logs = sum(np.where(np.equal(exponent, 0), 0.0, exponent * np.log(base)) for base, exponent in powers)
        product = np.ones(())
        for value in values:
            product = product * value
        return np.where(plain & (product >= TINY) & (product < np.inf), product, np.exp(logs))


def coercivity(q: Numbers, depth: Numbers, *, lam: Numbers | None = None, scale: Numbers | None = None) -> Any:
    """mu = lam^(L-1), the least M(x) [Def. 4.1, Cor. 4.9]; with `scale` s > 0 in place of lam, s^(q(L-1)): w_j = s, w_1 = 0.

    The paper calls s lambda in [Cor. 4.10].
    """
    if (lam is None) == (scale is None):
        raise ValueError(f"lam or scale must be given, not both; got lam {lam!r}, scale {scale!r}")
    if lam is not None:
        power, deep, level = checked(q=q, depth=depth, lam=lam)
        with np.errstate(over="ignore"):
            return like(np.broadcast_arrays(level ** (deep - 1), power)[0], q, depth, lam)
    power, deep, level = checked(q=q, depth=depth, scale=scale)  # type: ignore[arg-type]
    with np.errstate(over="ignore"):
        return like(level ** (power * (deep - 1)), q, depth, scale)


def convergence_bound(q: Numbers, depth: Numbers, lam: Numbers, loss_gap: Numbers, gradient_bound: Numbers) -> Any:
    """What the integral of |grad f|_2^2 over all time cannot exceed: B^(2-q) (f(x_0) - f(x_inf)) / mu [Thm 4.2].

    loss_gap: f(x_0) - f(x_inf) >= 0 (the paper prints its negative). gradient_bound: B > 0, no |df/dx_i| of the flow is more.
    """
    power, deep, level, gap, bound = checked(q=q, depth=depth, lam=lam, loss_gap=loss_gap, gradient_bound=gradient_bound)
    result = np.where(gap == 0, 0.0, _product((bound, 2 - power), (gap, 1), (level, 1 - deep)))
    return like(result, q, depth, lam, loss_gap, gradient_bound)


def convergence_rate(q: Numbers, depth: Numbers, lam: Numbers, pl_constant: Numbers, gradient_bound: Numbers) -> Any:
    """Rate r of f(x_t) - f* <= exp(-r t) (f(x_0) - f*): 2 mu B^(q-2) Lambda [Thm 4.2].

    pl_constant: Lambda > 0 with |grad f|_2^2 / 2 >= Lambda (f - f*) [Def. B.2], a strongly convex f's constant. The paper
    prints half this rate, as its proof leaves out the 2 of its definition. gradient_bound: B, as of `convergence_bound`.
    """
    power, deep, level, constant, bound = checked(
        q=q, depth=depth, lam=lam, pl_constant=pl_constant, gradient_bound=gradient_bound
    )
    result = 2 * _product((level, deep - 1), (bound, power - 2), (constant, 1))
    return like(result, q, depth, lam, pl_constant, gradient_bound)
