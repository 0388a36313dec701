"""Integrals of 1 / M and s / M, from one x to another, for balanced factors: no difference of large numbers is formed.

All arrays are flat, of one q and depth L >= 2. The equation of the factors, z (z + lam)^(L-1) = |x|^q, is solved for the
logarithm tau <= 0 of z / |x|^(q/L). In terms of it nothing overflows on the way, and no error grows with the depth:

    |w_1| = |x|^(1/L) e^(tau/q),   |w_2| = |x|^(1/L) e^(-tau/(q (L-1))),   M = |x|^m e^-tau (1 + (L-1) z / (z + lam))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.polynomial.legendre import leggauss

from ._arguments import Floats, exponent_of, integral_between

TINY = 45.0  # e^-45 is less than a unit in the last place
NODES, WEIGHTS = leggauss(48)
NODES, WEIGHTS = (NODES + 1) / 2, WEIGHTS / 2


class Point(NamedTuple):
    """Balanced factors of x > 0: logarithms of x, of z / x^(q/L), of z / lam (inf at lam = 0), of z / (z + lam)."""

    log_x: Floats
    tau: Floats
    kappa: Floats
    log_share: Floats


def point(log_x: Floats, q: float, depth: int, lam: Floats) -> Point:
    """By Newton's method, which comes down to the root of a convex increasing function."""
    n = depth - 1
    log_lam = np.log(lam) - q / depth * log_x  # in units of x^(q/L)
    tau = np.minimum(0.0, -n * log_lam)
    for _ in range(200):
        total = np.logaddexp(tau, log_lam)
        lower = tau - (tau + n * total) / (1 + n * np.exp(tau - total))
        if not (lower < tau).any():
            break
        tau = np.minimum(tau, lower)
    kappa = tau - log_lam
    return Point(log_x, tau, kappa, -np.logaddexp(0.0, -kappa))


def log_metric(at: Point, q: float, depth: int) -> Floats:
    return np.asarray(exponent_of(q, depth) * at.log_x - at.tau + np.log1p((depth - 1) * np.exp(at.log_share)))


def inverse_metric(x: Floats, q: float, depth: int, lam: Floats) -> Floats:
    """M(x)."""
    at = point(np.log(np.abs(x)), q, depth, lam)
    return np.where(x == 0, lam ** (depth - 1), np.exp(log_metric(at, q, depth)))


def between(low: Floats, high: Floats, q: float, depth: int, lam: Floats) -> tuple[Floats, Floats]:
    """The integrals of 1 / M and of s / M over s from `low` to `high`, 0 <= low <= high; the first is inf where it is."""
    near = 2 * low >= high
    pair = np.empty((2, *np.shape(high)))
    for here, rule in ((near, _between_near), (~near, _between_far if lam.any() else _zero_balance)):
        if here.any():
            pair[:, here] = rule(low[here], high[here], q, depth, lam[here])
    return pair[0], pair[1]


def _between_near(low: Floats, high: Floats, q: float, depth: int, lam: Floats) -> tuple[Floats, Floats]:
    to_low, to_high = moments(low, high, q, depth, lam, 1)
    return to_low + to_high, high * to_low + low * to_high


def moments(low: Floats, high: Floats, q: float, depth: int, lam: Floats, power: int) -> tuple[Floats, Floats]:
    """The integrals of (s - low) / M and (high - s) / M, times (high - low)^(power - 2), where high <= 2 low.

    By a Gauss rule: the metric has no singularity nearer than 0. high - low is exact.
    """
    s = low[..., None] + (high - low)[..., None] * NODES
    log_m = log_metric(point(np.log(s), q, depth, lam[..., None]), q, depth)
    terms = np.exp(power * np.log(high - low)[..., None] - log_m) * WEIGHTS
    return np.where(high > low, terms @ NODES, 0.0), np.where(high > low, terms @ (1 - NODES), 0.0)


