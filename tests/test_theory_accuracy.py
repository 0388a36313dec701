"""The theory to 12 digits over all of its range, against closed forms by mpmath with as many digits as it takes."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from mpmath import mpf

from pysteep import theory

DIGITS = 1e-12


def power_of_first(x: mpf, q: mpf, depth: int, lam: mpf) -> mpf:
    """z with z (z + lam)^(L-1) = x^q, by Newton's method in log z."""
    wanted = q * mpmath.log(x)
    log_z = min(wanted - (depth - 1) * mpmath.log(lam), wanted / depth)
    for _ in range(300):
        z = mpmath.exp(log_z)
        step = (log_z + (depth - 1) * mpmath.log(z + lam) - wanted) / (1 + (depth - 1) * z / (z + lam))
        log_z -= step
        if abs(step) < mpf(10) ** (5 - mpmath.mp.dps):
            return mpmath.exp(log_z)
    raise AssertionError("no convergence")


class Exact:
    """M, and the integrals of 1 / M and s / M from 0 to x >= 0, as hypergeometric functions of w_1; lam > 0."""

    def __init__(self, x: float, q: float, depth: int, lam: float) -> None:
        self.x, q, lam = mpf(x), mpf(q), mpf(lam)
        self.metric = lam ** (depth - 1)
        self.first = self.second = mpf(0)
        if x == 0:
            return
        z = power_of_first(self.x, q, depth, lam)
        w, ratio, n = z ** (1 / q), -z / lam, depth - 1
        self.metric = (z + lam) ** n + n * z * (z + lam) ** (depth - 2)
        e, d = n * (q - 1) / q, n * (2 - q) / q
        self.first = w * lam**-e * mpmath.hyp2f1(e, 1 / q, 1 + 1 / q, ratio)
        self.second = w**2 / 2 * lam**d * mpmath.hyp2f1(-d, 2 / q, 1 + 2 / q, ratio)


def mirror(x, q, depth, lam, x_0=0.0):
    a, b = (math.copysign(1, v) * Exact(abs(v), q, depth, lam).first for v in (x, x_0))
    return a - b


def potential(x, q, depth, lam, x_0=0.0):
    return mpf(x) * mirror(x, q, depth, lam, x_0) - Exact(abs(x), q, depth, lam).second


def divergence(x, y, q, depth, lam):
    return potential(x, q, depth, lam) - potential(y, q, depth, lam) - mirror(y, q, depth, lam) * (mpf(x) - mpf(y))


def assert_digits(found: float, exact: mpf, digits: float = DIGITS) -> None:
    """Where the value is one of float64's; beyond it is inf or 0."""
    if mpf(2) ** 1020 < abs(exact):
        assert abs(found) > 1e300
    elif abs(exact) < mpf(2) ** -1020:
        assert abs(found) < 1e-300
    else:
        assert abs(mpf(float(found)) / exact - 1) < digits, (found, exact)


@pytest.fixture(autouse=True)
def many_digits():
    with mpmath.workdps(400):
        yield


def test_values_that_cancellation_had_spoilt():
    assert theory.bregman_divergence(2.0, 1.0, 2, 20, 0.01) == pytest.approx(0.0156814, rel=1e-5)
    assert theory.bregman_divergence(2.0, 1.0, 1.5, 64, 0.1**1.5) == pytest.approx(0.00539, rel=1e-3)
    assert theory.bregman_divergence(1 + 1e-9, 1.0, 2, 2, 0.01) == pytest.approx(2.5e-19, rel=1e-4)
    assert theory.mirror_map(2.0, 2, 20, 0.01, x_0=1.0) == pytest.approx(0.025784, rel=1e-5)
    assert theory.mirror_map(2.0, 2, 64, 0.01, x_0=1.0) == pytest.approx(0.00788792, rel=1e-6)
    for depth in (20, 64):
        for x in (2.0, 0.2, 1.0):
            y = theory.mirror_map(x, 2, depth, 0.01, x_0=1.0)
            assert theory.inverse_mirror_map(y, 2, depth, 0.01, x_0=1.0) == pytest.approx(x, rel=DIGITS)
    assert theory.potential(1.0, 1, 64, 1e-5) == pytest.approx(0.985, abs=5e-4)
    assert theory.potential(1.0, 1, 20, 1e-15) == pytest.approx(20 / 21, rel=DIGITS)  # |x|^(2-m) / ((2-m) (1-m) L)
    assert theory.mirror_map(0.0, 2, 64, 1e-11) == 0
    assert theory.mirror_map(1.7e308, 2, 2, 0.1) == pytest.approx(356.7, rel=1e-4)
    assert theory.inverse_metric(2.0, 2, 500, 0.5) == pytest.approx(1995.67, rel=1e-5)
    assert np.isfinite(theory.inverse_metric(2.0, 2, 1000, 0.5))


