"""Every home of diagonal_flow against the definition, and the definition against torch's own training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pysteep import SteepestDescent, flow
from pysteep.kernels.reference import diagonal_flow as reference
from tests.support.cases import cpu_homes, home_of

HOMES = [home for home in cpu_homes() if home != "reference"]
ROUNDINGS = {"float32": 3e-5, "float64": 1e-13}
"""Relative to the largest factor, after a few steps: sums of k or n products in another order."""


def simulate(home, problem, **options):
    with home_of(home) as backend:
        return flow.simulate(problem, backend=backend, progress=False, **options)


def problem_of(loss, reduction="mean", seed=(0, 1), k=13, n=21):
    make = flow.regression if loss == "mse" else flow.classification
    return make(k, n, 3, seed, reduction=reduction)


def close(result, expected, dtype):
    for name in ("first", "rest"):
        mine, right = getattr(result, name), getattr(expected, name)
        assert np.abs(mine - right).max() <= ROUNDINGS[dtype] * max(1.0, np.abs(right).max()), name


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("loss", ["mse", "exponential"])
@pytest.mark.parametrize("optimizer", ["steepest", "adam"])
@pytest.mark.parametrize("home", HOMES)
def test_against_the_definition(home, optimizer, loss, batch_size, dtype):
    """All powers and depths in one call, decay of both kinds on; every run on its own problem and with its own draws."""
    options = {
        "q": np.array([1.5, 2.0, 1.7])[:, None, None] if optimizer == "steepest" else 1.0,
        "depth": [[1], [2], [3], [10], [17]],
        "scale": 0.7,
        "lr": np.array([0.01, 0.003]),
        "weight_decay": 0.3,
        "coupled_weight_decay": [0.0, 0.2],
        "seed": [5, 2**33 + 1],
        "steps": 6,
        "batch_size": batch_size,
        "optimizer": optimizer,
        "dtype": dtype,
    }
    problem = problem_of(loss, "mean" if dtype == "float64" else "sum")
    close(simulate(home, problem, **options), simulate("reference", problem, **options), dtype)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 40), (40, 1), (16, 16), (80, 100), (130, 257), (7, 1100)])
@pytest.mark.parametrize("home", HOMES)
def test_any_size(home, sizes):
    k, n = sizes
    problem = flow.regression(k, n, 1)
    for batch_size in (None, 2):
        options = {"q": [1.0, 2.0], "depth": 3, "scale": 0.5, "lr": 1e-4, "steps": 3, "batch_size": batch_size}
        close(simulate(home, problem, **options), simulate("reference", problem, **options), "float64")


def test_philox_gives_the_published_words():
    """Known answers of Random123, philox4x32-10: counter and key 0; and the first word of the next counter differs."""
    assert [hex(word) for word in reference.words(0, 0, 4)] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    long = reference.words(7, 3, 9)
    assert list(long[:5]) == list(reference.words(7, 3, 5))
    assert len(set(long)) == 9


@pytest.mark.parametrize("home", HOMES)
def test_draws_are_those_of_the_definition(home):
    """One step at depth 1 from 0 on an identity: x moves where a row was drawn, as often as it was."""
    k = 30
    problem = flow.Problem(np.eye(k), np.full(k, 0.5), reduction="sum")
    for seed in (0, 1, 2**40 + 3):
        result = simulate(home, problem, q=2, depth=1, lr=1.0, steps=1, batch_size=11, seed=seed)
        counts = np.bincount(reference.drawn_rows(seed, 0, 11, k).numpy(), minlength=k)
        assert np.array_equal(result.x, counts)


def test_rows_are_drawn_evenly():
    rows = torch.cat([reference.drawn_rows(3, step, 100, 7) for step in range(1000)])
    counts = torch.bincount(rows, minlength=7).double()
    expected = len(rows) / 7
    assert ((counts - expected) ** 2 / expected).sum() < 22.5  # the 99.9 % quantile of chi-squared with 6 degrees of freedom


class Diagonal(nn.Module):
    """Explicit factors, from the saddle."""

    def __init__(self, n, depth, scale):
        super().__init__()
        starts = [0.0] + [scale] * (depth - 1)
        self.factors = nn.ParameterList(nn.Parameter(torch.full((n,), start, dtype=torch.float64)) for start in starts)

    def forward(self, Z):
        """Predictions."""
        x = self.factors[0]
        for w in self.factors[1:]:
            x = x * w
        return Z @ x


OPTIMIZERS = {
    "steepest": lambda q, decays: lambda factors: SteepestDescent(factors, lr=0.01, q=q, **decays),
    "adam": lambda _, decays: lambda factors: torch.optim.Adam(factors, lr=0.01, weight_decay=decays["coupled_weight_decay"]),
    "adamw": lambda _, decays: lambda factors: torch.optim.AdamW(factors, lr=0.01, weight_decay=decays["weight_decay"]),
}


@pytest.mark.parametrize("loss", ["mse", "exponential"])
@pytest.mark.parametrize("depth", [1, 2, 3, 10])
@pytest.mark.parametrize(
    ("name", "q"), [("steepest", 1.5), ("steepest", 2.0), ("steepest", 1.7), ("adam", 1.0), ("adamw", 1.0)]
)
def test_training_a_torch_module_of_explicit_factors_is_the_same(name, q, depth, loss):
    decays = {"weight_decay": 0.2 * (name != "adam"), "coupled_weight_decay": 0.1 * (name != "adamw")}
    problem, steps = problem_of(loss, seed=4), 200
    result = flow.simulate(
        problem,
        q=q,
        depth=depth,
        scale=0.8,
        lr=0.01,
        steps=steps,
        optimizer=name[:8].replace("adamw", "adam"),
        progress=False,
        **decays,
    )
    Z, y = torch.from_numpy(problem.Z), torch.from_numpy(problem.y)
    net = Diagonal(problem.n, depth, 0.8)
    optimizer = OPTIMIZERS[name](q, decays)(list(net.parameters()))
    losses = []
    for step in range(steps + 1):
        p = net(Z)
        f = ((p - y) ** 2).mean() if loss == "mse" else (-y * p).exp().mean()
        if step in result.steps:
            losses.append(f.item())
        if step < steps:
            optimizer.zero_grad()
            f.backward()
            optimizer.step()
    np.testing.assert_allclose(result.loss, losses, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(result.first, net.factors[0].detach(), rtol=1e-7, atol=1e-9)
    if depth > 1:
        np.testing.assert_allclose(result.rest, net.factors[-1].detach(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("home", HOMES)
def test_a_run_depends_on_no_other_thread_or_record(home):
    problem = problem_of("mse", seed=range(5), k=20)
    options = {"q": [[1.0], [1.7]], "depth": 3, "lr": 1e-3, "steps": 40, "seed": [0, 1, 2, 3, 4], "batch_size": 4}
    whole = simulate(home, problem, record=7, **options)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = simulate(home, problem, record=[13, 34], **options)
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(whole.x, alone.x)
    for i in range(5):
        one = flow.Problem(problem.Z[i], problem.y[i])
        single = simulate(home, one, **{**options, "q": 1.7, "seed": i})
        assert np.array_equal(whole.x[1, i], single.x)


@pytest.mark.parametrize("home", [*HOMES, "reference"])
def test_a_diverged_run_is_flagged_and_leaves_the_others_alone(home):
    problem, options = problem_of("mse", seed=0), {"q": 2.0, "depth": 3, "scale": 0.9, "steps": 60}
    result = simulate(home, problem, lr=[1e-3, 100.0, 1e-3], **options)
    assert list(result.diverged) == [False, True, False]
    assert np.array_equal(result.x[0], result.x[2])
    assert np.isfinite(result.loss[:, 0]).all()
    assert np.array_equal(result.x[0], simulate(home, problem, lr=1e-3, **options).x)


@pytest.mark.parametrize("home", [*HOMES, "reference"])
def test_exponents_do_not_overflow(home):
    """Badly misclassified rows: the loss's slope is large, not infinite."""
    problem = flow.Problem(np.full((2, 3), 1e4), np.array([1.0, -1.0]), loss="exponential")
    for dtype in ("float32", "float64"):
        result = simulate(home, problem, q=1.0, depth=1, lr=0.5, steps=5, dtype=dtype)
        assert np.isfinite(result.x).all()
