"""torch.optim.swa_utils: averaged models and SWALR, and averages swapped into a model whose weights have factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from pysteep import SteepestDescent, param_groups
from tests.support.cases import same_bits
from tests.support.tolerances import PEER_RTOL

AVERAGES: dict[str, dict[str, Any]] = {"SWA": {}, "EMA": {"multi_avg_fn": get_ema_multi_avg_fn(0.8)}}
STORAGES: dict[str, dict[str, Any]] = {
    "full": {"storage": "full", "betas": (0.9, 0.99)},
    "tied": {"storage": "tied", "betas": (0.9, 0.99)},
    "implicit": {"storage": "implicit", "init": "balanced"},
}


def build_net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(7, 13), nn.BatchNorm1d(13), nn.Tanh(), nn.Linear(13, 5))


def batch(i: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    return torch.randn(16, 7, generator=generator), torch.randint(0, 5, (16,), generator=generator)


def train(
    net: nn.Module, optimizer: SteepestDescent, steps: range, after: Callable[[], Any] = lambda: None
) -> list[list[Tensor]]:
    """The parameters after each step."""
    seen = []
    for i in steps:
        x, y = batch(i)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        after()
        seen.append([param.detach().clone() for param in net.parameters()])
    return seen


def averaged(history: list[list[Tensor]], average: str) -> list[Tensor]:
    """In float64."""
    result = [param.double() for param in history[0]]
    for n, params in enumerate(history[1:], start=1):
        weight = 1 / (n + 1) if average == "SWA" else 0.2
        result = [mean + weight * (param - mean) for mean, param in zip(result, params, strict=True)]
    return result


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("average", AVERAGES)
def test_averaged_model_and_swalr(average, depth):
    net = build_net()
    optimizer = SteepestDescent(param_groups(net, depth=depth), lr=0.02, q=1.5, weight_decay=0.1)
    mean = AveragedModel(net, **AVERAGES[average])
    scheduler = SWALR(optimizer, swa_lr=0.005, anneal_epochs=3)
    rates = []

    def after() -> None:
        mean.update_parameters(net)
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])

    history = train(net, optimizer, range(6), after)
    update_bn([batch(i)[0] for i in range(3)], mean)
    for param, expected in zip(mean.module.parameters(), averaged(history, average), strict=True):
        torch.testing.assert_close(param.double(), expected, rtol=0, atol=PEER_RTOL * float(expected.abs().max()))
    assert rates[0] < 0.02
    assert rates[-1] == pytest.approx(0.005)

    plain = build_net()
    unobserved = SteepestDescent(param_groups(plain, depth=depth), q=1.5, weight_decay=0.1)
    for i, rate in enumerate([0.02, *rates[:-1]]):
        for group in unobserved.param_groups:
            group["lr"] = rate
        (params,) = train(plain, unobserved, range(i, i + 1))
        assert all(same_bits(a, b) for a, b in zip(params, history[i], strict=True))


@pytest.mark.parametrize("options", STORAGES.values(), ids=STORAGES)
def test_average_swapped_in_and_back(options):
    """Between two steps: the same x has the same factors and momenta as before, so nothing changes."""
    net, other = build_net(), build_net()
    optimizer, undisturbed = (
        SteepestDescent(param_groups(n, depth=3), lr=0.02, q=1.5, weight_decay=0.1, **options) for n in (net, other)
    )
    mean = AveragedModel(net, **AVERAGES["EMA"])
    train(net, optimizer, range(4), lambda: mean.update_parameters(net))
    train(other, undisturbed, range(4))
    swap(net, mean)
    x, y = batch(50)
    with torch.no_grad():
        assert nn.functional.cross_entropy(net.eval()(x), y).isfinite()
    net.train()
    swap(net, mean)
    for a, b in zip(train(net, optimizer, range(4, 7)), train(other, undisturbed, range(4, 7)), strict=True):
        assert all(same_bits(p, q) for p, q in zip(a, b, strict=True))


def swap(net: nn.Module, mean: AveragedModel) -> None:
    with torch.no_grad():
        for param, average in zip(net.parameters(), mean.module.parameters(), strict=True):
            kept = param.clone()
            param.copy_(average)
            average.copy_(kept)


@pytest.mark.parametrize("storage", ["full", "tied"])
def test_factors_of_an_average_are_made_anew_where_it_differs(storage):
    """By `init`, as at the start; and momenta start at 0 there, and nowhere else."""
    net = build_net()
    options = {"storage": storage, "betas": (0.9, 0.99), "init": "balanced"}
    optimizer = SteepestDescent(net[0].parameters(), lr=0.02, q=1.5, weight_decay=0.1, depth=3, **options)
    mean = AveragedModel(net, **AVERAGES["EMA"])
    train(net, optimizer, range(4), lambda: mean.update_parameters(net))
    weight = net[0].weight
    average = mean.module[0].weight
    average.data[::2] = weight.data[::2]  # half of the coordinates do not change
    state = optimizer.state[weight]
    before = {name: tensor.clone() for name, tensor in state.items()}
    with torch.no_grad():
        weight.copy_(average)
    factors = optimizer.factors(weight)
    product = factors[0].double() * factors[1].double() * factors[2].double()
    torch.testing.assert_close(product, weight.double(), rtol=4 * PEER_RTOL, atol=0)
    changed = torch.zeros(13, 7, dtype=torch.bool)
    changed[1::2] = True
    for name, tensor in state.items():
        assert torch.equal(tensor[~changed], before[name][~changed])
        if name.startswith("momentum"):
            assert not tensor[changed].any()
            assert before[name][changed].all()
    fresh = SteepestDescent([nn.Parameter(weight.detach().clone())], depth=3, q=1.5, **options)
    for ours, expected in zip(factors, fresh.factors(fresh.param_groups[0]["params"][0]), strict=True):
        assert torch.equal(ours[changed], expected[changed])
