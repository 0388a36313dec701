"""SteepestDescent over drawn groups, dtypes, layouts, options, homes and events, each step against the float64 definition."""

from __future__ import annotations

import io
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from pysteep import SteepestDescent
from pysteep._state.rounding import int16_of
from tests.support.cases import EXACT_QS, cpu_homes, home_of, same_bits
from tests.support.step_check import Check, Repair
from tests.support.strategies import NORMS, RATES, Case, Described, bad_option, cases, group_options, groups, parameters

HOMES = [home for home in cpu_homes() if home != "numba"]

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")

common = hypothesis.settings(
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)


class Run:
    """An optimiser of one home, and beside it one of the reference to which the same happens."""

    def __init__(self, case: Case, backend: str) -> None:
        torch.manual_seed(case.seed)
        self.case, self.backend = case, backend
        self.joining = [case.groups[-1]]
        self.described: list[list[Described]] = []
        self.exact: list[bool] = []  # of each group, whether all homes must agree to the last bit
        built: tuple[list[Any], list[Any]] = [], []
        for group in case.groups[:-1]:
            for both, entry in zip(built, self.group(*group), strict=True):
                both.append(entry)
        self.optimizers = [SteepestDescent(b, backend=n) for b, n in zip(built, (backend, "reference"), strict=True)]

    def group(self, options: dict[str, Any], described: list[Described]) -> list[dict[str, Any]]:
        """The same parameter group twice."""
        self.described.append(described)
        self.exact.append(options["q"] in EXACT_QS and not options["normalize"] and options["storage"] != "implicit")
        values = [one.value() for one in described]
        twins = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype).copy_(v) for v in values]
        return [{**options, "params": [nn.Parameter(v) for v in each]} for each in (values, twins)]

    def pairs(self):
        """(group, twin group, what describes its parameters, whether it is exact)."""
        own, twin = (optimizer.param_groups for optimizer in self.optimizers)
        return zip(own, twin, self.described, self.exact, strict=True)

    def run(self) -> None:
        for action in self.case.actions:
            getattr(self, action.name)(action.number)
            self.compare()

    def compare(self) -> None:
        own, twin = self.optimizers
        for group, other, _, exact in self.pairs():
            assert group.get("rounding_step") == other.get("rounding_step")
            for p, q in zip(group["params"], other["params"], strict=True):
                if not exact:
                    continue
                assert same_bits(p.detach(), q.detach())
                assert own.state[p].keys() == twin.state[q].keys()
                for name, t in own.state[p].items():
                    assert t.dtype == twin.state[q][name].dtype
                    assert same_bits(t, twin.state[q][name]), name

    # ---- what happens

    def step(self, number: int) -> None:
        amp = {"grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(float(number % 8 == 0))} if number % 4 == 0 else {}
        for index, (group, other, described, _) in enumerate(self.pairs()):
            for k, (p, q, one) in enumerate(zip(group["params"], other["params"], described, strict=True)):
                p.grad_dtype = q.grad_dtype = None
                absent = (number >> (4 + index + 2 * k)) % 4 == 0
                p.grad = None if absent else one.gradient()
                q.grad = None if absent else p.grad.clone()
        own, twin = self.optimizers
        clip = {"total_norm": NORMS[number % len(NORMS)], "max_norm": 1.0} if number % 5 == 0 else {}
        scale = float(amp.get("grad_scale", 1.0))
        if clip:
            scale /= min(1.0, 1.0 / (float(clip["total_norm"]) / scale + 1e-6))
        skipped = bool(amp.get("found_inf", 0.0))
        checks = [Check(own, group, scale=scale, skipped=skipped) for group in own.param_groups]
        counts = [
            float(group["rounding_step"]) + (group["lr"] != 0)
            for group in own.param_groups
            if group["rounding"] == "stochastic"
        ]
        for optimizer in (own, twin):
            for name, value in amp.items():
                setattr(optimizer, name, value)
            optimizer.step(**clip)
            for name in amp:
                delattr(optimizer, name)
        for check in checks:
            check.after()
        assert [float(group["rounding_step"]) for group in own.param_groups if "rounding_step" in group] == counts

    def reload(self, number: int) -> None:
        """Into a fresh optimiser, of another storage where that is always exact."""
        for which, optimizer in enumerate(self.optimizers):
            memory = io.BytesIO()
            torch.save(optimizer.state_dict(), memory)
            memory.seek(0)
            values = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
            groups = [dict(group) for group in optimizer.param_groups]
            if number % 2:
                for group in groups:
                    group["storage"] = "full" if group["storage"] == "tied" and group["depth"] > 1 else group["storage"]
            fresh = SteepestDescent(groups, backend=optimizer.backend)
            before = optimizer.state_dict()["state"]
            fresh.load_state_dict(torch.load(memory, weights_only=True))
            with torch.no_grad():  # "saddle" has set them to 0
                for p, value in zip((p for group in fresh.param_groups for p in group["params"]), values, strict=True):
                    p.copy_(value)
            after = fresh.state_dict()["state"]
            if not number % 2:
                assert before.keys() == after.keys()
                for index, state in before.items():
                    assert state.keys() == after[index].keys()
                    assert all(same_bits(t, after[index][name]) for name, t in state.items())
            self.optimizers[which] = fresh

    def write(self, number: int) -> None:
        """To a parameter, past the optimiser: masked, set anew, or given other memory."""
        for index, (group, other, described, _) in enumerate(self.pairs()):
            k = number % len(described)
            value = described[k].value()
            mask = torch.rand(value.shape) < 0.5
            for optimizer, p in zip(self.optimizers, (group["params"][k], other["params"][k]), strict=True):
                with torch.no_grad():
                    repair = Repair(optimizer, group, p) if number % 2 and Repair.concerns(group) else None
                    if (number + index) % 3 == 0:
                        p.mul_(mask)
                    elif (number + index) % 3 == 1:
                        p.copy_(value)
                    else:
                        p.data = value.clone()
                    if repair is not None:
                        repair.after()

    def set_lr(self, number: int) -> None:
        for group, other, *_ in self.pairs():
            group["lr"] = other["lr"] = RATES[number % len(RATES)]

    def change_option(self, number: int) -> None:
        """One that a scheduler may change."""
        name, value = (("maximize", bool(number % 4)), ("weight_decay", 0.1 * (number % 4)))[number % 2]
        for group, other, *_ in self.pairs():
            group[name] = other[name] = value

    def add_group(self, _: int) -> None:
        if self.joining:
            for optimizer, group in zip(self.optimizers, self.group(*self.joining.pop()), strict=True):
                optimizer.add_param_group(group)

    def refactor(self, _: int) -> None:
        for optimizer in self.optimizers:
            optimizer.refactor_()


def check(case: Case) -> None:
    with home_of(case.home) as backend:
        Run(case, backend).run()


@hypothesis.settings(common, max_examples=200, derandomize=True)
@hypothesis.given(cases(HOMES))
def test_drawn_cases(case):
    check(case)


@pytest.mark.fuzz
@hypothesis.settings(common, max_examples=10_000)
@hypothesis.given(cases(HOMES))
def test_many_drawn_cases(case):
    check(case)


@pytest.mark.fuzz
@hypothesis.settings(common, max_examples=1000)
@hypothesis.given(cases(["numba"], narrow=True))
def test_drawn_cases_by_numba(case):
    check(case)


def state_of(optimizer: SteepestDescent) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [t for p in params for t in optimizer.state[p].values()]
    counts = [group["rounding_step"] for group in optimizer.param_groups if "rounding_step" in group]
    return [t.detach().clone() for t in (*params, *(p.grad for p in params if p.grad is not None), *states, *counts)]


def unchanged(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(map(same_bits, before, after))


@hypothesis.settings(common, max_examples=200, derandomize=True)
@hypothesis.given(
    st.lists(groups(group_options, parameters(), 2), min_size=1, max_size=2),
    bad_option,
    st.integers(0, 1 << 16),
)
def test_bad_options_write_nothing(drawn, bad, number):
    """A bad option in any group, when it is built, joins or is changed later: an error, and every bit as it was."""
    torch.manual_seed(number)
    name, value = bad
    built = [{**options, "params": [nn.Parameter(one.value()) for one in own]} for options, own in drawn]
    params = [p for group in built for p in group["params"]]
    for p, one in zip(params, (one for _, own in drawn for one in own), strict=True):
        p.grad_dtype = None
        p.grad = one.gradient()
    before = [t.detach().clone() for p in params for t in (p, p.grad)]
    at = number % len(built)
    spoilt = [{**group, name: value} if index == at else dict(group) for index, group in enumerate(built)]
    hypothesis.assume(name != "scale" or built[at]["depth"] > 1)  # at depth 1 nothing takes a scale
    with pytest.raises((ValueError, TypeError)):
        SteepestDescent(spoilt)
    assert unchanged(before, [t.detach() for p in params for t in (p, p.grad)])
    optimizer = SteepestDescent([dict(group) for group in built])
    with torch.no_grad():
        for p, old in zip(params, before[::2], strict=True):
            p.copy_(old)
    if number % 2:
        optimizer.step()
    held = state_of(optimizer)
    more = {**spoilt[at], "params": [nn.Parameter(torch.ones(3))]}
    with pytest.raises((ValueError, TypeError)):
        optimizer.add_param_group(more)
    assert len(optimizer.param_groups) == len(drawn)
    assert torch.equal(more["params"][0], torch.ones(3))
    optimizer.param_groups[at][name] = value
    with pytest.raises((ValueError, TypeError)):
        optimizer.step()
    assert unchanged(held, state_of(optimizer))


PLAIN = {"lr": 0.05, "q": 1.5, "betas": (0.9, 0.99), "weight_decay": 0.3, "coupled_weight_decay": 0.1, "depth": 1}
DEEP = {**PLAIN, "depth": 3, "storage": "full"}
IMPLICIT = {**DEEP, "storage": "implicit", "init": "lambda", "scale": 0.5, "betas": (0.0, 0.0), "coupled_weight_decay": 0.0}
COMPENSATED = {"rounding": "compensated"}
SPOILT: dict[str, tuple[dict[str, Any], torch.dtype, str, float]] = {
    "weight": (PLAIN, torch.float32, "param", 2e-5),
    "x": (DEEP, torch.float32, "param", 2e-5),
    "momentum": (PLAIN, torch.float32, "momentum", 2e-5),
    "factor": (DEEP, torch.float32, "factor_2", 2e-5),
    "x of factors that are rounded at random": ({**DEEP, "rounding": "stochastic"}, torch.bfloat16, "param", 0.01),
    "weight that is rounded at random": ({**PLAIN, "rounding": "stochastic"}, torch.float16, "param", 2e-3),
    "momentum in float32": ({**PLAIN, "state_dtype": torch.float32}, torch.bfloat16, "momentum", 2e-5),
    "compensation": ({**PLAIN, **COMPENSATED}, torch.bfloat16, "compensation", 64),
    "compensation of a float16": ({**PLAIN, **COMPENSATED}, torch.float16, "compensation", 512),
    "compensation of a factor": ({**DEEP, **COMPENSATED}, torch.bfloat16, "compensation_3", 64),
    "compensation of x": ({**IMPLICIT, **COMPENSATED}, torch.bfloat16, "compensation", 1024),
}


def stepped(options: dict[str, Any], dtype: torch.dtype) -> tuple[SteepestDescent, nn.Parameter, Check]:
    p = nn.Parameter(Described((7,), dtype, "strided", "strided", None, "plain").value())
    optimizer = SteepestDescent([p], **options, backend="reference")
    p.grad = torch.randn(7).to(dtype)
    for _ in range(2):
        step = Check(optimizer, optimizer.param_groups[0])
        optimizer.step()
        step.after()
    return optimizer, p, step


@pytest.mark.parametrize("name", SPOILT)
def test_the_check_finds_a_step_that_is_wrong(name):
    """A number a little beyond its bounds, or a state that is missing: each is seen."""
    options, dtype, spoilt, by = SPOILT[name]
    optimizer, p, step = stepped(options, dtype)
    state = optimizer.state[p]
    with torch.no_grad():
        if spoilt.startswith("compensation"):
            int16_of(state, spoilt)[3] += -by if int16_of(state, spoilt)[3] > 0 else by
        else:
            (p if spoilt == "param" else state[spoilt])[3] *= 1 + by
    with pytest.raises(AssertionError):
        step.after()
    if spoilt != "param":
        del state[spoilt]
        with pytest.raises((AssertionError, KeyError)):
            step.after()


@pytest.mark.parametrize("options", [PLAIN, DEEP, IMPLICIT], ids=["plain", "deep", "implicit"])
def test_the_check_finds_writes_to_what_is_not_the_step_s(options):
    """A gradient, or memory around a parameter."""
    _, p, step = stepped(options, torch.float32)
    p.grad[1] = 5.0
    with pytest.raises(AssertionError, match="a gradient was written"):
        step.after()
    _, p, step = stepped(options, torch.float32)
    torch.empty(0).set_(p.untyped_storage())[0] = 1.0
    with pytest.raises(AssertionError, match="memory around"):
        step.after()


@pytest.mark.parametrize(("spoilt", "at"), [("compensation_2", 3), ("momentum_2", 3), ("compensation_2", 4), ("factor_1", 4)])
def test_the_check_finds_a_repair_that_is_wrong(spoilt, at):
    """Element 3 is written to: there what belongs to a factor is 0, elsewhere everything stays."""
    optimizer, p, _ = stepped({**DEEP, **COMPENSATED}, torch.bfloat16)
    repair = Repair(optimizer, optimizer.param_groups[0], p)
    with torch.no_grad():
        p[3] = 2.5
    repair.after()
    state = optimizer.state[p]
    (int16_of(state, spoilt) if spoilt.startswith("compensation") else state[spoilt])[at] += 1
    with pytest.raises(AssertionError, match=spoilt):
        repair.after()
