"""The theory against flows of explicit factors, quadrature of the definitions, mpmath and brute force."""

from __future__ import annotations

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp

from pysteep import theory

GEOMETRIES = list(itertools.product((1.0, 1.5, 2.0), (2, 3, 10)))
BALANCES = (0.0, 0.1, 1.0)


def is_singular(q, depth, lam):
    """0 is out of reach, and the mirror map needs another x_0."""
    return lam == 0 and theory.metric_exponent(q, depth) >= 1


MAPS = [
    (q, depth, lam, x_0)
    for (q, depth), lam, x_0 in itertools.product([*GEOMETRIES, (1.2, 4), (1.3, 1)], BALANCES, (0.0, 0.3))
    if x_0 or not is_singular(q, depth, lam)
]
X = np.array([-3.0, -0.5, -1e-3, 1e-6, 0.02, 0.7, 1.0, 4.0])
ROUNDING = 1e-13
QUADRATURE = 1e-11
INTEGRATION = 1e-6


def signed_power(g, q):
    return np.sign(g) * np.abs(g) ** (q - 1)


def others(w):
    """Products of all factors but one, (L, ...)."""
    return np.stack([np.prod(np.delete(w, i, axis=0), axis=0) for i in range(len(w))])


def integrate(velocity, start, time, **options):
    """States at the end, by an adaptive method of order 8; `velocity` takes and gives arrays of start's shape."""
    start = np.asarray(start, dtype=float)
    solved = solve_ivp(
        lambda _, s: np.asarray(velocity(s.reshape(start.shape))).ravel(),
        (0.0, time),
        start.ravel(),
        method="DOP853",
        **{"rtol": 1e-10, "atol": 1e-13, **options},
    )
    assert solved.success
    return solved.y[:, -1].reshape(start.shape)


@pytest.mark.parametrize(("q", "depth", "m"), [(1, 2, 0.5), (1, 10, 0.9), (1.5, 2, 0.75), (1.5, 3, 1), (2, 2, 1), (2, 4, 1.5)])
def test_metric_exponent_is_the_power_by_which_the_metric_grows(q, depth, m):
    assert theory.metric_exponent(q, depth) == pytest.approx(m)
    large = theory.inverse_metric(np.array([1e12, 1e13]), q, depth, 0.5)
    assert math.log10(large[1] / large[0]) == pytest.approx(m, abs=1e-3)
    assert theory.is_bregman(q, depth) == (m <= 1)


def test_which_geometries_are_bregman():
    depths = np.arange(2, 1000)
    assert theory.is_bregman(1, depths).all()
    assert theory.is_bregman(2.0, depths).tolist() == [True] + [False] * (len(depths) - 1)
    critical = depths / (depths - 1)
    assert (theory.metric_exponent(critical, depths) == 1).all()
    assert not theory.is_bregman(critical[1:] * (1 + 1e-9), depths[1:]).any()
    assert theory.metric_exponent([1.0, 1.5, 2.0], math.inf).tolist() == [1.0, 1.5, 2.0]


@pytest.mark.parametrize(("q", "depth"), [*GEOMETRIES, (1.3, 1), (1.7, 64)])
@pytest.mark.parametrize("lam", BALANCES)
def test_balanced_factors(q, depth, lam):
    w = theory.balanced_factors(X, q, depth, lam)
    assert w.shape == (depth, len(X))
    np.testing.assert_allclose(w.prod(axis=0), X, rtol=ROUNDING)
    np.testing.assert_allclose(theory.balance(w, q), np.full((depth - 1, len(X)), lam), atol=1e-12)
    assert (w[1:] >= 0).all()


@pytest.mark.parametrize(("q", "depth"), GEOMETRIES)
@pytest.mark.parametrize("lam", BALANCES)
def test_metric_is_that_of_the_factors(q, depth, lam):
    """Their velocity dx = sum_i (prod_{j != i} w_j) dw_i, for gradients of both signs."""
    w, g = theory.balanced_factors(X, q, depth, lam), np.random.default_rng(0).normal(size=X.shape)
    velocity = (others(w) * -signed_power(g * others(w), q)).sum(axis=0)
    metric = theory.inverse_metric(X, q, depth, lam)
    np.testing.assert_allclose(velocity, -metric * signed_power(g, q), rtol=1e-11)
    assert (metric >= theory.coercivity(q, depth, lam=lam) * (1 - ROUNDING)).all()
    if depth == 2:
        np.testing.assert_allclose(metric, np.sqrt(4 * np.abs(X) ** q + lam**2), rtol=1e-12)
    if lam == 0:
        np.testing.assert_allclose(metric, depth * np.abs(X) ** theory.metric_exponent(q, depth), rtol=1e-12)


def test_depth_1_is_plain_descent():
    assert (theory.inverse_metric(X, 1.5, 1, [[0.0], [0.3]]) == 1).all()
    for function in (theory.mirror_map, theory.inverse_mirror_map):
        np.testing.assert_allclose(function(X, 1.5, 1, [[0.0], [0.3]]), [X, X], rtol=ROUNDING)
    np.testing.assert_allclose(theory.potential(X, 1.5, 1, [[0.0], [0.3]]), [X**2 / 2] * 2, rtol=ROUNDING)


