"""Metric, mirror map and potential of a product of balanced factors."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from ._arguments import Floats, Numbers, by_geometry, checked, exponent_of, like, sum_last
from ._gradients import elementwise
from ._integrals import ITERATIONS, Curve, metric_polynomial

LARGEST = np.log(np.finfo(np.float64).max)
SMALLEST = -750.0  # whose exponential is 0


def metric_exponent(q: Numbers, depth: Numbers) -> Any:
    """m = q (L-1)/L, the power of |x| by which M grows; it is M = L |x|^m at lam = 0. depth: inf is allowed [Def. 4.12]."""
    return like(exponent_of(*checked(q=q, depth_or_inf=depth)), q, depth)


def is_bregman(q: Numbers, depth: Numbers) -> Any:
    """Whether the potential is a Bregman function, m <= 1: every L at q = 1, L <= 2 at q = 2 [Cor. 4.14].

    If not, a coordinate reaches infinity in finite time under a gradient bounded from 0. The paper's "no function for p < 2"
    is about q > 2, which is no geometry of this package.
    """
    return like(exponent_of(*checked(q=q, depth_or_inf=depth)) <= 1, q, depth)


def _first_and_rest(x: Floats, q: float, depth: int, lam: Floats) -> tuple[Floats, Floats]:
    """w_1, of x's sign, and w_2 = ... = w_L."""
    curve = Curve(q, depth)
    at = curve.point(np.log(np.abs(x)), lam)
    rest = np.where(x == 0, lam ** (1 / q), np.exp(curve.log_rest(at)))
    others = rest ** (depth - 1)
    plain = (others > np.finfo(np.float64).tiny) & (others < np.inf)
    first = np.where(plain, x / others, np.copysign(np.exp(curve.log_z(at) / q), x))  # the quotient: their product is x
    return np.where(x == 0, x, first), rest


def balanced_factors(x: Numbers, q: Numbers, depth: int, lam: Numbers) -> Any:
    """(L, *shape): w_1, ..., w_L with product x and |w_j|^q - |w_1|^q = lam for j >= 2; x's sign is w_1's [Def. 4.6].

    depth: one integer. shape: that of x, q and lam together.
    """
    arrays = checked(x=x, q=q, depth=depth, lam=lam)
    if arrays[2].ndim:
        raise ValueError(f"depth must be one integer; got shape {arrays[2].shape}")
    first, rest = (by_geometry(lambda *a, i=i: _first_and_rest(*a)[i], *arrays) for i in (0, 1))
    return like(np.stack([first] + [rest] * (int(arrays[2]) - 1)), x, q, lam)


def _inverse_metric(x: Floats, q: float, depth: int, lam: Floats) -> Floats:
    if depth == 1:
        return np.ones_like(x)
    if not lam.any():
        return np.asarray(depth * np.abs(x) ** exponent_of(q, depth))
    curve = Curve(q, depth)
    return np.where(x == 0, lam ** (depth - 1), np.exp(curve.log_metric(curve.point(np.log(np.abs(x)), lam))))


def _metric_derivative(order: int, x: Floats, q: float, depth: int, lam: Floats) -> Floats:
    """The derivative of M of `order` >= 1."""
    curve, log_x = Curve(q, depth), np.log(np.abs(x))
    power, coefficients = metric_polynomial(q, depth, order)
    if not coefficients:
        return np.zeros_like(x)
    size, sign = curve.log_metric_derivative(curve.point(log_x, lam), power, coefficients)
    at_0 = np.zeros_like(x)
    if order % 2 == 0 and q * power == order and lam.all():
        at_0 = coefficients[0] * np.exp((depth - 1 - depth * power) * np.log(lam))
    return np.where(x == 0, at_0, sign * np.sign(x) ** order * np.exp(size - order * log_x))


def _derivative_of_inverse_metric(order: int, x: Numbers, q: Numbers, depth: Numbers, lam: Numbers) -> Any:
    function = _inverse_metric if order == 0 else partial(_metric_derivative, order)
    slopes = {"x": partial(_derivative_of_inverse_metric, order + 1)}
    return elementwise(partial(by_geometry, function), slopes, {"x": x, "q": q, "depth": depth, "lam": lam})