def draws(count: int, seed: int):
    """(x, y, q, depth, lam): y near x, on its side, across 0 or 0."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        q = float(rng.choice([1.0, 1.001, 1.25, 1.5, 1.9, 2.0, rng.uniform(1, 2)]))
        depth = int(rng.choice([2, 3, 4, 10, 20, 64, 200, 500, 1000]))
        lam = 10 ** rng.uniform(-15, 6)
        x = 10 ** (rng.uniform(-5, 5) if i % 2 else rng.uniform(-300, 300))
        y = x * (1 + 10 ** rng.uniform(-12, 0), 10 ** rng.uniform(-3, 3), -(10 ** rng.uniform(-3, 3)), 0.0)[i % 4]
        yield x, float(y), q, depth, float(lam)


def check(x: float, y: float, q: float, depth: int, lam: float) -> None:
    exact = Exact(x, q, depth, lam)
    assert_digits(theory.inverse_metric(x, q, depth, lam), exact.metric)
    assert_digits(theory.mirror_map(x, q, depth, lam), exact.first)
    assert_digits(theory.potential(x, q, depth, lam), potential(x, q, depth, lam))
    assert_digits(theory.mirror_map(x, q, depth, lam, x_0=y), mirror(x, q, depth, lam, y))
    assert_digits(theory.bregman_divergence(x, y, q, depth, lam), divergence(x, y, q, depth, lam))
    assert_digits(theory.escape_time(x, q, depth, lam), exact.first)
    at = theory.mirror_map(x, q, depth, lam)
    # Where M grows the inverse is as steep as M: a rounding of y moves x by M y / x of it.
    steep = max(1.0, float(min(mpf(1e300), exact.metric * exact.first / exact.x)))
    if 1e-290 < at < 1e290 and steep < 1e3:
        assert_digits(theory.inverse_mirror_map(at, q, depth, lam), exact.x, DIGITS * steep)


@pytest.mark.parametrize("seed", range(6))
def test_random_draws(seed):
    for draw in draws(8, seed):
        check(*draw)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_many_random_draws(seed):
    for draw in draws(20, seed):
        check(*draw)


@pytest.mark.parametrize("depth", [2, 3, 20, 1000])
@pytest.mark.parametrize("q", [1.0, 1.2, 1.5, 2.0])
def test_balance_0(q, depth):
    """The closed forms of M = L |x|^m, with as many digits."""
    m = mpf(q) - mpf(q) / depth
    if abs(m - 1) < 1e-12:
        m = mpf(1)
    for x, y in ((2.0, 1.0), (1 + 1e-9, 1.0), (1e-200, 3e-190), (1e150, 2e90)):
        a, b = mpf(x), mpf(y)
        maps = [mpmath.log(v) / depth if m == 1 else v ** (1 - m) / ((1 - m) * depth) for v in (a, b)]
        seconds = [v ** (2 - m) / ((2 - m) * depth) for v in (a, b)]
        assert_digits(theory.inverse_metric(x, q, depth, 0.0), depth * a**m)
        assert_digits(theory.mirror_map(x, q, depth, 0.0, x_0=y), maps[0] - maps[1])
        exact = a * (maps[0] - maps[1]) - (seconds[0] - seconds[1])
        assert_digits(theory.bregman_divergence(x, y, q, depth, 0.0), exact)
        back = theory.inverse_mirror_map(theory.mirror_map(x, q, depth, 0.0, x_0=y), q, depth, 0.0, x_0=y)
        if m < 1:
            assert back == pytest.approx(x, rel=1e-9)
