"""Every scheduler of torch.optim.lr_scheduler: the steps are those of the learning rates and betas that it set."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from pysteep import SteepestDescent
from tests.support.cases import same_bits

STEPS = 9
LR = 0.02

SCHEDULERS: dict[str, Callable[..., Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda i: 1 / (1 + i)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], gamma=0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, power=1.7),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
    "CyclicLR": lambda o, **momenta: lr_scheduler.CyclicLR(o, 0.001, 0.03, 3, **momenta),
    "OneCycleLR": lambda o, **momenta: lr_scheduler.OneCycleLR(o, 0.03, total_steps=STEPS + 1, **momenta),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 6)], milestones=[3]
    ),
}
CYCLING = ("CyclicLR", "OneCycleLR")

OPTIONS: dict[str, dict[str, Any]] = {
    "depth 1": {"q": 1.5},
    "depth 1, momentum": {"betas": (0.7, 0.9)},
    "depth 3": {"depth": 3, "q": 1.5},
    "depth 3, momentum": {"depth": 3, "storage": "full", "betas": (0.7, 0.9), "init": "balanced"},
}


def test_every_scheduler_of_torch_is_here():
    assert {name for name in lr_scheduler.__all__ if name != "LRScheduler"} == set(SCHEDULERS)


def gradient(i: int) -> Tensor:
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(i))


def new_param() -> nn.Parameter:
    return nn.Parameter(torch.randn(5, 7, generator=torch.Generator().manual_seed(99)))


def advance(scheduler: Any) -> None:
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def scheduled(
    param: nn.Parameter, optimizer: Optimizer, scheduler: Any, steps: range, numbers: list[tuple[float, Any]] | None = None
) -> list[tuple[float, Any]]:
    """The lr and betas of each step."""
    numbers = [] if numbers is None else numbers
    (group,) = optimizer.param_groups
    for i in steps:
        numbers.append((float(group["lr"]), group.get("betas")))
        param.grad = gradient(i)
        optimizer.step()
        advance(scheduler)
    return numbers


@pytest.mark.parametrize("lr", [float, torch.tensor], ids=["float", "tensor"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(name, options, lr):
    """Torch's Adam gets the same numbers, and setting them by hand gives the same weights, also across a checkpoint."""
    param = new_param()
    optimizer = SteepestDescent([param], lr=lr(LR), weight_decay=0.1, **options)
    scheduler = SCHEDULERS[name](optimizer)
    numbers = scheduled(param, optimizer, scheduler, range(4))
    saved = copy.deepcopy((param.detach(), optimizer.state_dict(), scheduler.state_dict()))
    scheduled(param, optimizer, scheduler, range(4, STEPS), numbers)
    assert len({rate for rate, _ in numbers}) > 1
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor) == (lr is torch.tensor)

    resumed = new_param()
    resumed.data.copy_(saved[0])
    again = SteepestDescent([resumed], lr=lr(LR), weight_decay=0.1, **options)
    scheduler = SCHEDULERS[name](again)
    again.load_state_dict(saved[1])
    scheduler.load_state_dict(saved[2])
    assert scheduled(resumed, again, scheduler, range(4, STEPS)) == numbers[4:]
    assert same_bits(resumed.detach(), param.detach())

    other = new_param()
    adam = torch.optim.Adam([other], lr=lr(LR), betas=options.get("betas", (0.0, 0.0)))
    theirs = scheduled(other, adam, SCHEDULERS[name](adam), range(STEPS))
    assert theirs == numbers
    assert (name in CYCLING) == (len({betas for _, betas in numbers}) > 1)

    other = new_param()
    by_hand = SteepestDescent([other], weight_decay=0.1, **options)
    for i, (rate, betas) in enumerate(numbers):
        by_hand.param_groups[0].update(lr=rate, betas=betas)
        other.grad = gradient(i)
        by_hand.step()
    assert same_bits(param.detach(), other.detach())


@pytest.mark.parametrize("cycled", [float, torch.tensor], ids=["float", "tensor"])
@pytest.mark.parametrize("lr", [float, torch.tensor], ids=["float", "tensor"])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("name", CYCLING)
def test_cycled_betas_in_tensors(name, depth, lr, cycled):
    """The scheduler puts a number, or a tensor where it was given such, in place of betas[0]; betas[1] is kept.

    Torch's Adam gets the same numbers, and setting them by hand gives the same weights.
    """
    bounds = {"base_momentum": cycled(0.8), "max_momentum": cycled(0.9)}
    numbers = []
    for kind in (torch.optim.Adam, SteepestDescent):
        param, betas = new_param(), (torch.tensor(0.7), torch.tensor(0.75))
        options = {} if kind is torch.optim.Adam else {"depth": depth, "q": 1.5, "weight_decay": 0.1}
        optimizer = kind([param], lr=lr(LR), betas=betas, **options)
        scheduler = SCHEDULERS[name](optimizer, **bounds)
        seen = scheduled(param, optimizer, scheduler, range(STEPS))
        assert isinstance(optimizer.param_groups[0]["betas"][0], Tensor) == (cycled is torch.tensor)
        assert optimizer.param_groups[0]["betas"][1] is betas[1]
        numbers.append([(rate, tuple(map(float, own))) for rate, own in seen])
    assert numbers[0] == numbers[1]
    assert len({own for _, own in numbers[0]}) > 1

    other = new_param()
    by_hand = SteepestDescent([other], depth=depth, q=1.5, weight_decay=0.1)
    for i, (rate, own) in enumerate(numbers[0]):
        by_hand.param_groups[0].update(lr=rate, betas=own)
        other.grad = gradient(i)
        by_hand.step()
    assert same_bits(param.detach(), other.detach())


@pytest.mark.parametrize("name", CYCLING)
def test_cycled_momentum_is_named_where_there_can_be_none(name):
    """These two turn momentum on by themselves."""
    param = new_param()
    optimizer = SteepestDescent([param], lr=LR, depth=3, storage="implicit", init="balanced")
    SCHEDULERS[name](optimizer)
    before = param.detach().clone()
    param.grad = gradient(0)
    with pytest.raises(ValueError, match=r"betas must be \(0\.0, 0\.0\) with storage 'implicit'"):
        optimizer.step()
    assert torch.equal(param, before)


def test_no_warning_of_the_order_under_gradient_release():
    """A scheduler warns unless step() was called before it."""
    from pysteep import gradient_release

    net = nn.Linear(3, 3)
    optimizer = SteepestDescent(net.parameters(), lr=LR)
    gradient_release(net, optimizer)
    scheduler = SCHEDULERS["CosineAnnealingLR"](optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            net(torch.randn(2, 3)).sum().backward()
            optimizer.step()
            scheduler.step()