def inverse_metric(x: Numbers, q: Numbers, depth: Numbers, lam: Numbers) -> Any:
    """M(x) = 1 / R''(x), what depth multiplies a coordinate's speed by; 1 at depth 1 [Thm 4.8, Eq. 14].

    sqrt(4 |x|^q + lam^2) at L = 2 (the last line of the paper's proof drops the 4), L |x|^m at lam = 0.

    Differentiable any number of times. At x = 0 a derivative is the finite number that it tends to from both sides, and 0
    where there is none: at the kink of q = 1 the first is 0, and the second is 0 where 1 < q < 2 and where lam = 0.
    """
    return _derivative_of_inverse_metric(0, x, q, depth, lam)


def _excess(q: float, depth: int) -> float:
    """L (1-m), which has all its digits near m = 1; 0 where `exponent_of` has m = 1."""
    return 0.0 if exponent_of(q, depth) == 1 else 1 - (q - 1) * (depth - 1)


def _log_area(x: Floats, x_0: Floats, curve: Curve, lam: Floats, weight: str | None = None) -> Floats:
    """log of the integral of ds / M(s) between |x| and |x_0|; -inf if they are one. weight: as of `Curve.log_integral`."""
    low, high = np.minimum(np.abs(x), np.abs(x_0)), np.maximum(np.abs(x), np.abs(x_0))
    result = np.full(high.shape, -np.inf)
    from_0 = (low == 0) & (high > 0) & (lam == 0)
    if from_0.any():
        result[from_0] = _log_area_from_0(np.log(high[from_0]), curve, weight)
    rest = (low < high) & ~from_0
    if rest.any():
        low, high = low[rest], high[rest]
        near = high < 2 * low
        ratio = np.where(near, np.log1p((high - low) / low), np.log(high / low))
        ratio = np.where(np.isinf(ratio), np.log(high) - np.log(low), ratio)
        result[rest] = curve.log_integral(curve.point(np.log(high), lam[rest]), ratio, weight)
    return result


def _log_area_from_0(log_x: Floats, curve: Curve, weight: str | None) -> Floats:
    """At lam = 0: inf where the metric's inverse is not integrable."""
    depth, excess = curve.depth, _excess(*curve)
    power = (excess if weight is None else depth + excess) / depth
    if weight == "below":
        return np.asarray(power * log_x - np.log(depth + excess))
    if excess <= 0:
        return np.full(log_x.shape, np.inf)
    return np.asarray(power * log_x - np.log(excess) - (np.log(power) if weight == "above" else 0.0))


def _mirror(x: Floats, q: float, depth: int, lam: Floats, x_0: Floats) -> Floats:
    """The integral of 1 / M from x_0 to x."""
    if depth == 1:
        return x - x_0
    curve, opposite = Curve(q, depth), np.sign(x) * np.sign(x_0) < 0
    if q == 2 and depth == 2 and lam.all() and not x_0.any():
        size = _asinh_of_quotient(np.abs(x), lam / 2) / 2
    else:
        size = np.exp(_log_area(x, np.where(opposite, 0.0, x_0), curve, lam))
        size[opposite] += np.exp(_log_area(x_0, np.zeros_like(x_0), curve, lam))[opposite]
    return np.where(x == x_0, np.copysign(size, x), np.where(x > x_0, size, -size))


