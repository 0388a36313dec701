"""Parameters that were replaced in a group, appended to it or removed from it, as Accelerate and growing models do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pysteep import SteepestDescent, gradient_release

OPTIONS = [
    {"rounding": "stochastic"},
    {"rounding": "stochastic", "betas": (0.9, 0.99)},
    {"rounding": "stochastic", "depth": 3, "storage": "full"},
    {"rounding": "stochastic", "depth": 3, "storage": "implicit", "init": "balanced"},
    {"rounding": "compensated", "depth": 3},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=["plain", "momentum", "full", "implicit", "compensated"])


def params_of(count: int, shift: float = 0.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(count)
    made = [nn.Parameter((torch.randn(37 + i, generator=generator) + shift).bfloat16()) for i in range(count)]
    for param in made:
        param.grad = torch.randn(param.shape, generator=generator).bfloat16()
    return made


def stepped(params: list[nn.Parameter], options: dict, steps: int = 3) -> list[torch.Tensor]:
    optimizer = SteepestDescent([{"params": params[:2]}, {"params": params[2:]}], lr=0.01, **options)
    for _ in range(steps):
        optimizer.step()
    return [param.detach() for param in params]


@every_option
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_a_replaced_parameter_draws_by_its_place(options, compiled):
    params = params_of(4)
    optimizer = SteepestDescent([{"params": params[:2]}, {"params": params[2:]}], lr=0.01, **options)
    swapped = [nn.Parameter(param.detach().clone()) for param in params]
    for new, old in zip(swapped, params, strict=True):
        new.grad = old.grad.clone()
    optimizer.param_groups[0]["params"][:] = swapped[:2]
    optimizer.param_groups[1]["params"] = swapped[2:]
    step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
    for _ in range(3):
        step()
    for ours, right in zip(swapped, stepped(params_of(4), options), strict=True):
        assert torch.equal(ours, right)


@every_option
def test_a_group_that_grows_and_shrinks(options):
    """What is appended to the first group shifts the places of the second."""
    params = params_of(5)
    optimizer = SteepestDescent([{"params": params[:1]}, {"params": params[2:]}], lr=0.01, **options)
    optimizer.param_groups[0]["params"].append(params[1])
    for _ in range(3):
        optimizer.step()
    for ours, right in zip(params, stepped(params_of(5), options), strict=True):
        assert torch.equal(ours, right)
    del optimizer.param_groups[1]["params"][0]
    before = params[2].detach().clone()
    optimizer.step()
    assert torch.equal(params[2], before)


@every_option
def test_gradient_release_draws_alike(options):
    def net() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5)).bfloat16()

    x, nets = torch.randn(4, 7).bfloat16(), (net(), net())
    for released, own in zip((False, True), nets, strict=True):
        groups = [{"params": own[2].parameters()}, {"params": own[0].parameters()}]
        optimizer = SteepestDescent(groups, lr=0.01, **options)
        if released:
            gradient_release(own, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            own(x).square().sum().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(*(own.parameters() for own in nets), strict=True))


def test_a_copy_draws_alike():
    params = params_of(3)
    optimizer = SteepestDescent(params, lr=0.01, rounding="stochastic")
    twin = copy.deepcopy(optimizer)
    for param, own in zip(params, twin.param_groups[0]["params"], strict=True):
        own.grad = param.grad.clone()
    optimizer.step()
    twin.step()
    assert all(torch.equal(a, b) for a, b in zip(params, twin.param_groups[0]["params"], strict=True))
