"""prune_: masks that are saved, loaded, copied and written over."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from pysteep import factorize
from pysteep.diagnostics import prune_
from tests.support.cases import random_values
from tests.support.factorized import batch, build_net, train
from tests.support.pruned import assert_held, seen_in_forward


@pytest.mark.parametrize("deep", [0, 3])
def test_state_dicts_load_into_new_models(deep, tmp_path):
    def build():
        net = build_net()
        return factorize(net, deep, "balanced") if deep else net

    net = build()
    prune_(net, 0.4 if deep else 0.1)
    train(net, torch.optim.AdamW(net.parameters()), 2)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    state = torch.load(tmp_path / "net.pt")
    if not deep:
        assert set(state) == {*build().state_dict(), "0.weight_mask", "4.weight_mask"}
    fresh = build()
    with torch.no_grad():
        for p in fresh.parameters():
            p.add_(1)
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=1e-2)
    prune_(fresh, masks=state)
    fresh.load_state_dict(state)
    masks = [net[i].weight != 0 for i in (0, 4)]
    before = [net[i].weight.detach().clone() for i in (0, 4)]
    assert all(torch.equal(fresh[i].weight, net[i].weight) for i in (0, 4))
    seen = seen_in_forward(fresh)
    train(fresh, optimizer, 5)
    assert_held(fresh, seen, masks, before)


def test_the_loaded_mask_rules():
    net, other = build_net(), build_net()
    prune_(net, 0.1)
    with torch.no_grad():
        other[4].weight.copy_(random_values(other[4].weight.shape, torch.float32))
    prune_(other, 0.3)
    state = other.state_dict()
    state["4.weight"] = torch.full_like(state["4.weight"], torch.nan)  # of an average, say, that knows no mask
    net.load_state_dict(state)
    assert torch.equal(net[4].weight.isnan(), other[4].weight_mask)
    assert not net[4].weight[~other[4].weight_mask].any()
    net.load_state_dict(build_net().state_dict(), strict=False)
    assert torch.equal(net[4].weight != 0, other[4].weight_mask)
    net.load_state_dict(state, assign=True)
    net[4].weight.sum().backward()
    assert torch.equal(net[4].weight.grad, other[4].weight_mask.float())


@pytest.mark.parametrize("write", ["average", "data", "replace"])
def test_weights_written_from_outside_are_0_in_the_next_forward_pass(write):
    net = build_net()
    prune_(net, 0.1)
    mask = net[4].weight_mask
    if write == "average":
        with torch.no_grad():
            net[4].weight.add_(1)
    elif write == "data":
        net[4].weight.data = torch.full_like(net[4].weight, torch.nan)
    else:
        net[4].weight = nn.Parameter(torch.ones_like(net[4].weight))
    net(batch()[0]).sum().backward()
    assert not net[4].weight[~mask].any()
    assert bool((net[4].weight[mask] != 0).all())
    if write != "data":
        assert not net[4].weight.grad[~mask].any()
        assert bool(net[4].weight.grad[mask].any())


def test_two_forward_passes_before_one_backward_pass():
    net = build_net()
    prune_(net, 0.1)
    (net(batch(0)[0]).sum() + net(batch(1)[0]).sum()).backward()
    assert not net[4].weight.grad[~net[4].weight_mask].any()


def test_copies_are_pruned_alike():
    net = build_net()
    prune_(net, 0.1)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(net, file)
    file.seek(0)
    for twin in (copy.deepcopy(net), torch.load(file, weights_only=False), copy.deepcopy(net[4:])):
        before = twin[-1].weight.detach().clone()
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            twin(torch.randn(2, 64) if len(twin) == 1 else batch()[0]).square().sum().backward()
            optimizer.step()
        assert not twin[-1].weight[~net[4].weight_mask].any()
        assert bool((twin[-1].weight != before)[net[4].weight_mask].any())
        assert torch.equal(net[4].weight != 0, net[4].weight_mask)


def test_copies_of_factorised_models_are_pruned_alike():
    net = factorize(build_net(), 2, "balanced")
    prune_(net, 0.3)
    twin = copy.deepcopy(net)
    mask = net[4].weight != 0
    train(twin, torch.optim.AdamW(twin.parameters(), lr=0.1), 3)
    assert torch.equal(twin[4].weight != 0, mask)
    assert torch.equal(net[4].weight != 0, mask)
