"""Integrals over ds / M(s) between two points of one side of 0, as logarithms: nothing overflows on the way.

With u = log(z / lam) and softplus(u) = log(1 + e^u), u + (L-1) softplus(u) = q log|s| - L log lam, and

    log(ds / M du) = (log lam + u)/q - b (log lam + softplus(u)) - log q        b = (L-1)(q-1)/q

Near a point of reference the differences of both sides follow from that of u alone, so that close ends lose no digits. At
lam = 0, u is infinite and its differences are those of log z.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import NamedTuple

import numpy as np

from ._arguments import Floats, exponent_of

ITERATIONS = 2000  # of Newton's methods, which end far sooner
REACH = 100.0  # in u, below which an integrand that falls at least as exp(u/2) has no digit left
CHUNK = 1 << 20  # values of an integrand at a time


class Point(NamedTuple):
    """|s| > 0 on a curve of one q, L and lam."""

    log_s: Floats
    log_lam: Floats
    u: Floats

    @property
    def log_z(self) -> Floats:
        return self.log_lam + self.u


class Curve(NamedTuple):
    """All s of one q and L."""

    q: float
    depth: int

    def point(self, log_s: Floats, lam: Floats) -> Point:
        """u from above, where u + (L-1) softplus(u) is convex."""
        q, n = self.q, self.depth - 1
        log_lam = np.log(lam)
        right = q * log_s - self.depth * log_lam
        u = np.minimum(right, right / self.depth)
        for _ in range(ITERATIONS):
            lower = u - (u + n * softplus(u) - right) / (1 + n * sigmoid(u))
            if not (lower < u).any():
                break
            u = np.fmin(u, lower)
        return Point(log_s, log_lam, u)

    def log_z(self, at: Point) -> Floats:
        """log |w_1|^q."""
        return np.asarray(np.where(at.u == np.inf, self.q / self.depth * at.log_s, at.log_z))

    def log_rest(self, at: Point) -> Floats:
        """log |w_2|."""
        if self.depth == 1:
            return np.zeros_like(at.u)
        of_others = (at.log_s - self.log_z(at) / self.q) / (self.depth - 1)  # lam apart, its digits are those of log_s
        return np.where(at.u > 0, of_others, (at.log_lam + softplus(at.u)) / self.q)

    def log_metric(self, at: Point) -> Floats:
        n = self.depth - 1
        return np.asarray(self.q * n * self.log_rest(at) + np.log1p(n * sigmoid(at.u)))

    def log_metric_derivative(self, at: Point, power: int, coefficients: tuple[float, ...]) -> tuple[Floats, Floats]:
        """log |M^(a) s^a| and its sign, of what `metric_polynomial` says of the a-th derivative."""
        p, r = sigmoid(at.u), sigmoid(-at.u)
        degree = power + len(coefficients) - 1
        terms = (c * p**i * r ** (degree - power - i) for i, c in enumerate(coefficients))
        total = np.asarray(sum(terms))
        log_share = np.log(np.abs(total)) - power * softplus(-at.u) - degree * np.log1p((self.depth - 1) * p)
        return np.asarray(self.log_metric(at) + log_share), np.sign(total)

    def rise(self, of_u: Floats, u: Floats) -> Floats:
        """log s's difference where u goes to u + of_u."""
        return np.asarray((of_u + (self.depth - 1) * softplus_difference(of_u, u)) / self.q)

    def distance(self, log_ratio: Floats, top: Point) -> Floats:
        """The difference in u between `top` and the point at s exp(-log_ratio)."""
        n, right = self.depth - 1, self.q * log_ratio
        down = right / (1 + n * sigmoid(top.u))
        for _ in range(ITERATIONS):
            higher = down - (down - n * softplus_difference(-down, top.u) - right) / (1 + n * sigmoid(top.u - down))
            if not (higher > down).any():
                break
            down = np.fmax(down, higher)
        return down

    def log_integral(self, top: Point, log_ratio: Floats, weight: str | None = None) -> Floats:
        """log of the integral of ds / M(s) from s_0 = s_1 exp(-log_ratio) to s_1, `top`; log_ratio inf: from 0, lam > 0.

        weight: "above" for (s_1 - s) ds / M(s), "below" for (s - s_0) ds / M(s).
        """
        if self.q == 1 and weight is None:
            return self.log_z(top) + np.log(-np.expm1(-self.distance(log_ratio, top)))
        down = self.distance(log_ratio, top)
        points = np.stack([top.log_s, top.log_lam, top.u, down])
        longest = float(np.minimum(down, REACH + np.maximum(top.u, 0) + 10).max(initial=0.0, where=~np.isnan(down)))
        nodes, weights = _rule(max(1, int(np.ceil(np.log2(max(longest, 1e-300) * (self.depth + 2))))))
        size = max(1, CHUNK // (4 * len(nodes)))
        parts = [self._chunk(points[:, i : i + size, None], nodes, weights, weight) for i in range(0, len(down), size)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def _chunk(self, points: Floats, nodes: Floats, weights: Floats, weight: str | None) -> Floats:
        log_s, log_lam, u, down = points
        q, n = self.q, self.depth - 1
        steepness = n * (q - 1)
        peak = -np.log(steepness - 1) if steepness > 2 else 0.0  # of ds / M du if it is below u = 0
        from_0 = np.isinf(down)
        low = np.minimum(peak - u, 0.0)
        down = np.minimum(down, REACH - low)
        middle = np.maximum(low, -down)
        whole = -self.rise(-down, u)
        slopes = (2 / q, n * (2 - q) / q) if weight == "below" else (1 / q, -steepness / q)
        terms = []
        for place, sign, length in (
            (-down, 1, (middle + down) / 2),
            (middle, -1, (middle + down) / 2),
            (middle, 1, -middle / 2),
            (np.zeros_like(u), -1, -middle / 2),
        ):
            # Relative to the point u + place, where the integrand's logarithm is `at`.
            here, to_top = u + place, -self.rise(place, u)
            log_here = log_s - to_top
            log_z = np.where(u == np.inf, q / self.depth * log_here, log_lam + here)
            of_z = log_z + ((2 - q) if weight == "below" else (1 - q)) * log_here
            of_lam = slopes[0] * log_z + slopes[1] * (log_lam + softplus(here))
            at = np.where(here > 0, of_z, of_lam)  # by the one of the two that loses no digits
            move = sign * length * nodes
            bend = softplus_difference(move, here)
            exponent = at + slopes[0] * move + slopes[1] * bend + np.log(length * weights)
            rise = (move + n * bend) / q
            if weight == "above":
                exponent = exponent + log_s + np.log(-np.expm1(rise - to_top))
            elif weight == "below":
                exponent = exponent + np.where(from_0, 0.0, np.log(-np.expm1(-(whole - to_top + rise))))
            terms.append(exponent)
        exponents = np.concatenate(terms, axis=-1)
        largest = np.nan_to_num(exponents.max(axis=-1, keepdims=True), neginf=0.0)
        return np.asarray(largest[..., 0] + np.log(np.exp(exponents - largest).sum(axis=-1)) - np.log(q))


@cache
def metric_polynomial(q: float, depth: int, order: int) -> tuple[int, tuple[float, ...]]:
    """The derivative of M of `order` a at s > 0 is M / s^a Q / (1 + (L-1) p)^(2a), p = sigmoid(u).

    Q is homogeneous, of degree 2a, in p and r = 1 - p, so that neither small p nor small r loses digits: the lowest power of p,
    and the coefficients from there on, none where Q is 0. As s dp/ds = q p r / D, D = 1 + (L-1) p = r + L p, it follows from

        Q_0 = 1        Q_(a+1) = (q (L-1) p (r + D) - a D^2 - 2 a q (L-1) p r) Q_a + q D dQ_a/du

    formed without rounding: at exponent m = 1 leading coefficients cancel.
    """
    power = Fraction(depth, depth - 1) if depth > 1 and exponent_of(q, depth) == 1 else Fraction(q)
    n = power * (depth - 1)
    own = [Fraction(1)]  # by the power of p
    for a in range(order):
        factor = [Fraction(-a), 2 * n - 2 * a * depth - 2 * a * n, depth * n - a * depth**2]
        slope = [Fraction(0)] * (len(own) + 1)
        for i, c in enumerate(own):
            slope[i] += i * c
            slope[i + 1] -= (len(own) - 1 - i) * c
        own = [x + power * y for x, y in zip(_times(factor, own), _times([Fraction(1), Fraction(depth)], slope), strict=True)]
    lowest = next((i for i, c in enumerate(own) if c), len(own))
    return lowest, tuple(map(float, own[lowest:]))


def _times(a: list[Fraction], b: list[Fraction]) -> list[Fraction]:
    result = [Fraction(0)] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            result[i + j] += x * y
    return result


@cache
def _rule(halvings: int) -> tuple[Floats, Floats]:
    """Gauss' rule on intervals of (0, 1) that halve, in two steps, towards 0: nodes and weights."""
    edges = np.append(0.0, 0.5 ** np.arange(halvings, -0.25, -0.5))
    nodes, weights = np.polynomial.legendre.leggauss(16)
    middle, half = (edges[1:] + edges[:-1])[:, None] / 2, np.diff(edges)[:, None] / 2
    return (middle + half * nodes).ravel(), (half * weights).ravel()


def softplus(u: Floats) -> Floats:
    return np.asarray(np.logaddexp(0.0, u))


def sigmoid(u: Floats) -> Floats:
    return np.asarray(np.exp(-softplus(-u)))


def softplus_difference(by: Floats, u: Floats) -> Floats:
    """softplus(u + by) - softplus(u)."""
    small = np.log1p(sigmoid(u) * np.expm1(np.clip(by, -1, 1)))
    return np.where(np.abs(by) < 1, small, np.logaddexp(-softplus(u), by - softplus(-u)))
