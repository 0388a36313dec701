"""The state of SteepestDescent at depth > 1: copies, checkpoints across storages, and parameters written from outside."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from pysteep import SteepestDescent
from pysteep.kernels.reference.mirror_step import balanced_factors
from tests.support.cases import same_bits

STORAGES = ("full", "tied", "implicit")


def written_by_copy(p, mask):
    with torch.no_grad():
        p.mul_(mask)


def written_by_data(p, mask):
    p.data = p.data * mask  # other memory


@pytest.mark.parametrize("write", [written_by_copy, written_by_data])
@pytest.mark.parametrize("init", ["identity", "lambda"])
@pytest.mark.parametrize("storage", ["full", "tied"])
def test_writes_from_outside_are_noticed(storage, init, write):
    """Pruned weights stay pruned; the factors of the others keep what they learnt; momenta start again where x was written."""
    p = nn.Parameter(torch.randn(30, 5))
    scale = 0.5 if init == "lambda" else None
    optimizer = SteepestDescent([p], lr=0.01, depth=3, storage=storage, init=init, scale=scale, betas=(0.9, 0.99))
    for _ in range(5):
        p.grad = torch.randn(30, 5)
        optimizer.step()
    kept = [w.clone() for w in optimizer.factors(p)]
    momentum = optimizer.state[p]["momentum_1"].clone()
    mask = (torch.rand(30, 5) > 0.5).float()
    write(p, mask)
    factors = optimizer.factors(p)
    fresh = 1.0 if init == "identity" else 0.5
    assert all(torch.equal(w[mask == 1], old[mask == 1]) for w, old in zip(factors, kept, strict=True))
    assert bool((factors[0][mask == 0] == 0).all())
    torch.testing.assert_close(factors[1][mask == 0], torch.full_like(factors[1][mask == 0], fresh))
    assert torch.equal(optimizer.state[p]["momentum_1"], momentum * mask)
    optimizer.param_groups[0]["lr"] = 0.0
    before = p.detach().clone()
    p.grad = torch.zeros(30, 5)
    optimizer.step()
    assert torch.equal(p.detach(), before)


def test_refactor_makes_all_factors_anew():
    p = nn.Parameter(torch.randn(20))
    optimizer = SteepestDescent([p], lr=0.01, depth=3, betas=(0.9, 0.9))
    p.grad = torch.randn(20)
    optimizer.step()
    p.data.mul_(2)  # past the version counter
    before = p.detach().clone()
    optimizer.refactor_()
    first, rest, _ = optimizer.factors(p)
    assert torch.equal(first, before)
    assert rest.tolist() == [1.0] * 20
    assert optimizer.state[p]["momentum_1"].tolist() == [0.0] * 20
    assert torch.equal(p.detach(), before)


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("storage", STORAGES)
def test_copies_go_on_alike(storage, remake):
    p = nn.Parameter(torch.randn(20))
    optimizer = SteepestDescent([p], lr=0.1, q=1.5, depth=3, storage=storage, init="balanced")
    p.grad = torch.randn(20)
    optimizer.step()
    other = remake(optimizer)
    twin = other.param_groups[0]["params"][0]
    twin.grad = p.grad.clone()
    optimizer.step()
    other.step()
    assert same_bits(p.detach(), twin.detach())


def trained(storage, init="lambda", betas=(0.0, 0.0), depth=3, steps=5):
    p = nn.Parameter(torch.randn(20))
    scale = 0.5 if init == "lambda" else None
    optimizer = SteepestDescent(
        [p], lr=0.01, q=1.5, weight_decay=0.1, depth=depth, storage=storage, init=init, scale=scale, betas=betas
    )
    for _ in range(steps):
        p.grad = torch.randn(20)
        optimizer.step()
    return p, optimizer


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.9, 0.99)])
@pytest.mark.parametrize(("saved", "loaded"), [("full", "full"), ("tied", "tied"), ("tied", "full"), ("full", "tied")])
@pytest.mark.parametrize("depth", [2, 3])
def test_state_loads_across_storages(depth, saved, loaded, betas, tmp_path):
    p, optimizer = trained(saved, betas=betas, depth=depth)
    if (saved, loaded) == ("full", "tied"):  # equal to rounding only, after steps: make them so
        for name, t in optimizer.state[p].items():
            if name.endswith("_3"):
                t.copy_(optimizer.state[p][name.replace("3", "2")])
        with torch.no_grad():
            first, rest = (optimizer.state[p][f"factor_{k}"] for k in (1, 2))
            p.copy_(first * (rest if depth == 2 else rest * rest))
        optimizer.factors(p)
    torch.save({"p": p.detach(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    checkpoint = torch.load(tmp_path / "checkpoint")
    twin, other = trained(loaded, init="lambda", betas=betas, depth=depth, steps=0)
    other.load_state_dict(checkpoint["optimizer"])
    with torch.no_grad():
        twin.copy_(checkpoint["p"])
    assert other.param_groups[0]["storage"] == loaded
    for a, b in zip(other.factors(twin), optimizer.factors(p), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    gradient = torch.randn(20)
    for x, own in ((p, optimizer), (twin, other)):
        x.grad = gradient.clone()
        own.step()
    torch.testing.assert_close(twin.detach(), p.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loaded", ["full", "tied"])
def test_an_implicit_state_becomes_factors_of_its_balance(loaded):
    p, optimizer = trained("implicit")
    twin, other = trained(loaded, steps=0)
    other.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        twin.copy_(p)
    wanted = balanced_factors(p.detach(), 1.5, 3, optimizer.state[p]["balance"])
    assert optimizer.state[p]["balance"].dtype == torch.float64
    factors = other.factors(twin)
    torch.testing.assert_close([factors[0], factors[1]], [w.float() for w in wanted])


def test_a_state_that_would_not_be_exact_is_refused():
    _, tied = trained("tied")
    _, implicit = trained("implicit", steps=1)
    before = copy.deepcopy(implicit.state_dict())
    with pytest.raises(ValueError, match="state_dict holds the factors of param 0: storage must be 'full' or 'tied'"):
        implicit.load_state_dict(tied.state_dict())
    assert implicit.state_dict()["state"] == before["state"]
    p, full = trained("full")
    full.state[p]["factor_3"].add_(1)
    with pytest.raises(ValueError, match="factors 2 to 3 of param 0 that differ: storage must be 'full'"):
        tied.load_state_dict(full.state_dict())
    _, deeper = trained("tied", depth=4)
    with pytest.raises(ValueError, match="state_dict has depth 4 in group 0; this optimiser has 3"):
        tied.load_state_dict(deeper.state_dict())


@pytest.mark.parametrize("storage", STORAGES)
def test_a_float64_state_of_a_bfloat16_parameter_keeps_its_dtype(storage):
    p = nn.Parameter(torch.randn(30).to(torch.bfloat16))
    optimizer = SteepestDescent([p], lr=0.01, depth=3, storage=storage, init="balanced")
    p.grad = torch.randn(30).to(torch.bfloat16)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0] = {name: t.double() for name, t in saved["state"][0].items()}
    fresh = SteepestDescent([nn.Parameter(p.detach().clone())], lr=0.01, depth=3, storage=storage, init="balanced")
    fresh.load_state_dict(saved)
    (state,) = fresh.state.values()
    assert {t.dtype for t in state.values()} == {torch.float64}
    twin = fresh.param_groups[0]["params"][0]
    twin.grad = p.grad.clone()
    fresh.step()
    assert {t.dtype for t in state.values()} == {torch.float64}


@pytest.mark.parametrize("storage", ["full", "tied"])
def test_large_factors_lie_at_different_places_of_a_page(storage):
    """Lines of all of them at once fit a cache of few ways; what is saved and loaded are the same values."""
    p = nn.Parameter(torch.randn(1 << 18))
    optimizer = SteepestDescent([p], lr=0.1, depth=4, storage=storage, init="balanced")
    p.grad = torch.randn_like(p)
    optimizer.step()
    factors = list({id(w): w for w in optimizer.state[p].values() if w.ndim}.values())
    assert len(factors) == (4 if storage == "full" else 2)
    assert all(w.is_contiguous() and w.shape == p.shape for w in factors)
    if storage == "full":
        assert len({w.data_ptr() % 4096 for w in factors}) == 4
    memory = io.BytesIO()
    torch.save(optimizer.state_dict(), memory)
    memory.seek(0)
    loaded = SteepestDescent([p], lr=0.1, depth=4, storage=storage, init="balanced")
    loaded.load_state_dict(torch.load(memory, weights_only=True))
    assert all(same_bits(w, v) for w, v in zip(optimizer.factors(p), loaded.factors(p), strict=True))
