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


@pytest.mark.parametrize("lam", [0.0, 0.1])
@pytest.mark.parametrize("depth", [1, 2, 3, 10])
@pytest.mark.parametrize("q", [1.0, 1.5, 2.0])
def test_second_derivatives(q, depth, lam):
    """Also with create_graph=True, and one order beyond."""
    finite = lam > 0 or theory.metric_exponent(q, depth) < 1
    of_integrals = (theory.mirror_map, theory.potential, theory.escape_time) if finite else ()
    for function in (theory.inverse_metric, *of_integrals):
        assert gradgradcheck(lambda x, f=function: f(x, q, depth, lam), leaf(), rtol=1e-5)
    if lam > 0:
        assert gradgradcheck(lambda y: theory.inverse_mirror_map(y, q, depth, lam), leaf([-0.2, 0.05, 0.3]), rtol=1e-5)
    x, h = leaf(), 1e-5
    derivatives = [theory.inverse_metric(x, q, depth, lam)]
    for _ in range(3):
        derivatives += torch.autograd.grad(derivatives[-1].sum(), x, create_graph=True)
    for order in (1, 2, 3):
        sides = []
        for moved in (x + h, x - h):
            at = moved.detach().requires_grad_()
            value = theory.inverse_metric(at, q, depth, lam)
            for _ in range(order - 1):
                (value,) = torch.autograd.grad(value.sum(), at, create_graph=True)
            sides.append(value.detach())
        expected = (sides[0] - sides[1]) / (2 * h)
        torch.testing.assert_close(derivatives[order].detach(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("depth", [2, 3, 10])
def test_derivatives_of_the_metric_at_0(depth):
    n, lam = depth - 1, 0.3

    def derivatives(q, lam):
        x = leaf(0.0)
        value = theory.inverse_metric(x, q, depth, lam)
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        return first.item(), torch.autograd.grad(first, x)[0].item()

    assert derivatives(2.0, lam) == (0.0, pytest.approx(4 * n / lam, rel=1e-12))
    assert derivatives(1.0, lam) == (0.0, pytest.approx(-n * (n + 3) * lam ** -(n + 2), rel=1e-12))
    assert derivatives(1.5, lam) == (0.0, 0.0)
    assert [derivatives(q, 0.0) for q in (1.0, 1.5, 2.0)] == [(0.0, 0.0)] * 3
    near = leaf([-1e-14, 1e-14])
    for q in (1.0, 2.0):
        (first,) = torch.autograd.grad(theory.inverse_metric(near, q, depth, lam).sum(), near, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), near)
        assert second.tolist() == pytest.approx([derivatives(q, lam)[1]] * 2, rel=1e-6)


def test_second_derivatives_of_regularizers_at_0():
    for function, expected in (
        (lambda x: theory.coupled_regularizer(x, 1), 2.0),
        (lambda x: theory.manifold_regularizer(x, 1.7, 1), 1.0),
    ):
        x = leaf(0.0)
        (first,) = torch.autograd.grad(function(x), x, create_graph=True)
        assert (first.item(), torch.autograd.grad(first, x)[0].item()) == (0.0, expected)


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
