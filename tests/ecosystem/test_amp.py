"""torch.amp: GradScaler's protocol and autocast, at depth 1 and with every storage."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pysteep import SteepestDescent
from tests.support.cases import same_bits
from tests.support.optimizer_cases import CASES


def build(case, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(9, 13), nn.Tanh(), nn.Linear(13, 3))
    options = {"lr": 0.01, "q": 1.5, "weight_decay": 0.1, **CASES[case], "maximize": False}
    return net, SteepestDescent(net.parameters(), **options)


def batch(k):
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(16, 9, generator=generator)
    return x, x[:, :3].square()


def loss_of(net, k):
    x, y = batch(k)
    return (net(x) - y).square().mean()


def everything(net, optimizer):
    """Copies of all that a step writes to."""
    state = [tensor.clone() for p in net.parameters() for tensor in optimizer.state[p].values()]
    return [p.detach().clone() for p in net.parameters()] + state


def all_same(first, second):
    return len(first) == len(second) and all(map(same_bits, first, second))


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_scaled_gradients_step_as_plain_ones(case, unscale):
    """Also accumulated over two batches, and clipped after `unscale_`. Scales are powers of two, so that no bit differs."""
    (net, ours), (plain, bare) = build(case), build(case)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    for k in range(4):
        for own, optimizer, scale in ((net, ours, scaler.scale), (plain, bare, lambda loss: loss)):
            optimizer.zero_grad()
            for part in (2 * k, 2 * k + 1):
                scale(loss_of(own, part) / 2).backward()
        if unscale:
            scaler.unscale_(ours)
            norms = [nn.utils.clip_grad_norm_(own.parameters(), 0.3) for own in (net, plain)]
            assert norms[0] == norms[1] > 0.3
        gradients = [p.grad.clone() for p in net.parameters()]
        scaler.step(ours)
        scaler.update()
        assert all(map(same_bits, gradients, [p.grad for p in net.parameters()]))
        assert not hasattr(ours, "grad_scale"), "the scaler takes its tensors back"
        bare.step()
        assert all_same(everything(net, ours), everything(plain, bare))
    assert scaler.get_scale() == 1024.0


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("case", CASES)
def test_an_infinity_anywhere_stops_every_write(case, value, unscale):
    net, optimizer = build(case)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for k in range(2):
        optimizer.zero_grad()
        scaler.scale(loss_of(net, k)).backward()
        scaler.step(optimizer)
        scaler.update()
    before = everything(net, optimizer)
    for k in (2, 3):
        optimizer.zero_grad()
        scaler.scale(loss_of(net, k)).backward()
        if k == 2:
            net[2].bias.grad[1] = value
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert all_same(everything(net, optimizer), before) == (k == 2)
    assert scaler.get_scale() == 128.0


@pytest.mark.parametrize("case", CASES)
def test_an_infinity_in_the_first_step_makes_no_other_state(case):
    """State may be made by a step that writes nothing; the next step is the first one."""
    (net, ours), (plain, bare) = build(case), build(case)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for k in range(3):
        ours.zero_grad()
        scaler.scale(loss_of(net, k)).backward()
        if k == 0:
            net[0].weight.grad[3, 3] = torch.inf
        scaler.step(ours)
        scaler.update()
        if k > 0:
            bare.zero_grad()
            loss_of(plain, k).backward()
            bare.step()
    assert all_same(everything(net, ours), everything(plain, bare))


def test_one_scaler_for_several_optimizers():
    """Each has a found_inf of its own: the one whose gradients are finite steps, and as it would alone."""
    first, second = build("tied, momentum"), build("implicit", seed=1)
    (alone, bare), stopped = build("implicit", seed=1), build("tied, momentum")
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for k in range(3):
        for net, optimizer in (first, second):
            optimizer.zero_grad()
            scaler.scale(loss_of(net, k)).backward()
        if k == 1:
            first[0][0].weight.grad[0, 0] = torch.inf
        scaler.unscale_(second[1])
        for _, optimizer in (first, second):
            scaler.step(optimizer)
        scaler.update()
        for net, optimizer in ((alone, bare), stopped):
            if net is alone or k != 1:
                optimizer.zero_grad()
                loss_of(net, k).backward()
                optimizer.step()
    assert all_same(everything(*second), everything(alone, bare))
    assert all_same(everything(*first), everything(*stopped))
    assert scaler.get_scale() == 128.0


@pytest.mark.parametrize("case", CASES)
def test_autocast(case):
    """float32 weights and state, bfloat16 products; the gradients that come are stepped as any."""
    net, optimizer = build(case)
    optimizer.param_groups[0]["lr"] = 0.03
    losses, (x, y) = [], batch(0)
    for k in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = net(x)
        assert output.dtype == torch.bfloat16
        loss = (output.float() - y).square().mean()
        loss.backward()
        if k == 20:
            twin, other = copy.deepcopy((net, optimizer))
            for p, q in zip(twin.parameters(), net.parameters(), strict=True):
                p.grad = q.grad.clone()
        optimizer.step()
        if k == 20:
            other.step()
            assert all_same(everything(net, optimizer), everything(twin, other))
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert {t.dtype for t in everything(net, optimizer)} <= {torch.float32, torch.float64}


@pytest.mark.parametrize("case", CASES)
def test_a_step_inside_autocast_is_the_step(case):
    (net, ours), (plain, bare) = build(case), build(case)
    for k in range(3):
        for own, optimizer in ((net, ours), (plain, bare)):
            optimizer.zero_grad()
            loss_of(own, k).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=own is net):
                optimizer.step()
    assert all_same(everything(net, ours), everything(plain, bare))


@pytest.mark.parametrize("case", ["depth 1, momentum, normalized", "tied, momentum", "implicit"])
def test_a_compiled_step_under_a_scaler(case):
    """`scaler.step` calls optimizer.step, which may be the compiled one: found_inf and grad_scale are tensors of the graph."""
    torch._dynamo.reset()
    (net, ours), (plain, bare) = build(case), build(case)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    ours.step = torch.compile(ours.step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for k in range(4):
            ours.zero_grad()
            scaler.scale(loss_of(net, k)).backward()
            if k == 2:
                net[0].weight.grad[0, 0] = torch.inf
            scaler.step(ours)
            scaler.update()
            if k != 2:
                bare.zero_grad()
                loss_of(plain, k).backward()
                bare.step()
    assert all_same(everything(net, ours), everything(plain, bare))
