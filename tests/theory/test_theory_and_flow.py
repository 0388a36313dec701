"""The theory's statements on the simulator's runs."""

from __future__ import annotations

import numpy as np
import pytest

from pysteep import flow, theory

DEPTHS = (2, 3, 10)


def gradient(problem, x):
    """Of the mean squared error."""
    return 2 / problem.k * (problem.Z.T @ (np.asarray(x) @ problem.Z.T - problem.y).T).T


def signed_power(g, q):
    return np.sign(g) * np.abs(g) ** (q - 1)


@pytest.mark.parametrize("q", [1.0, 1.5, 1.7, 2.0])
def test_x_moves_by_the_metric_to_first_order(q):
    """A step is -lr M(x) u(df/dx) [Thm 4.8], with the balance that the run has; the error is of order lr^2."""
    problem, scale = flow.regression(30, 12, 3), 0.6
    errors = []
    for lr in (1e-4, 1e-5):
        at = round(0.3 / lr)
        result = flow.simulate(problem, q=q, depth=list(DEPTHS), scale=scale, lr=lr, steps=at + 1, record=[at], progress=False)
        before, after = result.trajectory
        metric = theory.inverse_metric(before, q, np.array(DEPTHS)[:, None], scale**q)
        expected = -lr * metric * signed_power(gradient(problem, before), q)
        moved = np.abs(expected).max(-1)
        errors.append(np.abs(after - before - expected).max(-1) / moved)
    assert (errors[0] < 0.02).all()
    assert (errors[1] < errors[0] / 5).all()


@pytest.mark.parametrize("decay", [0.0, 0.4])
@pytest.mark.parametrize("q", [1.0, 1.5, 2.0])
def test_the_predicted_balance_is_theorys(q, decay):
    steps, lr = 3000, 1e-4
    options = {"q": q, "depth": [2, 3], "scale": 0.5, "lr": lr, "steps": steps, "weight_decay": decay, "progress": False}
    result = flow.simulate(flow.regression(20, 10, 2), **options)
    expected = theory.predicted_balance(0.5**q, q, lr, decay, steps)
    np.testing.assert_allclose(result.predicted_balance[-1], expected, rtol=1e-12)
    for i, depth in enumerate((2, 3)):
        own = theory.balance([result.first[i], *[result.rest[i]] * (depth - 1)], q)
        np.testing.assert_allclose(own, np.broadcast_to(result.balance[-1, i], own.shape), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(own, np.full_like(own, expected), rtol=5e-3)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("q", [1.0, 1.5, 2.0])
def test_gradients_stay_within_theorem_4_2(q, depth):
    """The integral of |grad f|^2 over a run is at most B^(2-q) (f(x_0) - f(x_T)) / mu; and not far below it at first."""
    problem, scale, lr = flow.regression(40, 10, 2), 0.5, 1e-4
    result = flow.simulate(problem, q=q, depth=depth, scale=scale, lr=lr, steps=20_000, record=2000, progress=False)
    gradients = gradient(problem, result.trajectory)
    integral = np.trapezoid((gradients**2).sum(-1), result.time)
    bound = theory.convergence_bound(q, depth, scale**q, result.loss[0] - result.loss[-1], np.abs(gradients).max())
    assert integral <= bound
    assert integral > 1e-3 * bound


def test_the_loss_decays_at_the_rate_of_theorem_4_2():
    problem, scale, lr = flow.regression(60, 8, 2), 0.7, 1e-3
    constant = 2 / problem.k * np.linalg.eigvalsh(problem.Z.T @ problem.Z)[0]
    for q, depth in ((2.0, 2), (1.5, 2), (1.5, 3)):
        result = flow.simulate(problem, q=q, depth=depth, scale=scale, lr=lr, steps=3000, record=300, progress=False)
        bound = np.abs(gradient(problem, result.trajectory)).max()
        rate = theory.convergence_rate(q, depth, scale**q, constant, bound)
        allowed = result.loss[0] * np.exp(-rate * result.time) * (1 + 10 * lr)
        assert (result.loss <= allowed + 1e-20).all()
        assert result.loss[-1] > 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_limit_of_sign_descent_is_the_same_margin_at_every_depth(seed):
    """Three coordinates, six rows [Thm F.1]; depth 1 goes there slowest."""
    problem = flow.classification(6, 3, 1, seed=seed)
    result = flow.simulate(problem, q=1.0, depth=[1, 2, 3], scale=0.1, lr=1e-3, steps=60_000, record=6, progress=False)
    direction = result.trajectory[1:] / np.abs(result.trajectory[1:]).max(-1, keepdims=True)
    margins = (problem.y * np.matmul(problem.Z, direction[..., None])[..., 0]).min(-1)
    reached = margins / theory.linf_margin(problem.Z, problem.y, 2).margin
    assert (reached <= 1 + 1e-12).all()
    assert (reached[-1] > [0.98, 0.999, 0.999]).all()
    assert (np.diff(reached[:, 0]) > 0).all()
