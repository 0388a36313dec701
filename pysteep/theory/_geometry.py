"""Metric, mirror map and potential of a product of balanced factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..kernels.reference.mirror_step import balanced_factors as _reference_factors
from ._arguments import Floats, Numbers, by_geometry, checked, exponent_of, integral, like, sum_last

LARGEST = 700.0  # whose exponential is finite


def metric_exponent(q: Numbers, depth: Numbers) -> Any:
    """m = q (L-1)/L, the power of |x| by which M grows; it is M = L |x|^m at lam = 0. depth: inf is allowed [Def. 4.12]."""
    return like(exponent_of(*checked(q=q, depth_or_inf=depth)), q, depth)


def is_bregman(q: Numbers, depth: Numbers) -> Any:
    """Whether the potential is a Bregman function, m <= 1: every L at q = 1, L <= 2 at q = 2 [Cor. 4.14].

    If not, a coordinate reaches infinity in finite time under a gradient bounded from 0. The paper's "no function for p < 2"
    is about q > 2, which is no geometry of this package.
    """
    return like(exponent_of(*checked(q=q, depth_or_inf=depth)) <= 1, q, depth)


def _factors(x: Floats, q: float, depth: int, lam: Floats) -> tuple[Floats, Floats]:
    """w_1, of x's sign, and w_2 = ... = w_L."""
    first, rest = _reference_factors(torch.from_numpy(x), q, depth, torch.from_numpy(np.array(lam)))
    return first.numpy(), rest.numpy()


def balanced_factors(x: Numbers, q: Numbers, depth: int, lam: Numbers) -> Any:
    """(L, *shape): w_1, ..., w_L with product x and |w_j|^q - |w_1|^q = lam for j >= 2; x's sign is w_1's [Def. 4.6].

    depth: one integer. shape: that of x, q and lam together.
    """
    arrays = checked(x=x, q=q, depth=depth, lam=lam)
    if arrays[2].ndim:
        raise ValueError(f"depth must be one integer; got shape {arrays[2].shape}")
    first, rest = (by_geometry(lambda *a, i=i: _factors(*a)[i], *arrays) for i in (0, 1))
    return like(np.stack([first] + [rest] * (int(arrays[2]) - 1)), x, q, lam)


def _inverse_metric(x: Floats, q: float, depth: int, lam: Floats) -> Floats:
    if depth == 1:
        return np.ones_like(x)
    first, rest = (np.abs(w) ** q for w in _factors(x, q, depth, lam))
    return np.asarray(rest ** (depth - 2) * (depth * first + lam))


def inverse_metric(x: Numbers, q: Numbers, depth: Numbers, lam: Numbers) -> Any:
    """M(x) = 1 / R''(x), what depth multiplies a coordinate's speed by; 1 at depth 1 [Thm 4.8, Eq. 14].

    sqrt(4 |x|^q + lam^2) at L = 2 (the last line of the paper's proof drops the 4), L |x|^m at lam = 0.
    """
    return like(by_geometry(_inverse_metric, *checked(x=x, q=q, depth=depth, lam=lam)), x, q, depth, lam)


def _power_integral(end: Floats, power: int, exponent: float, q: float) -> Floats:
    """Integral of v^power (1 + v^q)^exponent from 0 to sinh(end): tiny and huge numbers alike, by v = sinh(t)."""

    def integrand(t: Floats) -> Floats:
        v = np.sinh(t)
        return np.asarray(v**power * np.cosh(t) * np.exp(exponent * np.logaddexp(0.0, q * np.log(v))))

    return integral(integrand, 0.0, end)


def _numeric_mirror(first: Floats, q: float, depth: int, lam: Floats) -> Floats:
    """Integral of dx / M. It is that of d|w_1| / |w_2|^((L-1)(q-1)), since w_1 moves with u(g w_2^(L-1)); lam > 0."""
    unit, exponent = lam ** (1 / q), (depth - 1) * (q - 1) / q
    return np.asarray(unit / lam**exponent * _power_integral(np.arcsinh(first / unit), 0, -exponent, q))


def _mirror(x: Floats, q: float, depth: int, lam: Floats) -> Floats:
    """An integral of 1 / M: from 0, and from +-1, of the sign that x or its zero has, where lam = 0 and m >= 1."""
    from scipy.special import boxcox

    size, m = np.abs(x), exponent_of(q, depth)
    if not lam.any():
        size = size ** (1 - m) / (1 - m) / depth if m < 1 else boxcox(size, 1 - m) / depth
    elif q == 2 and depth == 2:
        size = np.arcsinh(2 * size / lam) / 2
    else:
        first = np.abs(_factors(x, q, depth, lam)[0])
        size = first if q == 1 or depth == 1 else _numeric_mirror(first, q, depth, lam)
    return np.asarray(np.copysign(1.0, x) * size)


