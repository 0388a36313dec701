"""The theory's integrals by mpmath, to 25 digits and more: M as it is defined, integrated over log z on short pieces."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import mpmath
import numpy as np
from mpmath import mp, mpf

DIGITS = 50
NODES = 24  # of Gauss' rule on a piece


def _gauss() -> list[tuple[mpf, mpf]]:
    """Nodes and weights by Newton's method from NumPy's."""

    def legendre(x):
        before, value = mpf(1), x
        for k in range(2, NODES + 1):
            before, value = value, ((2 * k - 1) * x * value - (k - 1) * before) / k
        return value, NODES * (x * value - before) / (x * x - 1)

    rule = []
    for start in np.polynomial.legendre.leggauss(NODES)[0]:
        x = mpf(float(start))
        for _ in range(3):
            value, slope = legendre(x)
            x -= value / slope
        rule.append((x, 2 / ((1 - x * x) * legendre(x)[1] ** 2)))
    return rule


with mp.workdps(DIGITS):
    RULE = _gauss()


class Exact:
    """One q, L and lam; every method is to be called with mpmath at 50 digits."""

    def __init__(self, q: float, depth: int, lam: float) -> None:
        self.q, self.depth, self.lam = mpf(q), depth, mpf(lam)

    def log_z(self, x: mpf) -> mpf:
        """Of z (z + lam)^(L-1) = x^q."""
        right = self.q * mpmath.log(x)
        if self.lam == 0:
            return right / self.depth
        t = min(right / self.depth, right - (self.depth - 1) * mpmath.log(self.lam))
        for _ in range(10_000):
            z = mpmath.exp(t)
            step = t + (self.depth - 1) * mpmath.log(z + self.lam) - right
            step /= 1 + (self.depth - 1) * z / (z + self.lam)
            t -= step
            if abs(step) < mpf(10) ** (5 - DIGITS) * (1 + abs(t)):
                return t
        raise AssertionError("Newton's method must end")

    def metric(self, t: mpf) -> mpf:
        z = mpmath.exp(t)
        return (z + self.lam) ** (self.depth - 1) + (self.depth - 1) * z * (z + self.lam) ** (self.depth - 2)

    def metric_at(self, x: float) -> mpf:
        return self.metric(self.log_z(mpf(x)))

    def integral(self, low: float, high: float, weight: Callable[[mpf], mpf] | None = None) -> mpf:
        """Of weight(s) ds / M(s) from low >= 0 to high, which are 0 below z = min(z(high), lam / L) exp(-80)."""
        if low == high:
            return mpf(0)

        def integrand(t):
            z = mpmath.exp(t)
            s = (z * (z + self.lam) ** (self.depth - 1)) ** (1 / self.q)
            value = s / self.q * (1 + (self.depth - 1) * z / (z + self.lam)) / self.metric(t)
            return value if weight is None else value * weight(s)

        end, points = self.log_z(mpf(high)), []
        if self.lam:
            points = [mpmath.log(self.lam), mpmath.log(self.lam / self.depth)]
        start = self.log_z(mpf(low)) if low else min(end, *points) - 80
        centres, edges = [start, end, *points], {start, end}
        for centre in centres:
            for scale in [0, *(2.0**k for k in range(-10, 11, 2))]:
                edges |= {point for point in (centre - scale, centre + scale) if start < point < end}
        total, ordered = mpf(0), sorted(edges)
        for a, b in itertools.pairwise(ordered):
            count = int(min(8, max(1, mpmath.ceil(b - a))))
            half = (b - a) / count / 2
            for i in range(count):
                middle = a + half * (2 * i + 1)
                total += half * mpmath.fsum(w * integrand(middle + half * x) for x, w in RULE)
        return total

    def mirror(self, x: float, x_0: float = 0.0) -> mpf:
        if min(x, x_0) < 0 < max(x, x_0):
            return mpmath.sign(x) * (self.integral(0, abs(x)) + self.integral(0, abs(x_0)))
        size = self.integral(*sorted((abs(x), abs(x_0))))
        return size if x > x_0 else -size

    def divergence(self, x: float, y: float) -> mpf:
        a = abs(mpf(x))
        if min(x, y) < 0 < max(x, y):
            return (
                self.integral(0, abs(x), lambda s: a - s) + a * self.integral(0, abs(y)) + self.integral(0, abs(y), lambda s: s)
            )
        return self.integral(*sorted((abs(x), abs(y))), lambda s: abs(a - s))

    def potential(self, x: float) -> mpf:
        return self.divergence(x, 0.0)
