"""The theory's integrals have twelve digits: close ends, depths to 1000, balances from 1e-15 to 1e6, all sizes of x."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from mpmath import mp, mpf

from pysteep import theory
from tests.support.exact_theory import DIGITS, Exact

DIGITS_12 = 1e-12
LARGEST, SMALLEST = 1e300, 1e-300  # of results that are compared: farther out a float has fewer digits, or none


@pytest.fixture(autouse=True)
def digits():
    with mp.workdps(DIGITS):
        yield


def agrees(value, exact):
    return abs(mpf(float(value)) - exact) <= DIGITS_12 * abs(exact)


@pytest.mark.parametrize(
    ("x", "y", "q", "depth", "lam", "shown"),
    [
        (2.0, 1.0, 2, 20, 0.01, 0.0156814),
        (2.0, 1.0, 1.5, 64, 0.1**1.5, 0.00539065),
        (1 + 1e-9, 1.0, 2, 2, 0.01, 2.49997e-19),
        (1.0, 2.0, 2, 20, 0.01, None),
        (1.0, 1 + 1e-12, 1.3, 1000, 1e-15, None),
        (-2.0, 1.0, 1.5, 20, 0.3, None),
    ],
)
def test_divergence(x, y, q, depth, lam, shown):
    got, exact = theory.bregman_divergence(x, y, q, depth, lam), Exact(q, depth, lam).divergence(x, y)
    assert agrees(got, exact)
    assert shown is None or got == pytest.approx(shown, rel=1e-5)


@pytest.mark.parametrize(
    ("x", "q", "depth", "lam", "x_0", "shown"),
    [
        (2.0, 2, 20, 0.01, 1.0, 0.0257840),
        (2.0, 2, 64, 0.01, 1.0, 0.00788792),
        (1.7e308, 2, 2, 0.1, 0.0, 356.708),
        (-1e-200, 1.7, 300, 0.3, 1.0, None),
        (1e-300, 1.5, 20, 1e-15, 2.0, None),
    ],
)
def test_mirror_map(x, q, depth, lam, x_0, shown):
    got, exact = theory.mirror_map(x, q, depth, lam, x_0=x_0), Exact(q, depth, lam).mirror(x, x_0)
    assert agrees(got, exact)
    assert shown is None or got == pytest.approx(shown, rel=1e-5)


def test_nothing_is_lost_at_0():
    assert theory.mirror_map(0.0, 2, 64, 1e-11) == 0
    assert theory.potential(0.0, 1.5, 64, 1e-11, x_0=0.4) == 0
    assert theory.bregman_divergence(0.0, 0.0, 1.5, 64, 1e-11) == 0
    assert theory.inverse_mirror_map(0.0, 2, 64, 1e-11) == 0


def test_inverse_mirror_map_returns_from_where_the_map_is_flat():
    for depth in (20, 64):
        y = theory.mirror_map(2.0, 2, depth, 0.01, x_0=1.0)
        assert theory.inverse_mirror_map(y, 2, depth, 0.01, x_0=1.0) == pytest.approx(2, rel=DIGITS_12)
        y = theory.mirror_map(0.5, 2, depth, 0.01, x_0=1.0)
        assert theory.inverse_mirror_map(y, 2, depth, 0.01, x_0=1.0) == pytest.approx(0.5, rel=DIGITS_12)


@pytest.mark.parametrize(("q", "depth", "lam"), [(1, 64, 1e-5), (1, 20, 1e-15), (1.5, 1000, 1e6), (2, 2, 1e-15)])
def test_potential(q, depth, lam):
    got = theory.potential(1.0, q, depth, lam)
    exact = Exact(q, depth, lam).potential(1.0)
    assert agrees(got, exact) if exact > SMALLEST else got < SMALLEST
    assert theory.potential(1.0, 1, 64, 1e-5) == pytest.approx(0.985, rel=1e-3)


def test_inverse_metric_of_deep_products():
    assert theory.inverse_metric(2.0, 2, 500, 0.5) == pytest.approx(1995.67, rel=1e-5)
    for q, depth, lam, x in ((2, 500, 0.5, 2.0), (2, 1000, 0.5, 2.0), (1.1, 1000, 1e-15, 1e200), (1.5, 1000, 1.1, 1e-9)):
        exact = Exact(q, depth, lam)
        assert agrees(theory.inverse_metric(x, q, depth, lam), exact.metric_at(x))
        w = theory.balanced_factors(x, q, depth, lam)
        first, last = (abs(mpf(float(f))) for f in (w[0], w[-1]))
        assert agrees(last**q - first**q, mpf(lam)) or first**q > 1e6 * lam
        assert agrees(first * last ** (depth - 1), mpf(x))


def test_derivatives_of_the_metric():
    """Where terms cancel too: far out at exponent 1, near 0 at q = 1."""

    def second(x, q, depth, lam):
        leaf = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        (first,) = torch.autograd.grad(theory.inverse_metric(leaf, q, depth, lam), leaf, create_graph=True)
        return first.item(), torch.autograd.grad(first, leaf)[0].item()

    for x in (1e-200, 1e-9, 0.03, -2.0, 1e9, 1e90):
        root = mpmath.sqrt(4 * mpf(x) ** 2 + mpf(0.1) ** 2)
        first, last = second(x, 2, 2, 0.1)
        assert agrees(first, 4 * mpf(x) / root)
        assert agrees(last, 4 * mpf(0.1) ** 2 / root**3)
        root = mpmath.sqrt(4 * abs(mpf(x)) + mpf(0.1) ** 2)
        first, last = second(x, 1, 2, 0.1)
        assert agrees(first, 2 * mpmath.sign(x) / root)
        assert agrees(last, -4 / root**3)
    for q, depth, lam, x in ((1.5, 3, 0.1, 0.2), (1.2, 10, 0.5, 1e3), (1.7, 20, 0.8, -1e-4), (1.01, 300, 1e-3, 1.0)):
        exact, step = Exact(q, depth, lam), abs(mpf(x)) / 10**12
        below, at, above = (exact.metric_at(abs(mpf(x)) + side * step) for side in (-1, 0, 1))
        first, last = second(x, q, depth, lam)
        assert agrees(first, mpmath.sign(x) * (above - below) / (2 * step))
        assert agrees(last, (above - 2 * at + below) / step**2)


def test_the_exponent_near_1_keeps_its_digits():
    """1 - m is a difference of numbers near 1."""
    depth = 7
    for q in (depth / (depth - 1) * (1 - 1e-9), depth / (depth - 1) * (1 + 1e-9)):
        excess = 1 - (mpf(q) - 1) * (depth - 1)
        exact = (mpf(2) ** (excess / depth) - mpf(0.5) ** (excess / depth)) / excess
        assert agrees(theory.mirror_map(2.0, q, depth, 0.0, x_0=0.5), exact)
        assert theory.inverse_mirror_map(float(exact), q, depth, 0.0, x_0=0.5) == pytest.approx(2.0, rel=DIGITS_12)
        if excess > 0:
            assert agrees(theory.mirror_map(2.0, q, depth, 0.0), mpf(2) ** (excess / depth) / excess)


def draw(rng):
    """q, L, lam and two numbers, most often near the bend of the metric or near to each other."""
    q = float(rng.choice([1.0, 1.5, 2.0, rng.uniform(1, 2)]))
    depth = int(rng.choice([2, 3, 10, 64, 1000, rng.integers(2, 1001)]))
    lam = 10 ** rng.uniform(-15, 6)
    log_x = rng.uniform(-740, 709)
    if rng.random() < 0.6:
        log_z = math.log(lam) + rng.uniform(-10, 10)
        log_x = (log_z + (depth - 1) * math.log(math.exp(log_z) + lam)) / q
    x = math.exp(min(max(log_x, -740.0), 709.0))
    near = x * (1 + 10 ** rng.uniform(-13, 0))
    y = rng.choice([near, x * 10 ** rng.uniform(-3, 0), 10 ** rng.uniform(-320, 308), 0.0])
    return q, depth, lam, x, float(y) if y < math.inf else x / 2


def check(rng, count):
    compared = 0
    for _ in range(count):
        q, depth, lam, x, y = draw(rng)
        exact = Exact(q, depth, lam)
        other = float(rng.choice([1.0, 1.0, -1.0])) * y
        for got, want, arguments in (
            (theory.mirror_map(x, q, depth, lam, x_0=other), exact.mirror, (x, other)),
            (theory.bregman_divergence(x, other, q, depth, lam), exact.divergence, (x, other)),
            (theory.bregman_divergence(other, x, q, depth, lam), exact.divergence, (other, x)),
            (theory.inverse_metric(x, q, depth, lam), exact.metric_at, (x,)),
        ):
            assert not math.isnan(got)
            if SMALLEST < abs(got) < LARGEST:
                compared += 1
                assert agrees(got, want(*arguments)), (want.__name__, q, depth, lam, x, other, got)
    assert compared > count / 2


def test_random_draws():
    check(np.random.default_rng(0), 6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_random_draws(seed):
    check(np.random.default_rng(seed), 40)


def test_potentials_with_a_base():
    """R(x) is the integral of R' from 0, which has two signs beyond x_0 alone: there its digits are those of -R(x_0)."""
    q, depth, lam, x_0 = 1.7, 40, 1e-4, 0.7
    exact = Exact(q, depth, lam)
    of_base = exact.divergence(0.0, x_0)
    for x in (1e-9, 0.3, 0.7, 0.7 + 1e-9, 2.0, -0.4):
        if x < 0:
            area = abs(mpf(x)) * exact.mirror(x_0) + exact.potential(x)
        elif x < x_0:
            area = -mpf(x) * exact.integral(x, x_0) - exact.divergence(0.0, x)
        else:
            area = exact.divergence(x, x_0) - of_base
        got = theory.potential(x, q, depth, lam, x_0=x_0)
        assert abs(mpf(float(got)) - area) <= DIGITS_12 * (abs(area) + of_base * (x > x_0))