@pytest.mark.parametrize(("q", "depth"), GEOMETRIES)
@pytest.mark.parametrize("lam", [0.1, 1.0])
def test_flow_of_factors_is_a_straight_line_in_the_mirror_coordinate(q, depth, lam):
    """Under a constant gradient mirror_map(x) moves with constant speed: the factors' flow, integrated."""
    start, g = np.array([0.05, 0.4, 1.0]), np.array([-0.7, -0.5, 0.2])
    time = 0.5 * (theory.mirror_map(1.5, q, depth, lam) - theory.mirror_map(1.0, q, depth, lam))
    w = integrate(lambda w: -signed_power(g * others(w), q), theory.balanced_factors(start, q, depth, lam), time)
    line = theory.mirror_map(start, q, depth, lam) - time * signed_power(g, q)
    np.testing.assert_allclose(theory.inverse_mirror_map(line, q, depth, lam), w.prod(axis=0), rtol=INTEGRATION)
    np.testing.assert_allclose(theory.balance(w, q), np.full((depth - 1, 3), lam), rtol=INTEGRATION)


def by_definition(q, depth, lam, x, start=0.0):
    """Integral of ds / M(s) from start to x by Gauss' rule on 60 intervals, ever shorter towards 0."""
    edges = np.append(start, start + (abs(x) - start) * 0.5 ** np.arange(59, -1, -1))
    nodes, weights = np.polynomial.legendre.leggauss(20)
    middle, half = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2
    return np.sign(x) * half @ (1 / theory.inverse_metric(middle[:, None] + half[:, None] * nodes, q, depth, lam) @ weights)


@pytest.mark.parametrize(("q", "depth"), [*GEOMETRIES, (1.2, 4)])
def test_mirror_map_integrates_the_metric(q, depth):
    for lam in (0.1, 1.0):
        expected = [by_definition(q, depth, lam, x) for x in X]
        np.testing.assert_allclose(theory.mirror_map(X, q, depth, lam), expected, rtol=QUADRATURE)


@pytest.mark.parametrize(("q", "depth"), GEOMETRIES)
def test_mirror_map_integrates_the_metric_of_balance_0(q, depth):
    expected = by_definition(q, depth, 0.0, 2.5, start=0.4)
    for sign in (1, -1):
        got = theory.mirror_map(sign * 2.5, q, depth, 0.0, x_0=sign * 0.4)
        assert got == pytest.approx(sign * expected, rel=1e-9)
    if theory.metric_exponent(q, depth) < 1:
        m = theory.metric_exponent(q, depth)
        expected = np.sign(X) * np.abs(X) ** (1 - m) / (depth * (1 - m))
        np.testing.assert_allclose(theory.mirror_map(X, q, depth, 0.0), expected, rtol=1e-12)


def test_closed_mirror_maps_against_quadrature():
    lam = np.array([1e-4, 0.1, 3.0])[:, None] * np.ones_like(X)
    size = np.abs(X) * np.ones_like(lam)
    for q, depth in [(1.0, 2), (1.0, 3), (1.0, 10), (2.0, 2), (1.5, 1)]:
        numeric = theory.mirror_map(X, q, depth, lam, x_0=1e-300 * np.sign(X))
        np.testing.assert_allclose(theory.mirror_map(X, q, depth, lam), numeric, rtol=1e-12)
        inverse = theory.inverse_mirror_map(numeric, q, depth, lam, x_0=1e-300)
        np.testing.assert_allclose(inverse, np.sign(X) * size, rtol=QUADRATURE)
    np.testing.assert_allclose(theory.mirror_map(X, 2, 2, lam), np.arcsinh(2 * X / lam) / 2, rtol=ROUNDING)
    np.testing.assert_allclose(theory.mirror_map(X, 1, 2, lam), np.sign(X) * (np.sqrt(4 * size + lam**2) - lam) / 2, rtol=1e-8)
    y = theory.mirror_map(X, 1, 5, lam)
    np.testing.assert_allclose(y * (np.abs(y) + lam) ** 4, np.ones_like(lam) * X, rtol=1e-12)


@pytest.mark.parametrize(("q", "depth"), [(1.5, 2), (1.5, 3), (2.0, 3), (1.5, 10), (2.0, 10), (1.1, 11), (1.3, 64)])
def test_mirror_map_is_a_hypergeometric_function(q, depth):
    """|w_1| lam^(-b) 2F1(b, 1/q; 1 + 1/q; -|w_1|^q / lam), b = (L-1)(q-1)/q: balances and weights from tiny to large."""
    exponent, x = (depth - 1) * (q - 1) / q, np.array([1e-30, 1e-9, 1e-3, 1.0, 1e3, 1e6])
    for lam in (1e-6, 1e-2, 10.0):
        got = theory.mirror_map(x, q, depth, lam)
        for w, value in zip(theory.balanced_factors(x, q, depth, lam)[0], got, strict=True):
            z = -(mpmath.mpf(w) ** q) / lam
            expected = w * mpmath.mpf(lam) ** -exponent * mpmath.hyp2f1(exponent, 1 / q, 1 + 1 / q, z)
            assert value == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize(("q", "depth", "lam", "x_0"), MAPS)