def _numeric_inverse(size: Floats, q: float, depth: int, lam: Floats) -> Floats:
    """|x| from the integral of dx / M, inf where that is beyond its end; lam > 0."""
    from scipy.optimize.elementwise import bracket_root, find_root

    unit, exponent = lam ** (1 / q), (depth - 1) * (q - 1) / q
    size = size * lam**exponent / unit

    def excess(t: Floats, size: Floats) -> Floats:
        return _power_integral(t, 0, -exponent, q) - size

    start = np.minimum(np.arcsinh(size) + 1, LARGEST / 2)  # the integral is less than sinh(t)
    bracket = bracket_root(excess, np.zeros_like(start), start, xmin=0.0, xmax=LARGEST, args=(size,), maxiter=60)
    root = find_root(excess, bracket.bracket, args=(size,))
    t = np.where(root.success, root.x, np.inf)
    first = unit * np.sinh(t)
    return np.asarray(first * (first**q + lam) ** ((depth - 1) / q))


def _inverse_mirror(y: Floats, q: float, depth: int, lam: Floats, sign: Floats) -> Floats:
    """Of `_mirror`; `sign` is that of x where lam = 0 and m >= 1."""
    from scipy.special import inv_boxcox

    size, m = np.abs(y), exponent_of(q, depth)
    if not lam.any() and m >= 1:
        largest = 1 / (m - 1) if m > 1 else np.inf
        y = depth * y * sign
        return np.asarray(sign * np.where(y < largest, inv_boxcox(y, 1 - m), np.inf))
    if not lam.any():
        size = (depth * (1 - m) * size) ** (1 / (1 - m))
    elif q == 2 and depth == 2:
        size = np.sinh(2 * size) * lam / 2
    elif q == 1 or depth == 1:
        size = size * (size + lam) ** (depth - 1)
    else:
        size = _numeric_inverse(size, q, depth, lam)
    return np.copysign(size, y)


def _check_base(names: tuple[str, str], x: Floats, x_0: Floats, q: Floats, depth: Floats, lam: Floats) -> None:
    """ValueError where x and x_0 do not lie on one side of 0 although lam = 0 and m >= 1, where M / |x| is 0 at 0."""
    singular = (lam == 0) & (exponent_of(q, depth) >= 1)
    where = "where lam = 0 and q (L-1)/L >= 1"
    if np.any(singular & (x_0 == 0)):
        raise ValueError(f"{names[1]} must be another number than 0 {where}; got 0.0")
    opposite = np.broadcast_arrays(x, singular & (x * x_0 < 0))
    if opposite[1].any():
        raise ValueError(f"{names[0]} must have the sign of {names[1]} {where}; got {opposite[0][opposite[1]].flat[0]}")


def mirror_map(x: Numbers, q: Numbers, depth: Numbers, lam: Numbers, *, x_0: Numbers = 0.0) -> Any:
    """R'(x), the integral of ds / M(s) from x_0 to x: the coordinate that moves with -u(df/dx) alone [Thm 4.8, Lemma 4.13].

    Closed at q = 2, L = 2: asinh(2x/lam)/2; at q = 1: the y with y (|y| + lam)^(L-1) = x, that is w_1; at lam = 0:
    sign(x) |x|^(1-m) / (L (1-m)), and at m = 1 sign(x_0) log(x/x_0) / L, where the paper prints only x_0 > 0. Else by
    quadrature, to about 13 digits. [Ex. 3.2] prints x/lam, which does not have its metric.

    x_0: where R' is 0. Where lam = 0 and m >= 1 it must not be 0, and x must be of its sign or 0, where R' is infinite.
    """
    a, *geometry, base = checked(x=x, q=q, depth=depth, lam=lam, x_0=x_0)
    _check_base(("x", "x_0"), a, base, *geometry)
    result = by_geometry(_mirror, np.where(a == 0, np.copysign(0.0, base), a), *geometry)
    return like(result - by_geometry(_mirror, base, *geometry) if base.any() else result, x, q, depth, lam, x_0)


def inverse_mirror_map(y: Numbers, q: Numbers, depth: Numbers, lam: Numbers, *, x_0: Numbers = 0.0) -> Any:
    """The x with mirror_map(x) = y, the derivative of the convex conjugate R*; closed where `mirror_map` is.

    Where m > 1 the mirror map has an end in finite y (that is why R is no Bregman function): from there on x is +-inf.
    """
    a, *geometry, base = checked(y=y, q=q, depth=depth, lam=lam, x_0=x_0)
    _check_base(("y", "x_0"), np.zeros(()), base, *geometry)
    if base.any():
        a = a + by_geometry(_mirror, base, *geometry)
    return like(by_geometry(_inverse_mirror, a, *geometry, np.where(base < 0, -1.0, 1.0)), y, q, depth, lam, x_0)


