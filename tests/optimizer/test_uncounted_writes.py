"""Writes that no version counter tells at depth > 1, through .data or by other processes, and weights that could never move."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
from torch import nn

from pysteep import SteepestDescent, param_groups
from pysteep._state import plan, writes

STORAGES = ("tied", "full", "implicit")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 10), nn.Tanh(), nn.Linear(10, 3))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 80).view(4, 20)).square().sum().backward()
    optimizer.step()


def largest(model: nn.Module) -> float:
    return max(float(param.detach().abs().max()) for param in model.parameters())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_clipped_weights_stay_clipped(storage, rounding, caplog):
    """WGAN's clipping: after a step no weight is further from the bound than one step leads, and that is said once."""
    model = net().bfloat16() if rounding == "compensated" else net()
    model.register_forward_pre_hook(lambda module, args: args[0].to(module[0].weight.dtype))
    optimizer = SteepestDescent(
        model.named_parameters(), lr=1e-3, depth=3, storage=storage, init="lambda", scale=1.0, rounding=rounding
    )
    for _ in range(8):
        step(model, optimizer)
        for param in model.parameters():
            param.data.clamp_(-0.01, 0.01)
    step(model, optimizer)
    assert 0.01 < largest(model) < 0.02
    told = [record.getMessage() for record in caplog.records if "through .data" in record.getMessage()]
    assert len(told) == (storage != "implicit")
    assert all(text.startswith("0.weight was written to through .data") for text in told)


def test_an_average_copied_into_the_model(caplog):
    """torch_ema's copy_to, without a restore: all parameters at once, at a single step."""
    model = net()
    optimizer = SteepestDescent(model.parameters(), lr=1e-3, depth=3)
    for _ in range(5):
        step(model, optimizer)
    averages = [torch.full_like(param, 0.02) for param in model.parameters()]
    for param, average in zip(model.parameters(), averages, strict=True):
        param.data.copy_(average)
    step(model, optimizer)
    assert all(float((param.detach() - 0.02).abs().max()) < 5e-3 for param in model.parameters())
    assert caplog.text.count("through .data") == 1


@pytest.mark.parametrize("samples", ["served", "without the extension"])
def test_a_single_write_to_one_of_many(samples, caplog, monkeypatch):
    """Most elements of one parameter, once: the step that follows finds it, whichever it is and whenever."""
    if samples != "served":
        monkeypatch.setattr(writes, "Samples", writes.PythonSamples)
    for written in range(6):
        model, caplog_before = net(), caplog.text.count("through .data")
        optimizer = SteepestDescent(model.parameters(), lr=1e-3, depth=3)
        for _ in range(3 + written):
            step(model, optimizer)
        assert caplog.text.count("through .data") == caplog_before
        param = list(model.parameters())[written]
        param.data.zero_()
        step(model, optimizer)
        assert float(param.detach().abs().max()) < 0.01
        assert caplog.text.count("through .data") == caplog_before + 1


def test_samples_are_of_the_memory_that_was_noted():
    """Blocks of other addresses or sizes are not read."""
    blocks = [torch.arange(100.0), torch.arange(3.0), torch.empty(0)]
    marks = [(0, block.data_ptr(), block.nbytes) for block in blocks]
    for kind in {writes.Samples, writes.PythonSamples}:
        samples = kind(marks, [400, 12, 0])
        assert samples.note(marks)
        assert not samples.changed(marks)
        blocks[1][2] += 1
        assert samples.changed(marks)
        assert not samples.changed(marks[::-1])
        assert not samples.note(marks[:2])
        shorter = [(0, address, min(size, 8)) for _, address, size in marks]
        assert not samples.changed(shorter)
        assert not samples.note(shorter)
        assert samples.note(marks)
        found = 0
        for i in range(100):  # each element lies among the bytes that are kept at 8 of 93 turns
            blocks[0][i] += 1
            found += samples.changed(marks)
            assert samples.note(marks)
        assert 1 <= found <= 30


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "a column"])
def test_one_parameter_of_any_layout(layout, caplog):
    memory = torch.randn(6, 4, 3, 3)
    if layout == "channels_last":
        memory = memory.to(memory_format=torch.channels_last)
    param = nn.Parameter(memory[:, :1] if layout == "a column" else memory)
    optimizer = SteepestDescent([param], lr=1e-3, depth=2)
    for _ in range(4):
        param.grad = torch.ones_like(param)
        optimizer.step()
        memory.data[:, 1:] += layout == "a column"  # which are not the parameter's
    assert not caplog.text
    param.data.fill_(7.0)
    optimizer.step()
    assert float((param.detach() - 7).abs().max()) < 0.1
    assert caplog.text.count("param 0 was written to through .data") == 1


@pytest.mark.parametrize("state", ["tied", "full", "compensated", "momentum"])
def test_data_of_another_shape_is_refused(state):
    """Also where it begins at the very same address: what is past its end is not read."""
    memory = torch.randn(1000)
    param = nn.Parameter(memory)
    optimizer = SteepestDescent(
        [("w", param)],
        lr=1e-3,
        depth=3,
        storage="full" if state == "full" else "tied",
        rounding="compensated" if state == "compensated" else "nearest",
        betas=(0.9, 0.9) if state == "momentum" else (0, 0),
    )
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
    for other in (memory[:10], memory.view(10, 100), torch.ones(2000)):
        param.data = other
        before = other.clone()
        param.grad = torch.ones_like(param)
        with pytest.raises(ValueError, match=r"(shape|got) \(1000,\)"):
            optimizer.step()
        assert torch.equal(param, before)
    optimizer.state.pop(param)
    optimizer.step()
    assert optimizer.state[param]["factor_1"].shape == (2000,)