def test_inverse_mirror_map(q, depth, lam, x_0):
    singular = is_singular(q, depth, lam)
    x = X[X > 0] if singular else X
    y = theory.mirror_map(x, q, depth, lam, x_0=x_0)
    terms = np.abs(y) + (0 if singular else abs(theory.mirror_map(x_0, q, depth, lam)))  # what y was rounded relative to
    allowed = 1e-10 * np.abs(x) + 1e-14 * terms * theory.inverse_metric(x, q, depth, lam)
    assert (np.abs(theory.inverse_mirror_map(y, q, depth, lam, x_0=x_0) - x) <= allowed).all()
    assert theory.mirror_map(x_0, q, depth, lam, x_0=x_0) == 0
    assert theory.inverse_mirror_map(0.0, q, depth, lam, x_0=x_0) == pytest.approx(x_0, rel=1e-10)
    if singular:
        np.testing.assert_allclose(theory.mirror_map(-x, q, depth, lam, x_0=-x_0), -y, rtol=ROUNDING)
        np.testing.assert_allclose(theory.inverse_mirror_map(-y, q, depth, lam, x_0=-x_0), -x, rtol=1e-12)
        assert theory.mirror_map([0.0, -0.0], q, depth, lam, x_0=x_0).tolist() == [-math.inf] * 2
        assert theory.mirror_map(0.0, q, depth, lam, x_0=-x_0) == math.inf


def test_mirror_map_ends_where_the_potential_is_not_bregman():
    for lam, x_0 in ((0.1, 0.0), (0.0, 0.5)):
        far = theory.mirror_map(1e40, 2, 3, lam, x_0=x_0)
        assert far < theory.mirror_map(1e50, 2, 3, lam, x_0=x_0) * (1 + ROUNDING) < 1.001 * far
        assert theory.inverse_mirror_map([far * 1.01, 1e9], 2, 3, lam, x_0=x_0).tolist() == [math.inf] * 2
        assert 1e2 < theory.inverse_mirror_map(far * 0.999, 2, 3, lam, x_0=x_0) < 1e9
    assert theory.inverse_mirror_map(-10.0, 2, 3, 0.1) == -math.inf
    assert theory.mirror_map(1e300, 2, 3, 0.1) == pytest.approx(math.pi / 2 / math.sqrt(0.1), rel=1e-12)


@pytest.mark.parametrize(("q", "depth", "lam", "x_0"), MAPS)
def test_derivative_of_the_potential_is_the_mirror_map(q, depth, lam, x_0):
    x = np.array([0.02, 0.3, 0.7, 4.0])
    h = 1e-3 * x[:, None] * np.array([-2, -1, 1, 2])
    slope = theory.potential(x[:, None] + h, q, depth, lam, x_0=x_0) @ np.array([1, -8, 8, -1]) / (12 * 1e-3 * x)
    expected = theory.mirror_map(x, q, depth, lam, x_0=x_0)
    np.testing.assert_allclose(slope, expected, rtol=1e-7, atol=1e-8 * np.abs(expected).max())
    assert theory.potential(0.0, q, depth, lam, x_0=x_0) == 0
    np.testing.assert_allclose(
        theory.potential(-x, q, depth, lam, x_0=-x_0), theory.potential(x, q, depth, lam, x_0=x_0), rtol=1e-12
    )


def test_closed_potentials():
    x, x_0 = np.array([0.1, 0.8, 3.0]), 0.3
    np.testing.assert_allclose(theory.potential(x, 1.5, 3, 0.0, x_0=x_0), (x * np.log(x) - x - x * np.log(x_0)) / 3, rtol=1e-12)
    for q, depth in [(1.0, 3), (1.5, 2), (1.5, 10), (2.0, 10)]:
        m = theory.metric_exponent(q, depth)
        lemma = (x ** (2 - m) / (2 - m) - x * x_0 * x_0**-m) / (depth - (depth - 1) * q)
        np.testing.assert_allclose(theory.potential(x, q, depth, 0.0, x_0=x_0), lemma, rtol=1e-11)
    lam, entropy = 0.3, theory.hyperbolic_entropy(X, 0.15) / 2
    np.testing.assert_allclose(theory.potential(X, 2, 2, lam), entropy, rtol=ROUNDING)
    np.testing.assert_allclose(theory.potential(X, 2, 2, lam, x_0=1e-300 * np.sign(X)), entropy, rtol=ROUNDING)
    m_0, w_0 = theory.balanced_factors(x_0, 2, 2, lam)[::-1]
    constant = np.log((m_0 + w_0) / (m_0 - w_0)) / 2
    example = (X * np.arcsinh(2 * X / lam) - np.sqrt(4 * X**2 + lam**2) / 2 + lam / 2) / 2 - X * constant
    np.testing.assert_allclose(theory.potential(X, 2, 2, lam, x_0=x_0), example, atol=1e-14)


