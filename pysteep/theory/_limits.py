"""Beyond products: any mirror flow as a reparameterised one, and the margin that sign descent goes to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ._arguments import Floats, Numbers, checked, integral, like


class Reparameterization(NamedTuple):
    """What `steepest_reparameterization` returns: two functions of numbers, arrays or tensors, inverse to each other."""

    x_of_w: Callable[[Numbers], Any]
    w_of_x: Callable[[Numbers], Any]


class LinfMargin(NamedTuple):
    """What `linf_margin` returns."""

    direction: Any
    """Array or tensor (n,) whose largest magnitude is 1."""
    margin: float
    """min_i y_i <direction, z_i>, the largest there is."""
    objective: float
    """max_l |x_l|^(2/L) of x = direction / margin, which satisfies y_i <x, z_i> >= 1: the only number that depends on L."""


def steepest_reparameterization(
    second_derivative: Callable[[Floats], Floats],
    q: float,
    *,
    x_0: float = 0.0,
    domain: tuple[float, float] = (-np.inf, np.inf),
) -> Reparameterization:
    """The x = g(w) whose steepest descent flow in w is the mirror flow of R in x, by quadrature [Thm G.1].

    w(x) is the integral of R''(s)^(1/q) from x_0 to x, and g its inverse. (The paper's proof starts with a minus that is none.)

    Args:
        second_derivative: R'' > 0 of arrays, elementwise, in `domain`; for depth, lambda s: 1 / inverse_metric(s, q, L, lam).
        q: one number in [1, 2].
        x_0: where w is 0, inside `domain`.
        domain: open interval of x.

    Returns:
        (x_of_w, w_of_x). Where w is out of w(x)'s range, x_of_w is that end of the domain.

    Raises:
        ValueError: q or x_0 are not as above; later, x is not in the domain.
        TypeError: second_derivative is not callable.
    """
    power, start = checked(q=q, x_0=x_0)
    if not callable(second_derivative):
        raise TypeError(f"second_derivative must be a function; got {second_derivative!r}")
    if power.ndim or start.ndim:
        raise ValueError(f"q and x_0 must be single numbers; got shapes {power.shape} and {start.shape}")
    low, high = domain
    if not low < x_0 < high:
        raise ValueError(f"x_0 must lie inside the domain {domain}; got {x_0}")

    def integrand(x: Floats) -> Floats:
        return np.asarray(second_derivative(x) ** (1 / power))

    def w_of_x(x: Numbers) -> Any:
        (a,) = checked(x=x)
        outside = ~((low < a) & (a < high))
        if outside.any():
            raise ValueError(f"x must lie inside the domain {domain}; got {a[outside].flat[0]}")
        with np.errstate(all="ignore"):
            return like(integral(integrand, x_0, a), x)

    def x_of_w(w: Numbers) -> Any:
        from scipy.optimize.elementwise import bracket_root, find_root

        def excess(x: Floats, w: Floats) -> Floats:
            return integral(integrand, x_0, x) - w

        (a,) = checked(w=w)
        below, above = (x_0 + side * min(1.0, abs(end - x_0) / 2) for side, end in ((-1, low), (1, high)))
        with np.errstate(all="ignore"):
            first = np.full(a.shape, below), np.full(a.shape, above)
            bracket = bracket_root(excess, *first, xmin=low, xmax=high, args=(a,), maxiter=60)
            root = find_root(excess, bracket.bracket, args=(a,))
        return like(np.where(bracket.success, root.x, np.where(a > 0, high, low)), w)

    return Reparameterization(x_of_w, w_of_x)


def linf_margin(Z: Numbers, y: Numbers, depth: int) -> LinfMargin:
    """The limit direction of sign descent on separable data: min max_l |x_l|^(2/L) so that y_i <x, z_i> >= 1 [Thm F.1].

    The root is monotone, so x is the L_inf maximum-margin direction whatever the depth: a linear program. Where it has many
    solutions, one of them.

    Args:
        Z: samples z_i, (k, n).
        y: labels -1 and 1, (k,).
        depth: L, one integer; only `objective` depends on it.

    Raises:
        ValueError: shapes or values are not as above, or no x has y_i <x, z_i> > 0 for all i.
    """
    from scipy.optimize import linprog

    samples, labels, deep = (checked(**{name: value})[0] for name, value in (("Z", Z), ("y", y), ("depth", depth)))
    if samples.ndim != 2 or 0 in samples.shape:
        raise ValueError(f"Z must be of shape (k, n) with k, n >= 1; got {samples.shape}")
    if labels.shape != samples.shape[:1]:
        raise ValueError(f"y must be of shape {samples.shape[:1]}, one label for each row of Z; got {labels.shape}")
    if not np.all(np.abs(labels) == 1):
        raise ValueError(f"y must be of -1 and 1; got {labels[np.abs(labels) != 1][0]}")
    if deep.ndim:
        raise ValueError(f"depth must be one integer; got shape {deep.shape}")
    k, n = samples.shape
    signed = labels[:, None] * samples
    # Largest t with y_i <x, z_i> >= t for all i, |x_l| <= 1.
    solution = linprog(
        np.append(np.zeros(n), -1.0),
        A_ub=np.column_stack([-signed, np.ones(k)]),
        b_ub=np.zeros(k),
        bounds=[(-1, 1)] * n + [(0, None)],
    )
    x = solution.x[:n]
    x = x / max(np.abs(x).max(), np.finfo(float).tiny)
    margin = float((signed @ x).min())
    if margin <= 1e-9 * np.abs(signed).max():
        raise ValueError("Z must be separated by y: no x has y_i <x, z_i> > 0 for all i")
    return LinfMargin(like(x, Z, y), margin, margin ** (-2 / float(deep)))
