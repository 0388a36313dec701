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
    samples, labels, deep = (checked(**{name: value})[0] for name, value in (("Z", Z), ("y", y), ("depth", depth)))
    if samples.ndim != 2 or 0 in samples.shape:
        raise ValueError(f"Z must be of shape (k, n) with k, n >= 1; got {samples.shape}")
    if labels.shape != samples.shape[:1]:
        raise ValueError(f"y must be of shape {samples.shape[:1]}, one label for each row of Z; got {labels.shape}")
    if not np.all(np.abs(labels) == 1):
        raise ValueError(f"y must be of -1 and 1; got {labels[np.abs(labels) != 1][0]}")
    if deep.ndim:
        raise ValueError(f"depth must be one integer; got shape {deep.shape}")
    signed = labels[:, None] * samples
    x, margin = _margin(signed)
    with np.errstate(over="ignore"):
        return LinfMargin(like(x, Z, y), margin, float(np.float64(margin) ** (-2 / float(deep))))


def _margin(signed: Floats) -> tuple[Floats, float]:
    """The x with max |x_l| = 1 of which the least of signed x is the largest, and that; ValueError if none is above 0.

    A linear program: the largest t with signed x >= t, |x_l| <= 1. A solver wants numbers near 1 and holds rows to some 1e-9
    only. So columns, rows, t and x are scaled by powers of two. And a row of far larger numbers than another's asks for so
    little that it may come out at 0 or below: a second program asks for more there, and a little of its x is mixed in.
    """
    _, columns = np.frexp(np.abs(signed).max(axis=0))
    scaled = np.ldexp(signed, -columns)
    _, rows = np.frexp(np.abs(scaled).max(axis=1))
    scaled = np.ldexp(scaled, -rows[:, None])
    if not scaled.any(axis=1).all():
        raise ValueError(_NOT_SEPARATED)
    # In units: x_l = 2^(unit - columns_l) u_l, t = 2^most s, and no t is more than 2n 2^most.
    with np.errstate(divide="ignore"):
        reach = (np.log2(np.abs(scaled)) + columns).max(axis=1)
    most = int((np.floor(reach) + rows).min())
    unit = int((most - rows).max())
    asked = np.ldexp(1.0, most - rows - unit)
    bounds = np.minimum(np.ldexp(1.0, np.minimum(columns - unit, 1000)), LARGEST_BOUND)
    exact, safe = (_most_slack(scaled, np.maximum(asked, least), bounds) for least in (0.0, 1e-6))
    _, sizes = np.frexp(np.abs(signed).max(axis=1))
    own = np.ldexp(signed, -sizes[:, None])
    best, best_margin = np.zeros(signed.shape[1]), 0.0
    for share in (0.0, *10.0 ** np.arange(-15, 1)):
        u = (1 - share) * exact + share * safe
        x = np.clip(np.ldexp(u, unit - columns), -1, 1)
        x = x / max(np.abs(x).max(), np.finfo(np.float64).tiny)
        products, rounding = own @ x, x.size * np.finfo(np.float64).eps * (np.abs(own) @ np.abs(x))
        with np.errstate(over="ignore", under="ignore"):
            margin = float(np.ldexp(products, sizes).min())
        if (products > rounding).all() and margin > best_margin:
            best, best_margin = x, margin
    if best_margin == 0:
        raise ValueError(_NOT_SEPARATED)
    return best, best_margin


LARGEST_BOUND = 1e15  # above it a solver takes a bound for none
_NOT_SEPARATED = "Z must be separated by y: no x has y_i <x, z_i> > 0 for all i"


def _most_slack(A: Floats, asked: Floats, bounds: Floats) -> Floats:
    """u of the largest s with A u >= s asked, |u_l| <= bounds_l."""
    from scipy.optimize import linprog

    k, n = A.shape
    solution = linprog(
        np.append(np.zeros(n), -1.0),
        A_ub=np.column_stack([-A, asked]),
        b_ub=np.zeros(k),
        bounds=[*((-bound, bound) for bound in bounds), (0, None)],
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if solution.x is None:
        raise ValueError(f"Z must be numbers of sizes that scipy.optimize.linprog can take; it says: {solution.message}")
    return np.asarray(solution.x[:n])