def test_round_trips_of_the_mirror_map():
    """To the digits that the map's value has: x moves by M times its rounding."""
    rng = np.random.default_rng(4)
    for _ in range(60):
        q, depth, lam, x, y = draw(rng)
        x_0 = float(rng.choice([0.0, y, -y]))
        value = theory.mirror_map(x, q, depth, lam, x_0=x_0)
        if not SMALLEST < abs(value) < LARGEST or not SMALLEST < x < LARGEST:
            continue
        back = theory.inverse_mirror_map(value, q, depth, lam, x_0=x_0)
        total = abs(value) + (abs(theory.mirror_map(x_0, q, depth, lam)) if x_0 < 0 else 0.0)
        metric = theory.inverse_metric(x, q, depth, lam)
        moved = 4e-13 * total * metric
        assert metric < SMALLEST or back == math.inf or abs(back - x) <= 1e-12 * x + moved, (q, depth, lam, x, x_0, back)
        assert back < math.inf or moved > 1e-9 * x or metric < SMALLEST


def test_products_of_bounds_do_not_overflow_on_the_way():
    """lam^(L-1) is no float, the product is one."""
    exact = mpf(1e-300) * mpf(3) ** mpf(0.5) / mpf(0.03) ** 250
    assert agrees(theory.convergence_bound(1.5, 251, 0.03, 1e-300, 3.0), exact)
    exact = 2 * mpf(1e3) ** 110 * mpf(1e200) ** -1 * mpf(3)
    assert agrees(theory.convergence_rate(1, 111, 1e3, 3.0, 1e200), exact)
    assert agrees(theory.predicted_balance(1.0, 1.5, 1e-9, 1e-9, 10**9), mp.exp(mpf(1.5) * 10**9 * mp.log(1 - mpf(1e-9) ** 2)))
    a, b = 1.0, 1 + 1e-12
    assert agrees(theory.balance([a, b], 1.7)[0], mpf(b) ** mpf(1.7) - 1)
    assert agrees(theory.hyperbolic_entropy(1.7e308, 1.7e308), mpf(1.7e308) * (mp.asinh(1) - mp.sqrt(2) + 1))