def test_hyperbolic_entropy():
    x, beta = np.array([0.0, 1e-9, -0.4, 2.0]), np.array([[1.0], [0.2]])
    with mpmath.workdps(50):
        for value, b, a in zip(theory.hyperbolic_entropy(x, beta).ravel(), np.repeat(beta, 4), np.tile(x, 2), strict=True):
            b, a = mpmath.mpf(b), mpmath.mpf(a)
            expected = a * mpmath.asinh(a / b) - mpmath.sqrt(a * a + b * b) + b
            assert value == pytest.approx(float(expected), rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("q", "depth", "lam"), [(1.0, 3, 0.1), (1.5, 2, 0.0), (1.5, 3, 1.0), (2.0, 2, 0.2), (2.0, 10, 0.5), (1.5, 3, 0.0)]
)
def test_bregman_divergence(q, depth, lam):
    """The integral of R''(s) (x - s) from y to x, summed over the last axis."""
    x, y = np.array([[0.4, 1.3], [0.2, 2.0]]), np.array([0.9, 0.5])
    got = theory.bregman_divergence(x, y, q, depth, lam)
    expected = [
        sum(
            quad(lambda s, a=a: (a - s) / theory.inverse_metric(s, q, depth, lam), b, a)[0] for a, b in zip(row, y, strict=True)
        )
        for row in x
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    assert theory.bregman_divergence(y, y, q, depth, lam) == 0
    assert theory.bregman_divergence(0.0, 0.5, q, depth, lam).shape == ()


@pytest.mark.parametrize(("q", "depth"), GEOMETRIES)
@pytest.mark.parametrize("lam", BALANCES)
def test_escape_time(q, depth, lam):
    x = np.array([-0.3, 0.0, 0.3])
    time = theory.escape_time(x, q, depth, lam)
    assert time[1] == 0
    assert time[0] == time[2]
    if is_singular(q, depth, lam):
        assert time[2] == math.inf
    elif lam == 0:  # 0 is a solution too: from a little after it
        start = 0.01
        end = integrate(
            lambda s: theory.inverse_metric(s, q, depth, lam), start, time[2] - theory.escape_time(start, q, depth, 0)
        )
        assert float(end) == pytest.approx(0.3, rel=1e-7)
    else:
        end = integrate(lambda s: theory.inverse_metric(s, q, depth, lam), 0.0, time[2], atol=1e-20)
        assert float(end) == pytest.approx(0.3, rel=1e-6)


def test_the_same_start_escapes_faster_at_smaller_q():
    """s = 0.1 gives lam = s^q [Cor. 4.10]."""
    scale, q = 0.1, np.array([1.0, 1.5, 2.0])
    times = theory.escape_time(0.1, q, 3, scale**q)
    assert times[0] < times[1] < times[2]
    np.testing.assert_allclose(theory.coercivity(q, 3, scale=scale), theory.inverse_metric(0.0, q, 3, scale**q), rtol=1e-12)
    np.testing.assert_allclose(theory.coercivity(q, 3, scale=scale), theory.coercivity(q, 3, lam=scale**q), rtol=1e-12)
    assert theory.coercivity(q, 1, lam=0.0).tolist() == [1.0] * 3


@pytest.mark.parametrize(("q", "depth"), GEOMETRIES)
def test_predicted_balance_of_a_flow_with_decay(q, depth):
    """Against the flow of factors with any start, and to first order in lr against descent."""
    rng = np.random.default_rng(1)
    w, g, decay, time = rng.uniform(0.6, 1.0, (depth, 4)), np.array([-0.3, 0.2, -0.1, 0.05]), 0.6, 0.4
    before = theory.balance(w, q)
    after = theory.balance(integrate(lambda w: -signed_power(g * others(w), q) - decay * w, w, time), q)
    np.testing.assert_allclose(after, before * math.exp(-q * decay * time), rtol=1e-6, atol=1e-9)
    errors = []
    for steps in (100, 1000):
        lr, v = time / steps, w
        for _ in range(steps):
            v = v - lr * signed_power(g * others(v), q) - lr * decay * v
        predicted = theory.predicted_balance(before, q, lr, decay, steps)
        errors.append(np.abs(theory.balance(v, q) - predicted).max())
        np.testing.assert_allclose(predicted, after, rtol=2 * q * lr)
    assert errors[1] < errors[0] / 5 + 1e-12


def test_predicted_balance_of_schedules():
    initial = np.array([[0.2, -0.4]])
    lr, decay = [0.1, 0.2, 0.3], [1.0, 0.0, 0.5]
    expected = initial * (0.9 * 1.0 * 0.85) ** 1.5
    np.testing.assert_allclose(theory.predicted_balance(initial, 1.5, lr, decay, 3), expected, rtol=ROUNDING)
    np.testing.assert_allclose(theory.predicted_balance(initial, 1, lr, 1.0, 3), initial * 0.9 * 0.8 * 0.7, rtol=ROUNDING)
    assert theory.predicted_balance(0.3, 2, 0.1, 0.5, 0) == 0.3


@pytest.mark.parametrize("depth", [1, 2, 3, 10])
@pytest.mark.parametrize("q", [1.0, 1.25, 1.5, 2.0])
def test_decoupled_decay_adds_the_manifold_regularizer(q, depth):
    """Balanced factors under w <- w (1 - lr): velocity of the mirror coordinate is minus the regularizer's gradient."""
    x = np.array([-2.0, -0.4, 0.3, 1.5])
    w = theory.balanced_factors(x, q, depth, 0.0)
    velocity = (others(w) * -w).sum(axis=0) / theory.inverse_metric(x, q, depth, 0.0)
    h = 1e-5
    near = np.stack([x + h * np.eye(4), x - h * np.eye(4)])
    gradient = -np.subtract(*theory.manifold_regularizer(near, q, depth)) / (2 * h)
    np.testing.assert_allclose(gradient, velocity, rtol=1e-7)
    paper = depth / (depth * (2 - q) + q) * (np.abs(x) ** (2 - q * (depth - 1) / depth)).sum()
    assert theory.manifold_regularizer(x, q, depth) == pytest.approx(paper, rel=1e-12)


def test_manifold_regularizer_of_infinite_depth():
    x = np.array([0.5, -3.0])
    assert theory.manifold_regularizer(x, 2, math.inf) == pytest.approx(np.log(np.abs(x)).sum())
    assert theory.manifold_regularizer(x, 1, math.inf) == pytest.approx(np.abs(x).sum())
    assert theory.manifold_regularizer(x, 1.5, math.inf) == pytest.approx(2 * np.sqrt(np.abs(x)).sum())
    assert theory.manifold_regularizer(0.0, 2, math.inf) == -math.inf


@pytest.mark.parametrize(("q", "depth"), [*GEOMETRIES, (1.5, 1)])
def test_coupled_decay_adds_the_coupled_regularizer(q, depth):
    """Its steps of balanced factors are those for the loss plus c/2 of it."""
    x, g, c = np.array([-2.0, -0.4, 0.3, 1.5]), np.array([0.5, -0.2, 0.1, 1.0]), 0.7
    w = theory.balanced_factors(x, q, depth, 0.0)
    assert theory.coupled_regularizer(x, depth) == pytest.approx((w**2).sum(), rel=1e-12)
    h = 1e-5
    near = np.stack([x + h * np.eye(4), x - h * np.eye(4)])
    gradient = g - c / 2 * np.subtract(*theory.coupled_regularizer(near[::-1], depth)) / (2 * h)
    np.testing.assert_allclose(signed_power(g * others(w) + c * w, q), signed_power(gradient * others(w), q), rtol=1e-6)
    unbalanced = w * np.exp(np.linspace(-1, 1, depth) if depth > 1 else np.zeros(1))[:, None]
    assert (unbalanced**2).sum() >= theory.coupled_regularizer(x, depth) * (1 - ROUNDING)


@pytest.mark.parametrize(("q", "depth"), [(1.0, 1), (1.0, 3), (1.0, 10), (1.5, 2), (1.5, 3), (2.0, 1), (2.0, 2)])
def test_convergence_on_a_quadratic(q, depth):
    """The flow of f(x) = sum a_l (x_l - c_l)^2 / 2 from 0: the integral's bound, and the rate all along."""
    a, c, scale = np.array([1.0, 0.4]), np.array([0.5, -0.3]), 0.8
    lam = scale**q

    def flow(state):
        g = a * (state[:2] - c)
        return np.array([*(-theory.inverse_metric(state[:2], q, depth, lam) * signed_power(g, q)), g @ g])

    loss = [float(a @ c**2) / 2]
    state, span = np.zeros(3), 0.1
    bound = float(np.abs(a * c).max())
    rate = theory.convergence_rate(q, depth, lam, a.min(), bound)
    for _ in range(4):
        state = integrate(flow, state, span, max_step=span / 20) if q > 1 else euler(flow, state, span)
        loss.append(float(a @ (state[:2] - c) ** 2) / 2)
        assert loss[-1] <= loss[0] * math.exp(-rate * span * (len(loss) - 1)) + 1e-6
        assert loss[-1] <= loss[-2] + 1e-5
    most = theory.convergence_bound(q, depth, lam, loss[0] - loss[-1], bound)
    assert 0.05 * most < state[2] <= most * (1 + 1e-3)


def euler(velocity, state, time, steps=250):
    """For a velocity that jumps: the sign of a gradient that gets to 0."""
    for _ in range(steps):
        state = state + time / steps * velocity(state)
    return state


def test_convergence_is_exact_for_gradient_descent_of_a_parabola():
    """f = a x^2 / 2 decays at the rate 2a, and the integral of |f'|^2 is f(x_0)."""
    a, x_0, time = 0.7, 1.3, 2.0
    x = float(integrate(lambda x: -a * x, x_0, time))
    rate = theory.convergence_rate(2, 1, 0.0, a, a * x_0)
    assert (x / x_0) ** 2 == pytest.approx(math.exp(-rate * time), rel=1e-8)
    assert theory.convergence_bound(2, 1, 0.0, a * x_0**2 / 2, 9.0) == a * x_0**2 / 2
    assert theory.convergence_bound(1.5, 3, 0.0, 1.0, 1.0) == math.inf
    assert theory.convergence_bound(1, 3, 0.5, 2.0, 3.0) == pytest.approx(3 * 2 / 0.25)


@pytest.mark.parametrize("q", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("depth", [2, 3])
def test_steepest_reparameterization_pushes_its_flow_to_the_mirror_flow(q, depth):
    lam = 0.2
    x_of_w, w_of_x = theory.steepest_reparameterization(lambda s: 1 / theory.inverse_metric(s, q, depth, lam), q)
    x = np.array([-1.5, -0.2, 0.0, 1e-3, 2.0])
    w = w_of_x(x)
    np.testing.assert_allclose(x_of_w(w), x, rtol=1e-9, atol=1e-12)
    # dw = -u(df/dw), df/dw = f'(x) dx/dw: the velocity of x by the chain rule, and the flow over some time.
    h, g = 1e-5, np.array([0.3, -0.7, 1.0, -1.0, 0.5])
    slope = (x_of_w(w + h) - x_of_w(w - h)) / (2 * h)
    np.testing.assert_allclose(
        slope * -signed_power(g * slope, q), -theory.inverse_metric(x, q, depth, lam) * signed_power(g, q), rtol=2e-4
    )


def test_flow_of_the_reparameterization():
    """Its own flow under a constant gradient, by four steps of Runge and Kutta, is a straight line in the mirror coordinate."""
    q, depth, lam, time, steps, h = 1.5, 2, 0.2, 0.2, 4, 1e-5
    x_of_w, w_of_x = theory.steepest_reparameterization(lambda s: 1 / theory.inverse_metric(s, q, depth, lam), q)
    x, g = np.array([0.5, -0.8]), np.array([-0.4, 0.6])

    def velocity(w):
        return -signed_power(g * (x_of_w(w + h) - x_of_w(w - h)) / (2 * h), q)

    w, dt = w_of_x(x), time / steps
    for _ in range(steps):
        k = [velocity(w)]
        for share in (0.5, 0.5, 1.0):
            k.append(velocity(w + share * dt * k[-1]))
        w = w + dt / 6 * (k[0] + 2 * k[1] + 2 * k[2] + k[3])
    line = theory.mirror_map(x, q, depth, lam) - time * signed_power(g, q)
    np.testing.assert_allclose(x_of_w(w), theory.inverse_mirror_map(line, q, depth, lam), rtol=1e-7)


def test_reparameterization_of_a_balanced_product_is_its_power():
    """At lam = 0: x = (w L^(1/q - 1))^L. And R = x log x - x on x > 0 at q = 2 is x = w^2 / 4."""
    q, depth = 1.5, 2
    x_of_w, w_of_x = theory.steepest_reparameterization(lambda s: 1 / theory.inverse_metric(s, q, depth, 0.0), q)
    w = np.array([0.2, 1.0, 2.5])
    np.testing.assert_allclose(x_of_w(w), (w * depth ** (1 / q - 1)) ** depth, rtol=1e-7)
    assert x_of_w(-0.7) == pytest.approx(-x_of_w(0.7), rel=1e-12)
    x_of_w, w_of_x = theory.steepest_reparameterization(lambda x: 1 / x, 2, x_0=1.0, domain=(0.0, math.inf))
    np.testing.assert_allclose(x_of_w(w - 2), w**2 / 4, rtol=1e-9)
    np.testing.assert_allclose(w_of_x(w), 2 * np.sqrt(w) - 2, rtol=1e-10, atol=1e-12)
    assert x_of_w(-2.5) == 0.0
    got = w_of_x(torch.tensor([1.0, 4.0]))
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx([0.0, 2.0])
    with pytest.raises(ValueError, match=r"x must lie inside the domain \(0.0, inf\); got -1.0"):
        w_of_x([1.0, -1.0])


def test_linf_margin_against_brute_force():
    rng = np.random.default_rng(3)
    Z = rng.normal(size=(6, 2))
    y = np.sign(Z @ [1.0, 0.3])
    found = theory.linf_margin(Z, y, 3)
    side = np.linspace(-1, 1, 4001)
    box = np.concatenate([[side, np.full_like(side, s)][:: 1 if flip else -1] for s in (-1, 1) for flip in (0, 1)], axis=1)
    margins = (y[:, None] * (Z @ box)).min(axis=0)
    assert margins.max() <= found.margin * (1 + 1e-9)
    assert margins.max() == pytest.approx(found.margin, abs=2e-3)
    np.testing.assert_allclose(found.direction, box[:, margins.argmax()], atol=2e-3)
    assert np.abs(found.direction).max() == 1
    x = found.direction / found.margin
    assert (y * (Z @ x)).min() == pytest.approx(1)
    for depth in (1, 2, 10):
        other = theory.linf_margin(Z, y, depth)
        assert (other.direction == found.direction).all()
        assert other.objective == pytest.approx((np.abs(x) ** (2 / depth)).max())


def test_sign_descent_goes_to_the_linf_margin():
    """Of the factors w_1 w_2, on the exponential loss [Thm F.1]: the margin it has reached."""
    rng = np.random.default_rng(5)
    Z = rng.normal(size=(8, 3))
    y = np.sign(Z @ [1.0, -0.5, 0.2])
    best, w = theory.linf_margin(Z, y, 2), np.array([[0.0] * 3, [0.1] * 3])
    for _ in range(20000):
        losses = -y * (Z @ w.prod(axis=0))
        g = -(np.exp(losses - losses.max()) * y) @ Z
        w = w - 1e-3 * np.sign(g * others(w))
    x = w.prod(axis=0) / np.abs(w.prod(axis=0)).max()
    assert 0.97 * best.margin < (y * (Z @ x)).min() <= best.margin * (1 + 1e-9)


CALLS = {
    "inverse_metric": {"x": 0.3, "q": 1.5, "depth": 3, "lam": 0.1},
    "mirror_map": {"x": 0.3, "q": 1.5, "depth": 3, "lam": 0.1},
    "inverse_mirror_map": {"y": 0.3, "q": 1.5, "depth": 3, "lam": 0.1},
    "potential": {"x": 0.3, "q": 1.5, "depth": 3, "lam": 0.1},
    "escape_time": {"x": 0.3, "q": 1.5, "depth": 3, "lam": 0.1},
    "metric_exponent": {"q": 1.5, "depth": 3},
    "hyperbolic_entropy": {"x": 0.3, "beta": 0.1},
    "convergence_bound": {"q": 1.5, "depth": 3, "lam": 0.1, "loss_gap": 1.0, "gradient_bound": 2.0},
    "convergence_rate": {"q": 1.5, "depth": 3, "lam": 0.1, "pl_constant": 1.0, "gradient_bound": 2.0},
}


@pytest.mark.parametrize("name", CALLS)
def test_numbers_arrays_and_tensors(name):
    function, arguments = getattr(theory, name), CALLS[name]
    number = function(**arguments)
    assert isinstance(number, float)
    for key in arguments:
        value = arguments[key]
        as_array = function(**{**arguments, key: np.full((2, 1), value)})
        assert isinstance(as_array, np.ndarray)
        np.testing.assert_allclose(as_array, np.full((2, 1), number), rtol=1e-13)
        as_tensor = function(**{**arguments, key: torch.full((2, 1), value, dtype=torch.float64)})
        assert as_tensor.dtype == torch.float64
        torch.testing.assert_close(as_tensor, torch.full((2, 1), number, dtype=torch.float64), rtol=1e-13, atol=0)
    two = {key: np.array([value, value])[(slice(None),) + (None,) * i] for i, (key, value) in enumerate(arguments.items())}
    assert function(**two).shape == (2,) * len(arguments)
    tensor = function(**{**arguments, next(iter(arguments)): torch.tensor(1.5, dtype=torch.bfloat16)})
    assert tensor.shape == ()
    assert tensor.dtype == torch.float64


def test_every_element_has_its_own_geometry():
    x, q = np.array([0.3, -0.2, 0.0]), np.array([[1.0], [1.5], [2.0]])
    depth, lam = np.array([1, 2, 3])[:, None, None], np.array([0.0, 0.2])[:, None, None, None]
    got = theory.inverse_metric(x, q, depth, lam)
    assert got.shape == (2, 3, 3, 3)
    for i, j, k in itertools.product(range(2), range(3), range(3)):
        np.testing.assert_array_equal(got[i, j, k], theory.inverse_metric(x, q[k, 0], int(depth[j, 0, 0]), lam[i, 0, 0, 0]))
    assert theory.inverse_metric(np.zeros((0, 3)), 1.5, 2, 0.1).shape == (0, 3)
    assert theory.mirror_map(np.zeros((0, 3)), 1.5, 2, 0.1).shape == (0, 3)


def test_other_results_are_tensors_too():
    x = torch.tensor([0.3, -0.4])
    w = theory.balanced_factors(x, 1.5, 3, 0.2)
    assert w.shape == (3, 2)
    for got in (
        w,
        theory.balance([w[0], w[1], w[2]], 1.5),
        theory.balance(w, 1.5),
        theory.predicted_balance(x, 1.5, 0.1, 0.1, 3),
        theory.bregman_divergence(x, -x, 1.5, 3, 0.2),
        theory.manifold_regularizer(x, 1.5, 3),
        theory.coupled_regularizer(x, 3),
        theory.coercivity(torch.tensor(1.5), 3, scale=0.1),
        theory.linf_margin(torch.eye(2), torch.ones(2), 2).direction,
    ):
        assert isinstance(got, torch.Tensor)
        assert got.dtype == torch.float64
    torch.testing.assert_close(theory.balance(w, 1.5), torch.full((2, 2), 0.2, dtype=torch.float64))
    assert theory.is_bregman(torch.tensor([1.0, 2.0]), 3).tolist() == [True, False]
    assert theory.balance([0.5, 1.0, 2.0], 2).tolist() == [0.75, 3.75]
    assert theory.manifold_regularizer(2.0, 1, 2) == pytest.approx(2**1.5 / 1.5)


GEOMETRY = {"x": 0.3, "q": 1.5, "depth": 3, "lam": 0.1}
BAD = [
    ({"q": 0.9}, r"^q must be a number in \[1, 2\]; got 0.9$"),
    ({"q": [1.0, 2.1]}, r"^q must be .* got 2.1$"),
    ({"q": "1"}, "^q must be .* got '1'$"),
    ({"q": math.nan}, "^q must be .* got nan$"),
    ({"q": 1.5j}, "^q must be"),
    ({"depth": 0}, "^depth must be an integer >= 1; got 0.0$"),
    ({"depth": 2.5}, "^depth must be an integer >= 1; got 2.5$"),
    ({"depth": math.inf}, "^depth must be an integer >= 1; got inf$"),
    ({"depth": True}, "^depth must be an integer >= 1; got True$"),
    ({"depth": [2, True]}, r"^depth must be an integer >= 1; got \[2, True\]$"),
    ({"x": [[0.5], [1.0, False]]}, r"^x must be a finite number; got \[\[0.5\], \[1.0, False\]\]$"),
    ({"lam": -1e-9}, "^lam must be a finite number >= 0; got -1e-09$"),
    ({"lam": torch.tensor(math.inf)}, "^lam must be a finite number >= 0; got inf$"),
    ({"x": [0.1, math.nan]}, "^x must be a finite number; got nan$"),
    ({"x": None}, "^x must be a finite number; got None$"),
    ({"x": np.ones(2), "lam": np.ones(3)}, r"^shapes must broadcast; got x \(2,\), q \(\), depth \(\), lam \(3,\)"),
]


@pytest.mark.parametrize(
    "function", [theory.inverse_metric, theory.mirror_map, theory.potential, theory.balanced_factors, theory.escape_time]
)
@pytest.mark.parametrize(("bad", "message"), BAD, ids=str)
def test_bad_geometry_is_named(function, bad, message):
    with pytest.raises(ValueError, match=message):
        function(**{**GEOMETRY, **bad})


Z = np.array([[1.0, 0.0], [0.0, 1.0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.metric_exponent(1.5, 2.5), "^depth must be an integer >= 1 or inf; got 2.5"),
        (lambda: theory.mirror_map(0.3, 1.5, 3, 0.0), "^x_0 must be another number than 0 where lam = 0 and .*; got 0.0"),
        (lambda: theory.inverse_mirror_map(0.3, 2, 2, 0), "^x_0 must be another number than 0"),
        (lambda: theory.mirror_map([0.1, -0.3], 2, 3, 0.0, x_0=0.1), "^x must have the sign of x_0 where .*; got -0.3"),
        (lambda: theory.potential(0.3, 2, 2, 0.0, x_0=-0.1), "^x must have the sign of x_0 where .*; got 0.3"),
        (lambda: theory.bregman_divergence(0.3, 0.0, 2, 2, 0.0), "^y must be another number than 0"),
        (lambda: theory.bregman_divergence(0.3, -0.1, 2, 2, 0.0), "^x must have the sign of y"),
        (lambda: theory.balanced_factors(0.3, 1.5, [2, 3], 0.1), r"^depth must be one integer; got shape \(2,\)"),
        (lambda: theory.coercivity(1.5, 2), "^lam or scale must be given, not both; got lam None, scale None"),
        (lambda: theory.coercivity(1.5, 2, lam=0.1, scale=0.1), "^lam or scale must be given, not both"),
        (lambda: theory.coercivity(1.5, 2, scale=0.0), "^scale must be a finite number > 0; got 0.0"),
        (lambda: theory.balance([], 1.5), "^factors must be one or more of one shape"),
        (lambda: theory.balance([np.ones(2), np.ones(3)], 1.5), "^factors must be one or more of one shape"),
        (lambda: theory.balance(np.ones((0, 3)), 1.5), r"^factors must be an array \(L, ...\) with L >= 1; got shape \(0, 3\)"),
        (lambda: theory.balance(np.ones((2, 3)), [1.0, 1.5]), "^shapes must broadcast"),
        (lambda: theory.balance(np.ones((2, 3)), 3), "^q must be"),
        (lambda: theory.predicted_balance(0.1, 1.5, 0.1, 0.1, -1), "^steps must be an int >= 0; got -1"),
        (lambda: theory.predicted_balance(0.1, 1.5, 0.1, 0.1, 2.0), "^steps must be an int >= 0; got 2.0"),
        (
            lambda: theory.predicted_balance(0.1, 1.5, [0.1, 0.2], 0.1, 3),
            r"^lr must be one number or one for each of 3 steps; got",
        ),
        (lambda: theory.predicted_balance(0.1, 1.5, 0.1, [-0.1], 1), "^weight_decay must be a finite number >= 0; got -0.1"),
        (lambda: theory.hyperbolic_entropy(0.3, 0.0), "^beta must be a finite number > 0; got 0.0"),
        (lambda: theory.convergence_bound(1, 2, 0.1, -1.0, 1.0), "^loss_gap must be a finite number >= 0; got -1.0"),
        (lambda: theory.convergence_bound(1, 2, 0.1, 1.0, 0.0), "^gradient_bound must be a finite number > 0; got 0.0"),
        (lambda: theory.convergence_rate(1, 2, 0.1, 0.0, 1.0), "^pl_constant must be a finite number > 0; got 0.0"),
        (lambda: theory.steepest_reparameterization(np.cosh, 3), "^q must be"),
        (lambda: theory.steepest_reparameterization(np.cosh, [1, 2]), "^q and x_0 must be single numbers"),
        (
            lambda: theory.steepest_reparameterization(np.cosh, 2, domain=(0, 1)),
            r"^x_0 must lie inside the domain \(0, 1\); got 0",
        ),
        (lambda: theory.linf_margin(np.ones(3), np.ones(3), 2), r"^Z must be of shape \(k, n\) with k, n >= 1; got \(3,\)"),
        (lambda: theory.linf_margin(Z, np.ones(3), 2), r"^y must be of shape \(2,\), one label for each row of Z; got \(3,\)"),
        (lambda: theory.linf_margin(Z, [1, 0], 2), "^y must be of -1 and 1; got 0.0"),
        (lambda: theory.linf_margin(Z, [1, 1], [2, 3]), "^depth must be one integer"),
        (lambda: theory.linf_margin([[1.0, 2.0], [2.0, 4.0]], [1, -1], 2), "^Z must be separated by y"),
    ],
)
def test_other_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_function_must_be_one():
    with pytest.raises(TypeError, match="second_derivative must be a function; got 3"):
        theory.steepest_reparameterization(3, 2)


def freed():
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (lambda: torch.eye(3).to_sparse(), r"dense \(torch.strided\); got torch.sparse_coo: call .to_dense\(\) on it"),
        (lambda: torch.eye(3).to_sparse().requires_grad_(), r"dense \(torch.strided\); got torch.sparse_coo"),
        (lambda: torch.ones(3, device="meta"), "hold its own memory; got one on meta that has none"),
        (freed, "hold its own memory; got one on cpu that has none"),
        (lambda: torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), "dense .*; got a nested tensor"),
    ],
)
def test_tensors_that_cannot_be_read_are_named(tensor, message):
    for call, name in (
        (lambda t: theory.inverse_metric(t, 1.5, 3, 0.1), "x"),
        (lambda t: theory.metric_exponent(1.5, t), "depth"),
        (lambda t: theory.balance([t, t], 1.5), "factors"),
        (lambda t: theory.coupled_regularizer(t, 2), "x"),
    ):
        with pytest.raises(TypeError, match=f"^{name} must (be )?{message}"):
            call(tensor())


def test_tensors_of_other_kinds_of_numbers_are_named():
    for tensor in (
        torch.ones(3, dtype=torch.bool),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3, dtype=torch.complex64).conj(),
    ):
        with pytest.raises(ValueError, match=r"^x must be a finite number; got tensor"):
            theory.inverse_metric(tensor, 1.5, 3, 0.1)


def test_torch_func_is_refused():
    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(TypeError, match=r"^x must not be a tensor inside torch.func, .*: use torch.autograd"):
            transform(lambda x: theory.potential(x, 1.5, 3, 0.1).sum())(torch.ones(3))
