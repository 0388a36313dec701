"""The theory's functions differentiate through torch, or refuse a tensor that requires a gradient by its name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from pysteep import theory

X = [-1.3, -0.2, 0.4, 2.0]
GEOMETRIES = [(1.0, 3, 0.1), (1.5, 2, 0.3), (2.0, 2, 0.1), (1.7, 20, 0.8), (1.4, 1, 0.2)]


def leaf(values=X):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_regularizers(depth):
    assert gradcheck(lambda x: theory.coupled_regularizer(x, depth), leaf())
    assert gradgradcheck(lambda x: theory.coupled_regularizer(x, depth), leaf())
    for q in (1.0, 1.6, 2.0):
        assert gradcheck(lambda x, q=q: theory.manifold_regularizer(x, q, depth), leaf())
        assert gradgradcheck(lambda x, q=q: theory.manifold_regularizer(x, q, depth), leaf())
    assert gradcheck(lambda x: theory.manifold_regularizer(x, 2, math.inf), leaf())


def test_a_penalty_trains_a_parameter():
    w = torch.nn.Parameter(torch.tensor([[1.0, -2.0], [0.0, 0.5]]))
    penalty = theory.coupled_regularizer(w, 2).sum()
    assert penalty.dtype == torch.float64
    penalty.backward()
    assert w.grad.dtype == torch.float32
    assert w.grad.tolist() == [[2.0, -2.0], [0.0, 2.0]]
    with torch.no_grad():
        assert not theory.coupled_regularizer(w, 2).requires_grad


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_geometry(geometry):
    for function in (theory.potential, theory.mirror_map, theory.inverse_metric, theory.escape_time):
        assert gradcheck(lambda x, f=function: f(x, *geometry), leaf(), rtol=1e-5)
    assert gradgradcheck(lambda x: theory.potential(x, *geometry), leaf(), rtol=1e-5)
    assert gradgradcheck(lambda x: theory.mirror_map(x, *geometry), leaf(), rtol=1e-5)
    assert gradcheck(lambda y: theory.inverse_mirror_map(y, *geometry), leaf([-0.2, 0.05, 0.3]), rtol=1e-5)


@pytest.mark.parametrize("geometry", [*GEOMETRIES, (1.2, 3, 0.0)], ids=str)
def test_bases_and_divergences(geometry):
    x, base = leaf(), leaf([0.3, -0.7, 0.9, 1.0])
    for function in (theory.potential, theory.mirror_map):
        assert gradcheck(lambda x, y, f=function: f(x, *geometry, x_0=y), (x, base), rtol=1e-5)
    assert gradcheck(
        lambda y, x: theory.inverse_mirror_map(y, *geometry, x_0=x), (leaf([-0.1, 0.02]), leaf([0.4, 1.0])), rtol=1e-5
    )
    assert gradcheck(lambda x, y: theory.bregman_divergence(x, y, *geometry), (x, base), rtol=1e-5)
    assert gradgradcheck(lambda x, y: theory.bregman_divergence(x, y, *geometry), (x, base), rtol=1e-5)
    assert gradcheck(lambda x: theory.bregman_divergence(x, np.ones((3, 1)), *geometry), x, rtol=1e-5)


def test_the_entropy():
    assert gradcheck(theory.hyperbolic_entropy, (leaf(), leaf([0.1, 0.5, 1.0, 3.0])))
    assert gradgradcheck(theory.hyperbolic_entropy, (leaf(), leaf([0.1, 0.5, 1.0, 3.0])))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda t: theory.mirror_map(0.3, t, 3, 0.1), "q"),
        (lambda t: theory.potential(0.3, 1.5, 3, t), "lam"),
        (lambda t: theory.bregman_divergence(t, t, t, 3, 0.1), "q"),
        (lambda t: theory.balanced_factors(t, 1.5, 3, 0.1), "x"),
        (lambda t: theory.balance([t, t], 1.5), "factors"),
        (lambda t: theory.predicted_balance(t, 1.5, 0.1, 0.1, 3), "initial"),
        (lambda t: theory.coercivity(1.5, 3, lam=t), "lam"),
        (lambda t: theory.metric_exponent(t, 3), "q"),
        (lambda t: theory.convergence_bound(1.5, 3, 0.1, t, 1.0), "loss_gap"),
        (lambda t: theory.convergence_rate(1.5, 3, 0.1, t, 1.0), "pl_constant"),
        (lambda t: theory.manifold_regularizer(0.3, t, 3), "q"),
        (lambda t: theory.linf_margin(t.reshape(1, 1), [1], 2), "Z"),
        (lambda t: theory.steepest_reparameterization(np.cosh, 1.5).w_of_x(t), "x"),
        (lambda t: theory.steepest_reparameterization(np.cosh, 1.5).x_of_w(t), "w"),
    ],
)
def test_what_does_not_differentiate_refuses(call, name):
    with pytest.raises(ValueError, match=f"^{name} must not require a gradient, .*: pass {name}.detach()"):
        call(leaf(1.2))
    with torch.no_grad():
        call(leaf(1.2))