def _asinh_of_quotient(x: Floats, beta: Floats) -> Floats:
    """asinh(x / beta) of x >= 0, whose quotient may be too large for a float."""
    quotient = x / beta
    return np.where(quotient < np.inf, np.arcsinh(quotient), np.log(x) - np.log(beta) + np.log(2))


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
    quadrature, to 12 digits at depths up to 1000. [Ex. 3.2] prints x/lam, which does not have its metric.

    x_0: where R' is 0. Where lam = 0 and m >= 1 it must not be 0, and x must be of its sign or 0, where R' is infinite.
    """

    def value(a: Floats, q: Floats, depth: Floats, lam: Floats, base: Floats) -> Floats:
        _check_base(("x", "x_0"), a, base, q, depth, lam)
        return by_geometry(_mirror, a, q, depth, lam, base)

    slopes = {
        "x": lambda x, *geometry: 1 / inverse_metric(x, *geometry[:-1]),
        "x_0": lambda _, *geometry: -1 / inverse_metric(geometry[-1], *geometry[:-1]),
    }
    return elementwise(value, slopes, {"x": x, "q": q, "depth": depth, "lam": lam, "x_0": x_0})


def _solved(log_target: Floats, curve: Curve, lam: Floats, log_start: Floats | None, direction: int = 1) -> Floats:
    """|x| / start, where log of the integral of ds / M between them is `log_target`; |x| where it starts at 0, None; lam > 0.

    direction: 1 for |x| above the start, -1 below. inf where no float is so far from the start. Newton's method in the
    logarithm of log(|x| / start), or in log |x|, inside a bracket.
    """

    def of(unknown: Floats) -> tuple[Floats, Floats]:
        """Logarithm of the integral, and its slope."""
        ratio = np.full_like(unknown, np.inf) if log_start is None else np.exp(unknown)
        log_x = unknown if log_start is None else log_start + direction * ratio
        at = curve.point(log_x, lam)
        log_area = curve.log_integral(curve.point(log_start, lam) if direction < 0 and log_start is not None else at, ratio)
        slope = np.exp(log_x - curve.log_metric(at) - log_area)
        return log_area, slope if log_start is None else slope * ratio

    low, high = np.full_like(log_target, SMALLEST), np.full_like(log_target, LARGEST)
    if log_start is not None:
        high = np.log(LARGEST - log_start if direction > 0 else log_start - SMALLEST)
    too_far = of(high)[0] < log_target
    unknown = (low + high) / 2
    for _ in range(ITERATIONS):
        log_area, slope = of(unknown)
        below = log_area < log_target
        low, high = np.where(below, unknown, low), np.where(below, high, unknown)
        moved = unknown - (log_area - log_target) / slope
        moved = np.where((low < moved) & (moved < high), moved, (low + high) / 2)
        close = np.abs(moved - unknown) <= 1e-15 * np.maximum(1.0, np.abs(unknown))
        unknown = moved
        if close.all():
            break
    ends = np.exp(unknown) if log_start is None else np.exp(direction * np.exp(unknown))
    return np.where(too_far & (direction > 0), np.inf, ends)


def _inverse_of_power(y: Floats, curve: Curve, x_0: Floats) -> Floats:
    """Of `_mirror` at lam = 0, where it is sign(x) |x|^(e/L) / e less that of x_0, e = L (1-m)."""
    depth, excess = curve.depth, _excess(*curve)
    base = np.abs(x_0) ** (excess / depth)
    outward = np.where(x_0 == 0, np.abs(y), y * np.sign(x_0))
    if excess == 0:
        return np.asarray(x_0 * np.exp(depth * outward))
    share = excess * outward / base
    near = np.where(share > -1, x_0 * np.exp(np.log1p(share) * (depth / excess)), np.copysign(np.inf, x_0))
    if excess < 0:
        return near
    from_0 = np.where(x_0 == 0, excess * outward, -base - excess * outward) ** (depth / excess)
    return np.where(x_0 == 0, np.copysign(from_0, y), np.where(share > -1, near, np.copysign(from_0, y)))


def _inverse_mirror(y: Floats, q: float, depth: int, lam: Floats, x_0: Floats) -> Floats:
    """The x of which `_mirror` is y."""
    curve, size = Curve(q, depth), np.abs(y)
    if depth == 1:
        return y + x_0
    if not lam.any():
        return _inverse_of_power(y, curve, x_0)
    if not x_0.any() and q == 1:
        return np.asarray(np.sign(y) * np.exp(np.log(size) + (depth - 1) * np.log(size + lam)))
    if not x_0.any() and q == 2 and depth == 2:
        return np.where(size < 300, np.sinh(2 * y) * lam / 2, np.sign(y) * np.exp(2 * size + np.log(lam / 4)))
    start = np.sign(x_0)
    to_0 = np.where(x_0 == 0, 0.0, np.exp(_log_area(x_0, np.zeros_like(x_0), curve, lam)))
    from_0 = y + start * to_0  # of the side of 0 on which x lies
    by_0 = (x_0 == 0) | (start * from_0 < to_0 / 2)  # nearer to 0 than to x_0, or beyond it
    result = np.where(y == 0, x_0, 0.0)
    for here, direction in ((by_0, 0), (~by_0 & (y * start > 0), 1), (~by_0 & (y * start < 0), -1)):
        if not here.any():
            continue
        if direction == 0:
            ends = _solved(np.log(np.abs(from_0[here])), curve, lam[here], None)
            result[here] = np.copysign(ends, from_0[here])
        else:
            ends = _solved(np.log(size[here]), curve, lam[here], np.log(np.abs(x_0[here])), direction)
            result[here] = x_0[here] * ends
    return result


def inverse_mirror_map(y: Numbers, q: Numbers, depth: Numbers, lam: Numbers, *, x_0: Numbers = 0.0) -> Any:
    """The x with mirror_map(x) = y, the derivative of the convex conjugate R*; closed where `mirror_map` is.

    Where m > 1 the mirror map has an end in finite y (that is why R is no Bregman function): from there on x is +-inf.
    """

    def value(a: Floats, q: Floats, depth: Floats, lam: Floats, base: Floats) -> Floats:
        _check_base(("y", "x_0"), np.zeros(()), base, q, depth, lam)
        return by_geometry(_inverse_mirror, a, q, depth, lam, base)

    def slope(y: Numbers, q: Numbers, depth: Numbers, lam: Numbers, x_0: Numbers) -> Any:
        return inverse_metric(inverse_mirror_map(y, q, depth, lam, x_0=x_0), q, depth, lam)

    slopes = {"y": slope, "x_0": lambda y, *geometry: slope(y, *geometry) / inverse_metric(geometry[-1], *geometry[:-1])}
    return elementwise(value, slopes, {"y": y, "q": q, "depth": depth, "lam": lam, "x_0": x_0})


def _potential(x: Floats, q: float, depth: int, lam: Floats, x_0: Floats) -> Floats:
    """The integral of `_mirror` from 0: terms of one sign, but for the area around x_0 less that of (0, x_0) beyond x_0."""
    if depth == 1:
        return x * (x / 2 - x_0)
    if q == 2 and depth == 2 and lam.all() and not x_0.any():
        return _hyperbolic_entropy(x, lam / 2) / 2
    curve, size, zero = Curve(q, depth), np.abs(x), np.zeros_like(x)
    log_size = np.log(size)
    result = np.zeros_like(x)
    opposite = np.sign(x) * np.sign(x_0) < 0
    inner, outer = ~opposite & (size < np.abs(x_0)) & (x != 0), ~opposite & (size >= np.abs(x_0))

    def area(here: Any, x: Floats, x_0: Floats, weight: str | None = None) -> Floats:
        return _log_area(x[here], x_0[here], curve, lam[here], weight)

    at = opposite
    result[at] = np.exp(log_size[at] + area(at, x_0, zero)) + np.exp(area(at, x, zero, "above"))
    at = inner
    result[at] = -np.exp(log_size[at] + area(at, x, x_0)) - np.exp(area(at, x, zero, "below"))
    at = outer
    result[at] = np.exp(area(at, x, x_0, "above")) - np.exp(area(at, x_0, zero, "below"))
    return result


def potential(x: Numbers, q: Numbers, depth: Numbers, lam: Numbers, *, x_0: Numbers = 0.0) -> Any:
    """R(x), coordinate by coordinate: R' = mirror_map with the same x_0, R(0) = 0 [Lemma 4.13, Ex. 3.2].

    hyperbolic_entropy(x, lam/2)/2 at q = 2, L = 2 (the paper prints x/lam and 2 lam^2, which do not have its metric);
    (|x| log(x/x_0) - |x|)/L at lam = 0 and m = 1; (|x|^(2-m)/(2-m) - x x_0 |x_0|^(-m)) / (L - (L-1) q) at other m.
    x_0: as of `mirror_map`, with the same bounds on x. Where R changes its sign beyond x_0, its digits are those of -R(x_0).
    """

    def value(a: Floats, q: Floats, depth: Floats, lam: Floats, base: Floats) -> Floats:
        _check_base(("x", "x_0"), a, base, q, depth, lam)
        return by_geometry(_potential, a, q, depth, lam, base)

    slopes = {
        "x": lambda x, q, depth, lam, x_0: mirror_map(x, q, depth, lam, x_0=x_0),
        "x_0": lambda x, q, depth, lam, x_0: -x / inverse_metric(x_0, q, depth, lam),
    }
    return elementwise(value, slopes, {"x": x, "q": q, "depth": depth, "lam": lam, "x_0": x_0})


def _divergence(x: Floats, q: float, depth: int, lam: Floats, y: Floats) -> Floats:
    """The integral of (x - s) / M(s) from y to x, of terms of one sign."""
    if depth == 1:
        return np.asarray((x - y) ** 2 / 2)
    curve, zero, opposite = Curve(q, depth), np.zeros_like(x), np.sign(x) * np.sign(y) < 0
    result = np.empty_like(x)
    for here, weight in ((~opposite & (np.abs(x) > np.abs(y)), "above"), (~opposite & (np.abs(x) <= np.abs(y)), "below")):
        result[here] = np.exp(_log_area(x[here], y[here], curve, lam[here], weight))
    if opposite.any():
        a, b, lam, zero = x[opposite], y[opposite], lam[opposite], zero[opposite]
        parts = (
            np.log(np.abs(a)) + _log_area(b, zero, curve, lam),
            *(_log_area(of, zero, curve, lam, weight) for of, weight in ((a, "above"), (b, "below"))),
        )
        result[opposite] = np.exp(parts).sum(axis=0)
    return result


def bregman_divergence(x: Numbers, y: Numbers, q: Numbers, depth: Numbers, lam: Numbers) -> Any:
    """D(x, y) = R(x) - R(y) - R'(y) (x - y), summed over the last axis of all arguments together [Def. B.8].

    Numbers give a number. No x_0: D does not depend on it. Where lam = 0 and m >= 1, x and y must be of one sign and y not 0.
    """

    def value(a: Floats, b: Floats, q: Floats, depth: Floats, lam: Floats) -> Floats:
        _check_base(("x", "y"), a, b, q, depth, lam)
        return by_geometry(_divergence, a, q, depth, lam, b)

    slopes = {
        "x": lambda x, y, *geometry: mirror_map(x, *geometry, x_0=y),
        "y": lambda x, y, *geometry: (y - x) / inverse_metric(y, *geometry),
    }
    return sum_last(elementwise(value, slopes, {"x": x, "y": y, "q": q, "depth": depth, "lam": lam}))


def escape_time(x: Numbers, q: Numbers, depth: Numbers, lam: Numbers) -> Any:
    """Time from 0 to |x| under a gradient of magnitude 1: mirror_map(|x|), and infinite where lam = 0 and m >= 1."""

    def value(a: Floats, q: Floats, depth: Floats, lam: Floats) -> Floats:
        return by_geometry(_mirror, np.abs(a), q, depth, lam, np.zeros(()))

    slopes = {"x": lambda x, *geometry: x.sign() / inverse_metric(x, *geometry)}
    return elementwise(value, slopes, {"x": x, "q": q, "depth": depth, "lam": lam})


def hyperbolic_entropy(x: Numbers, beta: Numbers) -> Any:
    """x asinh(x/beta) - sqrt(x^2 + beta^2) + beta, elementwise: 0 at 0; beta > 0 (Ghai et al. 2020)."""
    slopes = {
        "x": lambda x, beta: torch.asinh(x / beta),
        "beta": lambda x, beta: -(x / beta) * (x / (torch.hypot(x, beta) + beta)),
    }
    return elementwise(_hyperbolic_entropy, slopes, {"x": x, "beta": beta})


def _hyperbolic_entropy(x: Floats, beta: Floats) -> Floats:
    with np.errstate(all="ignore"):
        size, quotient = np.abs(x), np.abs(x) / beta
        share = np.where(quotient < np.inf, quotient / (np.hypot(quotient, 1) + 1), 1.0)
        return np.asarray(size * (_asinh_of_quotient(size, beta) - share))
