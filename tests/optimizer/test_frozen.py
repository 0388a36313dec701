"""Frozen parameters (requires_grad=False) are never written: at construction, by steps, by refactor_, by factorize."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

import pysteep
from pysteep import SteepestDescent, factorize, gradient_release, param_groups
from tests.support.cases import same_bits

OPTIONS = {
    "depth 1": {"betas": (0.9, 0.99), "coupled_weight_decay": 0.1},
    "compensated": {"rounding": "compensated"},
    "tied": {"depth": 3, "betas": (0.9, 0.99)},
    "full, lambda": {"depth": 3, "storage": "full", "init": "lambda", "scale": 0.1},
    "tied, saddle": {"depth": 2, "init": "saddle", "scale": 0.1},
    "implicit": {"depth": 3, "storage": "implicit", "init": "balanced"},
    "implicit, saddle": {"depth": 3, "storage": "implicit", "init": "saddle", "scale": 0.1},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def built(options, frozen: bool = True, dtype: torch.dtype = torch.float32):
    """A net whose first layer is frozen though a gradient is left in it, and the optimizer of all its parameters."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    net(torch.randn(4, 5, dtype=dtype)).square().sum().backward()
    net[0].requires_grad_(not frozen)
    return net, SteepestDescent(net.parameters(), lr=0.01, weight_decay=0.1, **options)


@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_never_written(options, dtype):
    net, _ = built({}, dtype=dtype)
    before = copy.deepcopy(net[0].state_dict())
    net, optimizer = built(options, dtype=dtype)
    optimizer.step()
    optimizer.refactor_()
    optimizer.step()
    for name, param in net[0].named_parameters():
        assert torch.equal(param, before[name])
        assert param not in optimizer.state
    assert all(param.any() for param in net[2].parameters())


@every_option
def test_the_others_step_as_if_it_was_not_there(options):
    net, optimizer = built(options)
    alone = copy.deepcopy(net[2])
    optimizer_alone = SteepestDescent(alone.parameters(), lr=0.01, weight_decay=0.1, **options)
    for ours, theirs in zip(net[2].parameters(), alone.parameters(), strict=True):
        theirs.grad = ours.grad.clone()
    for _ in range(3):
        optimizer.step()
        optimizer_alone.step()
    for ours, theirs in zip(net[2].parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@every_option
def test_thawed_it_trains(options):
    """And as it would have from what it is: from "saddle" as from "lambda"."""
    net, optimizer = built(options)
    optimizer.step()
    net[0].requires_grad_()
    before = net[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(net[0].weight, before)
    like = dict(options, init="lambda") if options.get("init") == "saddle" else options
    other = nn.Parameter(before.clone())
    other.grad = net[0].weight.grad.clone()
    SteepestDescent([other], lr=0.01, weight_decay=0.1, **like).step()
    assert torch.equal(net[0].weight, other)


@every_option
def test_added_later(options):
    param = nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = SteepestDescent([nn.Parameter(torch.ones(2))], lr=0.1, **options)
    optimizer.add_param_group({"params": [param]})
    optimizer.step()
    assert torch.equal(param, torch.ones(3))


@pytest.mark.parametrize("options", [OPTIONS["depth 1"], OPTIONS["tied"], OPTIONS["implicit"]], ids=["1", "tied", "implicit"])
def test_compiled(options):
    net, optimizer = built(options)
    before = copy.deepcopy(net[0].state_dict())
    moved = net[2].weight.detach().clone()
    torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)()
    assert all(torch.equal(param, before[name]) for name, param in net[0].named_parameters())
    assert not torch.equal(net[2].weight, moved)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("options", [OPTIONS["depth 1"], OPTIONS["tied"], OPTIONS["implicit"]], ids=["1", "tied", "implicit"])
@pytest.mark.parametrize("stale", [True, False], ids=["stale gradients", "no gradients"])
@pytest.mark.parametrize("thawed", [True, False], ids=["thawed", "frozen"])
def test_frozen_or_thawed_between_compiled_steps(thawed, stale, options, backend):
    """As between eager ones, with the gradients that zero_grad(set_to_none=...) leaves."""
    torch._dynamo.reset()
    weights = []
    for compiled in (False, True):
        first, second = nn.Parameter(torch.ones(3), requires_grad=not thawed), nn.Parameter(torch.ones(4))
        optimizer = SteepestDescent([first, second], lr=torch.tensor(0.25), weight_decay=0.5, **options)
        step = torch.compile(optimizer.step, backend=backend, fullgraph=True) if compiled else optimizer.step
        for turn in (not thawed, thawed, not thawed):
            first.requires_grad_(turn)
            second.grad = torch.full((4,), 2.0)
            first.grad = torch.ones(3) if turn or stale else None
            step()
        weights.append((first, second))
    assert all(map(same_bits, *weights))
    assert weights[0][0][0] != 1


def test_gradient_release():
    net, optimizer = built(OPTIONS["tied"])
    before = copy.deepcopy(net[0].state_dict())
    gradient_release(net, optimizer)
    net(torch.ones(4, 5)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(param, before[name]) for name, param in net[0].named_parameters())


def test_param_groups_leave_a_frozen_backbone_at_depth_1(caplog):
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    net[0].requires_grad_(False)
    with caplog.at_level(logging.INFO, "pysteep"):
        groups = param_groups(net, depth=3)
    assert repr(groups).splitlines() == [
        "depth 3   1.weight  (3, 7)",
        "depth 1   0.weight  (7, 5)  frozen",
        "depth 1   0.bias    (7,)  frozen",
        "depth 1   1.bias    (3,)",
    ]
    assert "0.weight  (7, 5)  frozen" in caplog.text
    SteepestDescent(groups, lr=0.1, init="saddle", scale=0.1)
    assert net[0].weight.all()
    net.requires_grad_(False)
    with pytest.raises(ValueError, match=r"requires a gradient; None chooses frozen ones alone: 0\.weight, 1\.weight"):
        param_groups(net, depth=3)


@pytest.mark.parametrize("init", ["saddle", "dwf", "variance", "balanced"])
def test_factorize_leaves_them(init, caplog):
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    net[0].requires_grad_(False)
    before = net[0].weight.clone()
    with caplog.at_level(logging.INFO, "pysteep"):
        factorize(net, 3, init, scale=0.1 if init == "saddle" else None)
    assert [name for name, _ in net[0].named_parameters()] == ["weight", "bias"]
    assert torch.equal(net[0].weight, before)
    assert "frozen weights as they are: 0.weight" in caplog.text
    with pytest.raises(ValueError, match=r"'0\.\*' chooses frozen ones alone: 0\.weight"):
        pysteep.factorize(net, 3, match="0.*")
