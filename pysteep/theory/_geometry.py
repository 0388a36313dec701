"""Metric, mirror map and potential of a product of balanced factors."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _integrals as integrals
from ._arguments import Floats, Numbers, by_geometry, checked, exponent_of, like, sum_last
from ._integrals import between, log_metric, moments, point

LARGEST = float(np.log(np.finfo(float).max))


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
    """w_1, of x's sign, and w_2 = ... = w_L; depth > 1."""
    at = point(np.log(np.abs(x)), q, depth, lam)
    first = np.exp(at.log_x / depth + at.tau / q)
    rest = np.exp(at.log_x / depth - at.tau / (q * (depth - 1)))
    return np.copysign(np.where(x == 0, 0.0, first), x), np.where(x == 0, lam ** (1 / q), rest)


def balanced_factors(x: Numbers, q: Numbers, depth: int, lam: Numbers) -> Any:
    """(L, *shape): w_1, ..., w_L with product x and |w_j|^q - |w_1|^q = lam for j >= 2; x's sign is w_1's [Def. 4.6].

    depth: one integer. shape: that of x, q and lam together.
    """
    arrays = checked(x=x, q=q, depth=depth, lam=lam)
    if arrays[2].ndim:
        raise ValueError(f"depth must be one integer; got shape {arrays[2].shape}")
    if arrays[2] == 1:
        return like(np.broadcast_arrays(*arrays)[0][None], x, q, lam)
    first, rest = (by_geometry(lambda *a, i=i: _factors(*a)[i], *arrays) for i in (0, 1))
    return like(np.stack([first] + [rest] * (int(arrays[2]) - 1)), x, q, lam)


def _inverse_metric(x: Floats, q: float, depth: int, lam: Floats) -> Floats:
    return np.ones_like(x) if depth == 1 else integrals.inverse_metric(x, q, depth, lam)


def inverse_metric(x: Numbers, q: Numbers, depth: Numbers, lam: Numbers) -> Any:
    """M(x) = 1 / R''(x), what depth multiplies a coordinate's speed by; 1 at depth 1 [Thm 4.8, Eq. 14].

    sqrt(4 |x|^q + lam^2) at L = 2 (the last line of the paper's proof drops the 4), L |x|^m at lam = 0.
    """
    return like(by_geometry(_inverse_metric, *checked(x=x, q=q, depth=depth, lam=lam)), x, q, depth, lam)


def _mirror(x: Floats, q: float, depth: int, lam: Floats, base: Floats) -> Floats:
    """The integral of ds / M(s) from `base` to x."""
    if depth == 1:
        return x - base
    if q == 1 and lam.all() and not base.any():
        return _factors(x, q, depth, lam)[0]
    if q == 2 and depth == 2 and lam.all() and not base.any():
        return np.copysign(_arcsinh_of_quotient(np.abs(x), lam) / 2, x)
    size, start = np.abs(x), np.abs(base)
    one_side = np.sign(x) * np.sign(base) > 0
    to_x, _ = between(np.where(one_side, np.minimum(size, start), 0.0), np.maximum(size, start * one_side), q, depth, lam)
    to_base, _ = between(np.zeros_like(start), start, q, depth, lam)
    apart = np.where(x == 0, 0.0, np.sign(x) * to_x) - np.where(base == 0, 0.0, np.sign(base) * to_base)
    return np.where(one_side, np.sign(x) * np.sign(size - start) * to_x, apart)


def _arcsinh_of_quotient(x: Floats, lam: Floats) -> Floats:
    """asinh(2x/lam), x >= 0, also where the quotient is beyond float64."""
    large = np.log(x) - np.log(lam) + np.log(2.0) + np.log1p(np.hypot(1.0, lam / 2 / x))
    return np.where(x > lam, large, np.arcsinh(2 * x / lam))


def _inverse_mirror(y: Floats, q: float, depth: int, lam: Floats, base: Floats) -> Floats:
    """The x with `_mirror` y."""
    if depth == 1:
        return y + base
    if not lam.any():
        return _inverse_at_zero_balance(y, exponent_of(q, depth), depth, base)
    if not base.any() and q == 2 and depth == 2:
        return np.asarray(np.sinh(2 * y) * lam / 2)
    if not base.any() and q == 1:
        return np.asarray(y * (np.abs(y) + lam) ** (depth - 1))
    side = np.where(base == 0, np.where(y < 0, -1.0, 1.0), np.sign(base))
    start, y = np.abs(base), y * side
    to_zero, _ = between(np.zeros_like(start), start, q, depth, lam)
    crosses, far = -y > to_zero, -y > to_zero / 2  # 0; most of the way to it
    from_zero = np.where(y >= 0, y, np.where(crosses, -y - to_zero, to_zero + y))
    up = _upwards(np.where(y >= 0, start, 0.0), from_zero, q, depth, lam)
    down = _downwards(start, np.where((y < 0) & ~far, -y, 0.0), q, depth, lam)
    return np.asarray(side * np.where(crosses, -1.0, 1.0) * np.where((y < 0) & ~far, down, up))