def test_counted_writes_are_no_reason_to_warn(caplog):
    model = net()
    optimizer = SteepestDescent(model.parameters(), lr=1e-3, depth=3)
    for _ in range(8):
        step(model, optimizer)
        with torch.no_grad():
            for param in model.parameters():
                param.clamp_(-0.01, 0.01)
    step(model, optimizer)
    assert largest(model) < 0.02
    assert not caplog.text
    assert not optimizer._memory.writes_uncounted


def test_a_diverged_run_is_no_reason_to_warn(caplog):
    param = nn.Parameter(torch.randn(5))
    optimizer = SteepestDescent([param], lr=1e-3, depth=3)
    for _ in range(4):
        param.grad = torch.full_like(param, torch.nan)
        optimizer.step()
    assert param.isnan().all()
    assert not caplog.text


@pytest.mark.parametrize("storage", STORAGES)
def test_memory_that_processes_share(storage):
    shared = net().share_memory()

    def made(params) -> SteepestDescent:
        return SteepestDescent(params, lr=1e-3, depth=3, storage=storage, init="balanced")

    if storage == "implicit":
        step(shared, made(shared.named_parameters()))
        return
    with pytest.raises(ValueError, match=r"storage must be 'implicit' at depth > 1 for 0\.weight, which is in shared memory"):
        made(shared.named_parameters())
    SteepestDescent(shared.parameters(), lr=1e-3)
    for steps in (0, 1):
        model = net()
        optimizer = made(model.named_parameters())
        for _ in range(steps):
            step(model, optimizer)
        model.share_memory()
        before = [param.detach().clone() for param in model.parameters()]
        with pytest.raises(ValueError, match=r"0\.weight, which is in shared memory"):
            step(model, optimizer)
        assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("storage", STORAGES)
def test_zeros_that_would_never_move_are_named(storage, caplog):
    """LoRA's B: one warning, with the cure, which works."""
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 4))
    nn.init.zeros_(model[1].weight)
    with torch.no_grad():
        model[0].weight[0] = 0
    target = torch.ones(7, 4)

    def loss_after(steps: int, **options) -> float:
        optimizer = SteepestDescent(param_groups(model, depth=2), lr=0.01, storage=storage, **options)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (model(torch.ones(7, 5)) - target).square().mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    with caplog.at_level(logging.WARNING, "pysteep"):
        loss_after(3, init="balanced")
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["1.weight"]
    assert "init='lambda' with a scale" in caplog.text
    assert not model[1].weight.any()
    caplog.clear()
    loss_after(100, init="lambda", scale=0.5)
    assert model[1].weight.any()
    assert not caplog.text


def stepped(optimizer: SteepestDescent, param: nn.Parameter, steps: int = 1) -> None:
    for _ in range(steps):
        param.grad = torch.ones_like(param)
        optimizer.step()


@pytest.mark.parametrize(
    "change",
    [
        {"betas": (0.9, 0.99)},
        {"rounding": "stochastic"},
        {"q": 1},
        {"q": 1.5},
        {"weight_decay": 0.1},
        {"state_dtype": torch.float32},
    ],
    ids=str,
)
def test_a_write_through_data_beside_a_change_of_options_is_found(change):
    param = nn.Parameter(torch.rand(8) + 0.5)
    optimizer = SteepestDescent([param], lr=1e-3, depth=3, init="balanced")
    stepped(optimizer, param, 3)
    param.data.fill_(5.0)
    optimizer.param_groups[0] |= change
    stepped(optimizer, param)
    assert float((param.detach() - 5).abs().max()) < 0.2


@pytest.mark.parametrize("look", [lambda o, p: o.factors(p), lambda o, _: o.refactor_()], ids=["factors", "refactor_"])
def test_a_look_at_the_factors_leaves_the_samples(look):
    param = nn.Parameter(torch.rand(8) + 0.5)
    optimizer = SteepestDescent([param], lr=1e-3, depth=3, init="balanced")
    stepped(optimizer, param, 3)
    look(optimizer, param)
    param.data.fill_(5.0)
    stepped(optimizer, param)
    assert float((param.detach() - 5).abs().max()) < 0.2


def test_many_plans_in_a_process(monkeypatch):
    """More than are kept."""
    monkeypatch.setattr(plan, "_plan_of", functools.lru_cache(maxsize=2)(plan._plan_of.__wrapped__))
    params = [nn.Parameter(torch.rand(8) + 0.5) for _ in range(5)]
    groups = [{"params": [param], "scale": 0.1 + i / 10, "init": "lambda"} for i, param in enumerate(params)]
    optimizer = SteepestDescent(groups, lr=1e-3, depth=3)
    for _ in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    for param in params:
        param.data.fill_(5.0)
    optimizer.step()
    assert all(float((param.detach() - 5).abs().max()) < 0.2 for param in params)
