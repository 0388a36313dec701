"""State dicts that are not this optimizer's own: other optimizers', older ones, other models', with entries of wrappers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pysteep import SteepestDescent

OPTIONS: dict[str, dict[str, Any]] = {
    "depth 1": {},
    "momentum": {"betas": (0.9, 0.99)},
    "stochastic": {"betas": (0.9, 0.99), "rounding": "stochastic", "seed": 5},
    "compensated": {"rounding": "compensated"},
    "tied": {"depth": 3, "betas": (0.9, 0.99)},
    "full": {"depth": 3, "storage": "full"},
    "full, compensated": {"depth": 3, "storage": "full", "rounding": "compensated"},
    "implicit": {"depth": 3, "storage": "implicit", "init": "lambda", "scale": 0.5},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def net(rows: int = 4) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, rows), nn.Linear(rows, 2)).bfloat16()


def trained(options: dict[str, Any], rows: int = 4, steps: int = 2) -> tuple[nn.Module, SteepestDescent]:
    model = net(rows)
    optimizer = SteepestDescent(model.named_parameters(), lr=0.05, weight_decay=0.1, **options)
    train(model, optimizer, steps)
    return model, optimizer


def train(model: nn.Module, optimizer: SteepestDescent, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(5, 3, dtype=torch.bfloat16)).float().square().sum().backward()
        optimizer.step()


def snapshot(optimizer: SteepestDescent) -> Any:
    return copy.deepcopy((list(optimizer.state.values()), [{**g, "params": None} for g in optimizer.param_groups]))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def assert_refused(optimizer: SteepestDescent, saved: Any, message: str, kind: type = ValueError) -> None:
    """By that message, and nothing has been loaded."""
    before = snapshot(optimizer)
    with pytest.raises(kind, match=message):
        optimizer.load_state_dict(saved)
    assert same(snapshot(optimizer), before)


@every_option
def test_every_trainable_parameter_has_an_entry_with_a_dimension(options):
    model, optimizer = trained(options)
    model[0].weight.requires_grad_(False)
    saved = optimizer.state_dict()["state"]
    assert [index in saved for index in range(1, 4)] == [True] * 3
    assert all(any(value.ndim for value in own.values()) for index, own in saved.items() if index)
    twin, other = trained(options, steps=0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares the tensors
    assert not any("placeholder" in own for own in other.state.values())
    twin.load_state_dict(model.state_dict())
    model[0].weight.requires_grad_()
    train(model, optimizer, 2)
    train(twin, other, 2)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@every_option
def test_as_older_versions_saved_it(options):
    """Without entries where there was no state, with a count of steps that was called "step"."""
    model, optimizer = trained(options)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"] = {
        index: held
        for index, own in saved["state"].items()
        if (held := {name: value for name, value in own.items() if name != "placeholder"})
    }
    for group in saved["param_groups"]:
        if "rounding_step" in group:
            group["step"] = group.pop("rounding_step")
    twin, other = trained(options, steps=0)
    other.load_state_dict(saved)
    twin.load_state_dict(model.state_dict())
    train(model, optimizer, 2)
    train(twin, other, 2)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize("missing", ["q", "betas", "maximize", "normalize", "weight_decay", "rounding", "lr", "state_dtype"])
def test_an_option_that_is_missing_stays(missing):
    _, optimizer = trained({"betas": (0.5, 0.9), "q": 1.25, "maximize": True})
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0][missing]
    model, other = trained({"betas": (0.1, 0.2), "q": 1.75})
    own = other.param_groups[0][missing]
    other.load_state_dict(saved)
    assert other.param_groups[0][missing] == own
    train(model, other, 1)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.SGD, {}),
        (torch.optim.AdamW, {}),
        (torch.optim.RMSprop, {}),
    ],
)
@every_option
def test_of_another_optimizer(kind, given, options):
    model = net()
    theirs = kind(model.parameters(), lr=0.1, **given)
    model(torch.ones(5, 3, dtype=torch.bfloat16)).float().sum().backward()
    theirs.step()
    _, ours = trained(options)
    assert_refused(
        ours, theirs.state_dict(), "a SteepestDescent's, whose groups have q; group 0 of this one has lr, .* another optimizer"
    )


@pytest.mark.parametrize("saved", [None, [], {}, {"state": {}}, {"param_groups": []}, "state"], ids=repr)
def test_no_state_dict_at_all(saved):
    _, ours = trained({})
    assert_refused(ours, saved, "state_dict must be a dict with 'state' and 'param_groups'", TypeError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": None}, "'state' of state_dict must be a dict of each parameter's state; got None"),
        ({"param_groups": None}, "'param_groups' of state_dict must be a list of dicts; got None"),
        ({"param_groups": [3]}, "group 0 of state_dict must be a dict with a list of numbers as 'params'; got 3"),
        ({"param_groups": [{"q": 1.0}]}, r"group 0 of state_dict must be .* 'params'; got keys \['q'\]"),
        ({"param_groups": [{"q": 1.0, "params": None}]}, "group 0 of state_dict must be .* 'params'; got {.*None"),
        ({"state": {1: 3}}, "state_dict must hold the state of parameter 1 as a dict; got 3"),
    ],
)
@pytest.mark.parametrize("options", [{}, OPTIONS["tied"]], ids=["depth 1", "tied"])
def test_a_part_that_is_none(change, message, options):
    _, ours = trained(options)
    assert_refused(ours, {**copy.deepcopy(ours.state_dict()), **change}, message, TypeError)


@pytest.mark.parametrize("storage", ["full", "tied"])
@pytest.mark.parametrize("name", ["factor_rest", "momentum_rest", "factor_3"])
def test_factors_without_the_first(storage, name):
    _, ours = trained({"depth": 3, "storage": storage})
    saved = copy.deepcopy(ours.state_dict())
    own = saved["state"][0]
    saved["state"][0] = {name: own["factor_1"]}
    role = name.split("_")[0]
    assert_refused(ours, saved, rf"state_dict must hold the {role}s of 0.weight as {role}_1, .*; got \['{name}'\]")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": 3.0}, r"group 0 of state_dict: q must be a number in \[1, 2\]"),
        ({"lr": -1.0}, "group 0 of state_dict: lr must be"),
        ({"betas": (1.0, 0.0)}, "group 0 of state_dict: betas must be"),
        ({"rounding": "up"}, "group 0 of state_dict: rounding must be one of"),
    ],
)
def test_an_option_out_of_its_range(change, message):
    _, optimizer = trained({})
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0] |= change
    assert_refused(optimizer, saved, message)


@pytest.mark.parametrize("options", [o for name, o in OPTIONS.items() if name not in ("depth 1", "implicit")])
def test_of_a_model_of_other_shapes(options):
    _, ours = trained(options)
    _, theirs = trained(options, rows=6)
    assert_refused(ours, theirs.state_dict(), r"of 0\.weight in shape \(4, 3.*\), its parameter being \(4, 3\); got \(6, 3.*\)")


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_balance_that_is_none(value):
    _, ours = trained(OPTIONS["implicit"])
    saved = copy.deepcopy(ours.state_dict())
    saved["state"][0]["balance"].fill_(value)
    assert_refused(ours, saved, r"balance of 0\.weight as one finite number >= 0")


@pytest.mark.parametrize("entry", [3.0, None, torch.ones(4, 3, dtype=torch.int32)], ids=["float", "None", "int32"])
def test_a_factor_that_is_none(entry):
    _, ours = trained(OPTIONS["full"])
    saved = copy.deepcopy(ours.state_dict())
    saved["state"][0]["factor_2"] = entry
    assert_refused(ours, saved, r"state_dict must hold factor_2 of 0\.weight")


@pytest.mark.parametrize("storage", ["full", "tied"])
def test_a_nan_in_a_loaded_factor_stays(storage):
    model, optimizer = trained({"depth": 3, "storage": storage})
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["factor_1"][1, 2] = float("nan")
    optimizer.load_state_dict(saved)
    train(model, optimizer, 1)
    assert model[0].weight.isnan().nonzero().tolist() == [[1, 2]]
    with torch.no_grad():
        model[0].weight[1, 2] = 0.5  # a write from outside makes the factors anew
    train(model, optimizer, 1)
    assert model[0].weight.isfinite().all()


@every_option
def test_entries_of_a_wrapper_are_left_alone(options):
    """As Lookahead and ScheduleFree of pytorch_optimizer keep them, in the state and in the groups."""
    model, optimizer = trained(options)
    foreign = {"momentum_buffer": torch.ones(3), "momentumish": 1, "factor_x": 5, "slow": torch.zeros(2), "balanced": True}
    for param in model.parameters():
        optimizer.state[param] |= copy.deepcopy(foreign)
    optimizer.param_groups[0] |= {"step": 7, "train_mode": True}
    plain, alone = trained(options)
    optimizer.refactor_()
    alone.refactor_()
    train(model, optimizer, 2)
    train(plain, alone, 2)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    assert optimizer.param_groups[0]["step"] == 7
    twin, other = trained(options, steps=0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares the tensors
    twin.load_state_dict(model.state_dict())
    for loaded in (optimizer, other):
        assert loaded.param_groups[0]["train_mode"] is True
        for param in loaded.param_groups[0]["params"]:
            assert same({name: loaded.state[param][name] for name in foreign}, foreign)
    train(model, optimizer, 1)
    train(twin, other, 1)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