def _inverse_at_zero_balance(y: Floats, m: float, depth: int, base: Floats) -> Floats:
    side = np.where(base == 0, np.where(y < 0, -1.0, 1.0), np.sign(base))
    start, y = np.abs(base), depth * y * side
    if m == 1:
        return np.asarray(side * start * np.exp(y))
    scaled = (1 - m) * y * start ** (m - 1)  # of start^(1-m), by which |x|^(1-m) has grown
    moved = start * np.exp(np.log1p(scaled) / (1 - m))
    if m > 1:
        return np.asarray(side * np.where(scaled > -1, moved, np.inf))
    rest = start ** (1 - m) + (1 - m) * y
    return np.asarray(side * np.where((start > 0) & (scaled > -1), moved, np.sign(rest) * np.abs(rest) ** (1 / (1 - m))))


def _upwards(start: Floats, y: Floats, q: float, depth: int, lam: Floats) -> Floats:
    """The x >= start >= 0 with an integral of y >= 0 from there: Newton's method in log x, on the integral's logarithm."""
    metric = log_metric(point(np.log(start), q, depth, lam), q, depth)
    metric = np.where(start == 0, (depth - 1) * np.log(lam), metric)
    low, high = np.logaddexp(np.log(start), np.log(y) + metric), np.full_like(start, LARGEST)  # M grows from start on
    reach, _ = between(start, np.exp(high), q, depth, lam)
    v = np.minimum(low, high)
    for _ in range(100):
        found, _ = between(start, np.exp(v), q, depth, lam)
        log_m = log_metric(point(v, q, depth, lam), q, depth)
        off = np.log(found) - np.log(y)
        low, high = np.where(off < 0, np.maximum(low, v), low), np.where(off > 0, np.minimum(high, v), high)
        new = v - off * found * np.exp(log_m - v)
        new = np.where((new >= low) & (new <= high), new, (low + high) / 2)
        moving = (y > 0) & (y < reach) & (np.abs(new - v) > 4e-16 * np.maximum(1.0, np.abs(v)))
        v = np.where(moving, new, v)
        if not moving.any():
            break
    return np.where(y == 0, start, np.where(y < reach, np.exp(v), np.inf))


def _downwards(start: Floats, y: Floats, q: float, depth: int, lam: Floats) -> Floats:
    """The x in (0, start] with an integral of y from it to `start`, y at most half of that from 0."""
    low, high = np.full_like(start, -LARGEST), np.log(start)
    v = high.copy()
    for _ in range(100):
        found, _ = between(np.exp(v), start, q, depth, lam)
        log_m = log_metric(point(v, q, depth, lam), q, depth)
        off = found - y
        low, high = np.where(off > 0, np.maximum(low, v), low), np.where(off < 0, np.minimum(high, v), high)
        new = v + off * np.exp(log_m - v)
        new = np.where((new >= low) & (new <= high), new, (low + high) / 2)
        moving = (y > 0) & (np.abs(new - v) > 4e-16 * np.maximum(1.0, np.abs(v)))
        v = np.where(moving, new, v)
        if not moving.any():
            break
    return np.where(y == 0, start, np.exp(v))


def _check_base(names: tuple[str, str], x: Floats, x_0: Floats, q: Floats, depth: Floats, lam: Floats) -> None:
    """ValueError where x and x_0 do not lie on one side of 0 although lam = 0 and m >= 1, where M / |x| is 0 at 0."""
    singular = (lam == 0) & (exponent_of(q, depth) >= 1)
    where = "where lam = 0 and q (L-1)/L >= 1"
    if np.any(singular & (x_0 == 0)):
        raise ValueError(f"{names[1]} must be another number than 0 {where}; got 0.0")
    opposite = np.broadcast_arrays(x, singular & (np.sign(x) * np.sign(x_0) < 0))
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
    return like(by_geometry(_mirror, a, *geometry, base), x, q, depth, lam, x_0)


def inverse_mirror_map(y: Numbers, q: Numbers, depth: Numbers, lam: Numbers, *, x_0: Numbers = 0.0) -> Any:
    """The x with mirror_map(x) = y, the derivative of the convex conjugate R*; closed where `mirror_map` is.

    Where m > 1 the mirror map has an end in finite y (that is why R is no Bregman function): from there on x is +-inf.
    """
    a, *geometry, base = checked(y=y, q=q, depth=depth, lam=lam, x_0=x_0)
    _check_base(("y", "x_0"), np.zeros(()), base, *geometry)
    return like(by_geometry(_inverse_mirror, a, *geometry, base), y, q, depth, lam, x_0)