def _potential(x: Floats, q: float, depth: int, lam: Floats) -> Floats:
    """The integral of `_mirror` from 0."""
    from scipy.special import boxcox

    size, m = np.abs(x), exponent_of(q, depth)
    if not lam.any():
        if m < 1:
            return np.asarray(size ** (2 - m) / ((2 - m) * (1 - m) * depth))
        return np.where(size == 0, 0.0, size * (boxcox(size, 1 - m) - 1) / ((2 - m) * depth))
    if q == 2 and depth == 2:
        return _hyperbolic_entropy(size, lam / 2) / 2
    return _numeric_potential(size, q, depth, lam)


def _numeric_potential(size: Floats, q: float, depth: int, lam: Floats) -> Floats:
    """By parts: |x| R'(|x|) less the integral of s / M(s), which is that of w_1 |w_2|^((L-1)(2-q)) d|w_1|; lam > 0."""
    first = _factors(size, q, depth, lam)[0]
    if q == 2 or depth == 1:
        rest = first**2 / 2
    else:
        unit, exponent = lam ** (1 / q), (depth - 1) * (2 - q) / q
        rest = unit**2 * lam**exponent * _power_integral(np.arcsinh(first / unit), 1, exponent, q)
    return size * _mirror(size, q, depth, lam) - rest


def potential(x: Numbers, q: Numbers, depth: Numbers, lam: Numbers, *, x_0: Numbers = 0.0) -> Any:
    """R(x), coordinate by coordinate: R' = mirror_map with the same x_0, R(0) = 0 [Lemma 4.13, Ex. 3.2].

    hyperbolic_entropy(x, lam/2)/2 at q = 2, L = 2 (the paper prints x/lam and 2 lam^2, which do not have its metric);
    (|x| log(x/x_0) - |x|)/L at lam = 0 and m = 1; (|x|^(2-m)/(2-m) - x x_0 |x_0|^(-m)) / (L - (L-1) q) at other m.
    x_0: as of `mirror_map`, with the same bounds on x.
    """
    a, *geometry, base = checked(x=x, q=q, depth=depth, lam=lam, x_0=x_0)
    _check_base(("x", "x_0"), a, base, *geometry)
    result = by_geometry(_potential, a, *geometry)
    return like(result - a * by_geometry(_mirror, base, *geometry) if base.any() else result, x, q, depth, lam, x_0)


def bregman_divergence(x: Numbers, y: Numbers, q: Numbers, depth: Numbers, lam: Numbers) -> Any:
    """D(x, y) = R(x) - R(y) - R'(y) (x - y), summed over the last axis of all arguments together [Def. B.8].

    Numbers give a number. No x_0: D does not depend on it. Where lam = 0 and m >= 1, x and y must be of one sign and y not 0.
    """
    a, b, *geometry = checked(x=x, y=y, q=q, depth=depth, lam=lam)
    _check_base(("x", "y"), a, b, *geometry)
    values = [by_geometry(_potential, of, *geometry) for of in (a, b)]
    terms = values[0] - values[1] - by_geometry(_mirror, b, *geometry) * (a - b)
    return like(sum_last(np.maximum(terms, 0.0)), x, y, q, depth, lam)  # it is convex: less than 0 is rounding


def escape_time(x: Numbers, q: Numbers, depth: Numbers, lam: Numbers) -> Any:
    """Time from 0 to |x| under a gradient of magnitude 1: mirror_map(|x|), and infinite where lam = 0 and m >= 1."""
    a, *geometry = checked(x=x, q=q, depth=depth, lam=lam)
    never = (geometry[2] == 0) & (exponent_of(geometry[0], geometry[1]) >= 1)
    times = by_geometry(_mirror, np.abs(a), *geometry)
    return like(np.where(a == 0, 0.0, np.where(never, np.inf, times)), x, q, depth, lam)


def hyperbolic_entropy(x: Numbers, beta: Numbers) -> Any:
    """x asinh(x/beta) - sqrt(x^2 + beta^2) + beta, elementwise: 0 at 0; beta > 0 (Ghai et al. 2020)."""
    return like(_hyperbolic_entropy(*checked(x=x, beta=beta)), x, beta)


def _hyperbolic_entropy(x: Floats, beta: Floats) -> Floats:
    return np.asarray(x * np.arcsinh(x / beta) - x * (x / (np.hypot(x, beta) + beta)))
