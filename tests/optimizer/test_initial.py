"""The factors that a weight starts with: products, balances, variances, layouts."""

from __future__ import annotations

import pytest
import torch

import pysteep
from pysteep._state.initial import INITS, initial_factors
from tests.support.cases import DTYPES, random_values, same_bits
from tests.support.factorized import EXACT, RULES
from tests.support.tolerances import EPS


def product(factors):
    result = factors[0].double()
    for w in factors[1:]:
        result = result * w.double()
    return result


@pytest.mark.parametrize("depth", [1, 2, 3, 10, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("init", EXACT)
def test_initial_factors_multiply_to_the_weight(init, dtype, depth):
    x = random_values((40, 50), dtype, wide=dtype != torch.float16)
    x.view(-1)[:6] = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1.0])
    factors = initial_factors(x, depth, init, **RULES[init])
    assert len(factors) == depth
    assert all(w.dtype == dtype and w.shape == x.shape for w in factors)
    got = pysteep.functional.factor_product(factors)
    if init == "identity":
        assert same_bits(got, x)
        return
    finite = x.isfinite()
    assert same_bits(got[~finite], x[~finite])
    exact = x[finite].double()
    info = torch.finfo(dtype)
    # w_1 is rounded once; the others are what it was computed for. A small w_1 of float16 has fewer digits.
    slack = (2 * EPS[dtype] + 2 * depth * EPS[torch.float32]) * exact.abs() + info.smallest_normal * 2 * info.eps * 0.5
    largest = product(factors[1:])[finite].clamp(min=1.0) if depth > 1 else 1.0
    assert bool(((got[finite].double() - exact).abs() <= slack * largest).all())
    assert torch.equal(got.signbit()[~x.isnan()], x.signbit()[~x.isnan()])
    if init == "balanced" and depth > 1:
        root = exact.abs() ** (1 / depth)
        for w in factors:
            rtol = 2 * depth * EPS[dtype] + 16 * EPS[torch.float64]  # a power has errors of its own
            torch.testing.assert_close(w[finite].double().abs(), root, rtol=rtol, atol=2 * info.smallest_normal)


@pytest.mark.parametrize("q", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("depth", [2, 3, 10])
def test_lambda_is_balanced(depth, q):
    x, scale = torch.randn(1000, dtype=torch.float64), 0.3
    x[:10] = 0.0
    first, *rest = initial_factors(x, depth, "lambda", scale, q)
    assert all(torch.equal(w, rest[0]) for w in rest)
    torch.testing.assert_close(rest[0] ** q - first.abs() ** q, torch.full_like(x, scale**q))
    torch.testing.assert_close(rest[0][:10], torch.full((10,), scale, dtype=torch.float64))


def test_large_weights_are_made_in_pieces_and_in_their_own_layout(monkeypatch):
    monkeypatch.setattr(pysteep._state.initial, "PIECE", 1000)
    x = torch.randn(5, 777).t()
    for init in INITS:
        for w in initial_factors(x, 2, init, **RULES[init]):
            assert w.stride() == x.stride()
    assert torch.equal(*(initial_factors(x, 3, "balanced")[1:]))
    first, rest = initial_factors(x, 5, "lambda", 0.3, tied=True)
    every = initial_factors(x, 5, "lambda", 0.3)
    assert torch.equal(first, every[0])
    assert all(torch.equal(rest, w) for w in every[1:])
    assert len(initial_factors(x, 1, "saddle", 0.3, tied=True)) == 1
    part = torch.randn(6, 8)[:, ::2]
    assert all(w.is_contiguous() for w in initial_factors(part, 3, "balanced"))
    with pytest.raises(ValueError, match="init must be one of identity, balanced, lambda, saddle for tied factors; got 'dwf'"):
        initial_factors(x, 3, "dwf", tied=True)


@pytest.mark.parametrize(("depth", "share"), [(2, 0.65), (3, 0.54), (4, 0.48), (10, 0.39)])
def test_random_initialisations(depth, share):
    """What deep weight factorization loses of the deviation, and what "variance" does not."""
    x = 0.05 * torch.randn(400, 500) + 0.01
    factors = initial_factors(x, depth, "dwf")
    assert product(factors).std().item() == pytest.approx(share * x.std().item(), rel=0.02)
    sizes = torch.stack(factors).abs()
    assert sizes.min() >= 0.003 ** (1 / depth) * 0.9999
    assert sizes.max() <= (2 * x.std()) ** (1 / depth) * 1.0001
    assert abs(torch.stack(factors).sign().mean().item()) < 0.01
    for weight in (x, x.bfloat16(), 0.001 * x, torch.randn(7)):
        got = product(initial_factors(weight, depth, "variance")).var(correction=0)
        assert got.item() == pytest.approx(weight.double().var(correction=0).item(), rel=2 * depth * EPS[weight.dtype])


def test_random_initialisations_follow_the_generator():
    x = torch.randn(100)
    a, b = (initial_factors(x, 3, "dwf", generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(map(torch.equal, a, b))
    assert not torch.equal(a[0], a[1])
