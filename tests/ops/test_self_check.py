"""A backend that computes garbage is found before it serves, named, and the next one serves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import pysteep
from pysteep import SteepestDescent, flow, functional, vote
from pysteep._ops import dispatch, self_check
from pysteep.kernels.rounding import MODES
from tests.support.cases import BACKENDS

CPU = torch.device("cpu")
OPS = {path.stem for path in Path(pysteep.kernels.reference.__file__).parent.glob("[a-z]*.py")} - {"rounding", "signed_power"}
FIRST, *OTHERS = BACKENDS


@pytest.fixture(autouse=True)
def _afresh():
    """Nothing is known of any backend, before and after."""
    forget()
    yield
    forget()


def forget():
    dispatch._failures.clear()
    dispatch._passed.clear()
    dispatch.forget_choices()


def leave_to_the_reference():
    """What the first backend does not serve: others would take seconds to compile."""
    for name in set(OTHERS) - {"reference"}:
        dispatch._failures[name] = "left out"
    dispatch.forget_choices()


def other_power(options):
    return {**options, "q": options["q"] + 0.1}


def other_rate_if_compensated(options):
    return {**options, "lr": 0.5} if options["rounding"].mode == "compensated" else options


def other_rounding(**changes):
    return lambda options: {**options, "rounding": options["rounding"]._replace(**changes)}


BROKEN = {
    "steepest_step": ("steepest_step", "steepest_step", other_power),
    "factor_step": ("factor_step", "factor_step", other_power),
    "mirror_step": ("mirror_step", "mirror_step", other_power),
    "diagonal_flow": ("diagonal_flow", "diagonal_flow", other_power),
    "stochastic": ("steepest_step", "steepest_step", other_rounding(seed=5)),
    "compensated": ("steepest_step", "steepest_step", other_rate_if_compensated),
    "factor_product": ("factor_product", "factor_product_backward", None),
    "sign_vote": ("sign_vote", "count_votes", None),
}
"""For each family the op, its function to break, and how: other options, or a result of zeros."""


def break_home(monkeypatch, name, family):
    op, function, other = BROKEN[family]
    home = pysteep.backends()[name].home(op)
    kernel = getattr(home, function)

    def broken(*operands, **options):
        if other is not None:
            return kernel(*operands, **other(options))
        kernel(*operands, **options)
        last = operands[-1]
        (last[-1] if isinstance(last, list) else last).zero_()
        return None

    monkeypatch.setattr(home, function, broken)


def use(family, backend=None):
    """Have the family served once."""
    w, g = [torch.ones(5)], [torch.ones(5)]
    if family in MODES:
        narrow = [w[0].bfloat16()]
        low = [torch.zeros(5, dtype=torch.int16)] if family == "compensated" else None
        functional.steepest_step(narrow, [g[0].bfloat16()], lr=0.1, rounding=family, compensations=low, backend=backend)
    elif family == "steepest_step":
        functional.steepest_step(w, g, lr=0.1, backend=backend)
    elif family == "factor_step":
        functional.factor_step(w, g, [[torch.ones(5)] * 2], depth=2, lr=0.1, backend=backend)
    elif family == "mirror_step":
        functional.mirror_step(w, g, [torch.ones((), dtype=torch.float64)], depth=3, lr=0.1, backend=backend)
    elif family == "factor_product":
        functional.factor_product([*w, *g], backend=backend)
    elif family == "sign_vote":
        vote.pack_signs(g[0], backend=backend)
    else:
        problem = flow.regression(k=3, n=4, support=1)
        flow.simulate(problem, q=1.5, lr=0.1, depth=3, steps=1, backend=backend)


def test_every_op_and_rounding_has_a_check():
    assert set(self_check.CHECKS) == OPS | set(MODES[1:]) == set(BROKEN)


@pytest.mark.parametrize("family", self_check.CHECKS)
@pytest.mark.parametrize("name", [FIRST, "reference"])
def test_a_sound_backend_passes(name, family):
    found = pysteep.backends()
    assert self_check.failure(found[name], found["reference"], CPU, family) == ""


@pytest.mark.parametrize("family", self_check.CHECKS)
def test_a_broken_backend_is_passed_over(family, monkeypatch, caplog):
    break_home(monkeypatch, FIRST, family)
    leave_to_the_reference()
    with caplog.at_level("WARNING", logger="pysteep"):
        use(family)
    found = pysteep.backends()[FIRST]
    assert not found.available
    assert f"its check of {family} gave " in found.reason
    (record,) = caplog.records
    assert record.message.startswith(f"cpu tensors are served by reference; not by {FIRST}: {found.reason}")
    with pytest.raises(RuntimeError, match=rf"backend '{FIRST}' cannot serve here: its check of {family} gave "):
        use(family, FIRST)


def test_a_backend_that_was_asked_for_raises_before_anything_is_written(monkeypatch):
    break_home(monkeypatch, FIRST, "steepest_step")
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = SteepestDescent([param], lr=0.1, backend=FIRST)
    with pytest.raises(RuntimeError, match=f"backend '{FIRST}' cannot serve here: its check of steepest_step gave"):
        optimizer.step()
    assert param.tolist() == [1.0] * 3
    with pytest.raises(RuntimeError, match="cannot serve here"):
        SteepestDescent([param], backend=FIRST)


def test_a_backend_whose_kernel_raises_is_passed_over(monkeypatch):
    def broken(*_, **__):
        raise OSError("no such instruction")

    monkeypatch.setattr(pysteep.backends()[FIRST].home("steepest_step"), "steepest_step", broken)
    leave_to_the_reference()
    use("steepest_step")
    assert pysteep.backends()[FIRST].reason == "its check of steepest_step raised OSError('no such instruction')"
    assert pysteep.serving("cpu") == "reference"


def test_what_serving_names_has_passed(monkeypatch):
    break_home(monkeypatch, FIRST, "steepest_step")
    leave_to_the_reference()
    assert pysteep.serving("cpu") == "reference"


def test_want_of_memory_is_no_fault_of_the_backend(monkeypatch):
    def hungry(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(pysteep.backends()[FIRST].home("steepest_step"), "steepest_step", hungry)
        with pytest.raises(torch.OutOfMemoryError):
            use("steepest_step")
    use("steepest_step")
    assert pysteep.serving("cpu") == FIRST


@pytest.mark.parametrize("mode", [torch.inference_mode, FakeTensorMode, torch.autocast])
def test_a_check_is_out_of_reach_of_the_callers_modes(mode):
    w, g = torch.ones(5), torch.ones(5)
    with mode(*(["cpu"] if mode is torch.autocast else [])):
        if mode is not FakeTensorMode:
            functional.steepest_step([w.clone()], [g.clone()], lr=0.1)
        assert pysteep.serving("cpu") == FIRST
    assert pysteep.backends()[FIRST].available


def test_a_check_is_made_once(monkeypatch):
    asked = []
    monkeypatch.setattr(self_check, "failure", lambda *given: asked.append(given[-1]) or "")
    for _ in range(3):
        use("steepest_step")
        use("stochastic")
    assert asked == ["steepest_step", "stochastic"]