def _zero_balance(low: Floats, high: Floats, q: float, depth: int, _: Floats) -> tuple[Floats, Floats]:
    """Of M = L s^m."""
    m = exponent_of(q, depth)
    ratio = np.log(high) - np.log(low)  # inf at low = 0
    if m == 1:
        first = ratio / depth
    elif m < 1:
        first = -(high ** (1 - m)) * np.expm1(-(1 - m) * ratio) / ((1 - m) * depth)
    else:
        first = low ** (1 - m) * -np.expm1(-(m - 1) * ratio) / ((m - 1) * depth)
    return np.asarray(first), np.asarray(high ** (2 - m) * -np.expm1(-(2 - m) * ratio) / ((2 - m) * depth))


def _between_far(low: Floats, high: Floats, q: float, depth: int, lam: Floats) -> tuple[Floats, Floats]:
    """In the logarithm kappa of z / lam, where dx = x (1 + (L-1) z / (z + lam)) / q dkappa makes the integrands explicit."""
    n, top = depth - 1, point(np.log(high), q, depth, lam)
    steepness = n * (q - 1) / q
    bottom = point(np.log(np.where(low > 0, low, 1.0)), q, depth, lam)
    length = q / depth * (np.log(high) - np.log(np.where(low > 0, low, 1.0))) + top.tau - bottom.tau
    length = np.where(low > 0, length, np.inf)  # from low to high
    # s / M grows all the way up. 1 / M times dx/dkappa is largest at `peak`, or at the end nearer to it.
    second = _from(top, length, lambda t, add: (2 * t + n * (2 - q) * add) / q)
    second *= np.exp((2 - exponent_of(q, depth)) * top.log_x + top.tau) / q
    share = 1 / (n * (q - 1)) if q > 1 else np.inf
    peak = np.log(share) - np.log1p(-share) if share < 1 else np.inf
    beyond = np.clip(top.kappa - peak, 0.0, length) if np.isfinite(peak) else np.zeros_like(high)  # above the largest value
    at_bottom, at_top = beyond == length, beyond == 0
    kappa = np.where(at_top, top.kappa, np.where(at_bottom, bottom.kappa, peak))
    end = Point(*(np.where(at_bottom, b, t) for b, t in zip(bottom, top, strict=True)))
    of_end = (1 - exponent_of(q, depth)) * end.log_x + end.tau
    of_peak = (1 / q - steepness) * np.log(lam) + kappa / q - steepness * np.logaddexp(0.0, kappa)
    share_there = np.where(at_top, top.log_share, np.where(at_bottom, bottom.log_share, -np.logaddexp(0.0, -kappa)))
    here = Point(end.log_x, end.tau, kappa, share_there)

    def relative(t: Floats, add: Floats) -> Floats:
        return np.asarray(t / q - steepness * add)

    sums = _from(here, length - beyond, relative) + _from(here, -beyond, relative)
    return np.exp(np.where(at_top | at_bottom, of_end, of_peak)) * sums / q, second


def _from(at: Point, length: Floats, exponent: Callable[[Floats, Floats], Floats]) -> Floats:
    """Integral of e^exponent(t, add) from kappa - length to kappa, or from kappa to kappa - length where that is larger.

    t is what is added to kappa, and `add` what that adds to log(z + lam). Below kappa = 0, where M is constant, the integrand
    falls with e^(t/2) or faster.
    """
    rest = -np.logaddexp(0.0, at.kappa)  # logarithm of lam / (z + lam)

    def integrand(t: Floats, log_share: Floats, rest: Floats) -> Any:
        small = np.abs(t) < 0.5
        near = np.log1p(np.exp(log_share) * np.expm1(np.where(small, t, 0.0)))
        return np.exp(exponent(t, np.where(small, near, np.logaddexp(rest, log_share + t))))

    start = -np.minimum(np.maximum(length, 0.0), np.maximum(at.kappa, 0.0) + 2 * TINY)
    return integral_between(integrand, start, np.maximum(-length, 0.0), at.log_share, rest)