def _potential(x: Floats, q: float, depth: int, lam: Floats, base: Floats) -> Floats:
    """By parts: x R'(x) less the integral of s / M(s), at most half of it where `base` is 0, as M grows with |s|."""
    if depth == 1:
        return x * (x / 2 - base)
    if q == 2 and depth == 2 and lam.all() and not base.any():
        return _hyperbolic_entropy(np.abs(x), lam / 2) / 2
    _, rest = between(np.zeros_like(x), np.abs(x), q, depth, lam)
    return np.where(x == 0, 0.0, x * _mirror(x, q, depth, lam, base) - rest)


def potential(x: Numbers, q: Numbers, depth: Numbers, lam: Numbers, *, x_0: Numbers = 0.0) -> Any:
    """R(x), coordinate by coordinate: R' = mirror_map with the same x_0, R(0) = 0 [Lemma 4.13, Ex. 3.2].

    hyperbolic_entropy(x, lam/2)/2 at q = 2, L = 2 (the paper prints x/lam and 2 lam^2, which do not have its metric);
    (|x| log(x/x_0) - |x|)/L at lam = 0 and m = 1; (|x|^(2-m)/(2-m) - x x_0 |x_0|^(-m)) / (L - (L-1) q) at other m.
    x_0: as of `mirror_map`, with the same bounds on x.
    """
    a, *geometry, base = checked(x=x, q=q, depth=depth, lam=lam, x_0=x_0)
    _check_base(("x", "x_0"), a, base, *geometry)
    return like(by_geometry(_potential, a, *geometry, base), x, q, depth, lam, x_0)


def _divergence(x: Floats, q: float, depth: int, lam: Floats, y: Floats) -> Floats:
    """The integral of (x - s) / M(s) from y to x."""
    if depth == 1:
        return np.asarray((x - y) ** 2 / 2)
    a, b = np.abs(x), np.abs(y)
    low, high = np.minimum(a, b), np.maximum(a, b)
    one_side = np.sign(x) * np.sign(y) > 0
    near = one_side & (2 * low >= high)
    base = np.where(one_side, low, 0.0)
    first, second = between(base, np.where(one_side, high, a), q, depth, lam)
    far = np.abs(np.where(a == 0, 0.0, a * first) - second)  # M grows with |s|: neither is much larger than their difference
    first, second = between(np.zeros_like(b), b, q, depth, lam)
    far = np.where(one_side, far, far + np.where(a == 0, 0.0, a * first) + second)
    up, down = moments(np.where(near, low, 1.0), np.where(near, high, 1.0), q, depth, lam, 2)
    return np.where(near, np.where(a > b, down, up), far)


def bregman_divergence(x: Numbers, y: Numbers, q: Numbers, depth: Numbers, lam: Numbers) -> Any:
    """D(x, y) = R(x) - R(y) - R'(y) (x - y), summed over the last axis of all arguments together [Def. B.8].

    Numbers give a number. No x_0: D does not depend on it. Where lam = 0 and m >= 1, x and y must be of one sign and y not 0.
    """
    a, b, *geometry = checked(x=x, y=y, q=q, depth=depth, lam=lam)
    _check_base(("x", "y"), a, b, *geometry)
    return like(sum_last(by_geometry(_divergence, a, *geometry, b)), x, y, q, depth, lam)


def escape_time(x: Numbers, q: Numbers, depth: Numbers, lam: Numbers) -> Any:
    """Time from 0 to |x| under a gradient of magnitude 1: mirror_map(|x|), and infinite where lam = 0 and m >= 1."""
    a, *geometry = checked(x=x, q=q, depth=depth, lam=lam)
    never = (geometry[2] == 0) & (exponent_of(geometry[0], geometry[1]) >= 1)
    times = by_geometry(_mirror, np.abs(a), *geometry, np.zeros(()))
    return like(np.where(a == 0, 0.0, np.where(never, np.inf, times)), x, q, depth, lam)


def hyperbolic_entropy(x: Numbers, beta: Numbers) -> Any:
    """x asinh(x/beta) - sqrt(x^2 + beta^2) + beta, elementwise: 0 at 0; beta > 0 (Ghai et al. 2020)."""
    return like(_hyperbolic_entropy(*checked(x=x, beta=beta)), x, beta)


def _hyperbolic_entropy(x: Floats, beta: Floats) -> Floats:
    return np.asarray(x * np.arcsinh(x / beta) - x * (x / (np.hypot(x, beta) + beta)))
