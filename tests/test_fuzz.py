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
from pysteep._depth import Depth
from pysteep.kernels.reference import factor_step as reference
from pysteep.kernels.reference.signed_power import signed_power
from pysteep.kernels.reference.steepest_step import compute_dtype
from tests.cases import EXACT_QS, cpu_homes, float64_bounds, home_of, same_bits, surroundings
from tests.strategies import RATES, Action, Case, Described, bad_option, cases, compatible, group_options, parameters
from tests.test_mirror_step import exact_step
from tests.tolerances import EPS, MIRROR_ROUNDINGS, STEP_ROUNDINGS, SUM_RTOL

HOMES = [home for home in cpu_homes() if home != "numba"]
LARGEST = {torch.float16: 6e4}  # beyond it the storage overflows; 1e15 elsewhere, where products of factors soon would

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")

common = hypothesis.settings(
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def inside(found: Tensor, low: Tensor, high: Tensor, size: Tensor | float = 0.0) -> bool:
    """Whether every element is between its bounds, or is of such a size that it may have overflowed."""
    limit = LARGEST.get(found.dtype, 1e15)
    found = found.detach().double()
    large = torch.maximum(torch.maximum(low.abs(), high.abs()), torch.as_tensor(size, dtype=torch.float64))
    return bool((((low <= found) & (found <= high)) | ~(large < limit)).all())


def spacing(dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps


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
        checks = [Check(own, group, amp) for group in own.param_groups]
        for optimizer in (own, twin):
            for name, value in amp.items():
                setattr(optimizer, name, value)
            optimizer.step()
            for name in amp:
                delattr(optimizer, name)
        for check in checks:
            check.after()

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
            for p in (group["params"][k], other["params"][k]):
                with torch.no_grad():
                    if (number + index) % 3 == 0:
                        p.mul_(mask)
                    elif (number + index) % 3 == 1:
                        p.copy_(value)
                    else:
                        p.data = value.clone()

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


class Check:
    """One group's step: all tensors before it, and after it whether they are what float64 says."""

    def __init__(self, optimizer: SteepestDescent, group: dict[str, Any], amp: dict[str, Tensor]) -> None:
        self.optimizer, self.group, self.amp = optimizer, group, amp
        self.before = []
        for p in group["params"]:
            if group["depth"] > 1 and p.grad is not None:
                optimizer.factors(p)  # makes them if that is due
            state = {name: t.clone() for name, t in optimizer.state[p].items()}
            grad = None if p.grad is None else p.grad.detach().clone()
            self.before.append((p.detach().clone(), grad, state, surroundings(p.detach()) if p.numel() else None))

    def after(self) -> None:
        group, lr = self.group, float(self.group["lr"])
        skipped = bool(self.amp) and float(self.amp["found_inf"]) != 0
        scale = float(self.amp["grad_scale"]) if self.amp else 1.0
        step = {name: group[name] for name in ("q", "betas", "weight_decay", "coupled_weight_decay")} | {"lr": lr}
        sign = -1 if group["maximize"] else 1
        gradients = [None if g is None else sign * g.to(compute_dtype(x.dtype)).double() / scale for x, g, *_ in self.before]
        if group["normalize"] and group["q"] != 2:
            spread = self.normalise(step, gradients)
        else:
            spread = 0.0
        for p, (x, grad, state, around), g in zip(group["params"], self.before, gradients, strict=True):
            now = self.optimizer.state[p]
            if grad is not None:
                assert same_bits(p.grad, grad), "a gradient was written"
            if around is not None:
                assert torch.equal(surroundings(p.detach()), around), "memory around a parameter was written"
            if grad is None or skipped:
                assert same_bits(p.detach(), x)
                assert all(same_bits(t, now[name]) for name, t in state.items())
            elif bool(x.isfinite().all() & g.isfinite().all()) and spread is not None:
                if group["depth"] == 1:
                    self.plain(p, x, g, state, now, step, spread)
                elif group["storage"] == "implicit":
                    self.implicit(p, x, g, state, now, step)
                else:
                    self.factored(p, x, g, state, now, step)

    def normalise(self, step: dict[str, Any], gradients: list[Tensor | None]) -> float | None:
        """Make `step` that of the scaled lr; returns how uncertain the scale is. None: too uncertain, or not a number."""
        q, (beta1, _), coupled = step["q"], step["betas"], step["coupled_weight_decay"]
        total, error = 0.0, 0.0
        for (x, _, state, _), g in zip(self.before, gradients, strict=True):
            if g is None:
                continue
            m = state["momentum"].double() if "momentum" in state else torch.zeros_like(g)
            c = beta1 * m + (1 - beta1) * (g + coupled * x.double())
            size = beta1 * m.abs() + (1 - beta1) * (g.abs() + coupled * x.double().abs())
            total += float((c * signed_power(c, q)).sum())
            error += float((signed_power(size, q) * size).sum()) * q * STEP_ROUNDINGS * EPS[torch.float32]
        if not 0 < total < 1e30 or error > 1e-3 * total:
            return None
        scale = total ** ((2 - q) / q)
        step["lr"] *= scale
        step["weight_decay"] /= scale
        return SUM_RTOL + error / total

    def plain(self, p, x, g, state, now, step, spread) -> None:
        has_momentum = tuple(step["betas"]) != (0.0, 0.0)
        momentum = state.get("momentum", torch.zeros_like(x)) if has_momentum else None
        bounds = float64_bounds(x, g, momentum, step)
        kept = x.double() * (1 - step["lr"] * step["weight_decay"])
        slack = spread * torch.maximum((bounds.low - kept).abs(), (bounds.high - kept).abs())
        assert inside(p, bounds.low - slack, bounds.high + slack)
        if momentum is not None:
            m = now["momentum"]
            assert inside(m, bounds.momentum - bounds.momentum_error, bounds.momentum + bounds.momentum_error)

    def factored(self, p, x, g, state, now, step) -> None:
        depth = self.group["depth"]
        keys = Depth.of(self.group).keys("factor")
        old = [state[name].double() for name in keys]
        has_momentum = tuple(step["betas"]) != (0.0, 0.0)
        for name, w, own in zip(keys, old, reference.gradients_of(g, old, depth), strict=True):
            buffer = name.replace("factor", "momentum")
            momentum = state.get(buffer, torch.zeros_like(state[name])) if has_momentum else None
            bounds = float64_bounds(state[name], own, momentum, step, STEP_ROUNDINGS + depth)
            assert inside(now[name], bounds.low, bounds.high, torch.maximum(own.abs(), w.abs())), name
            if momentum is not None:
                low, high = (bounds.momentum + sign * bounds.momentum_error for sign in (-1, 1))
                assert inside(now[buffer], low, high, own.abs()), buffer
        if step["lr"] == 0:
            assert same_bits(p.detach(), x), "at lr = 0 no weight may change"
            return
        new = [now[name].double() for name in keys]
        product = reference.product_of(new, depth)
        compute = compute_dtype(p.dtype)
        # Products of some of the factors may underflow on the way, and then be multiplied by the others.
        others = reference.product_of([w.abs().clamp(min=1.0) for w in new], depth)
        slack = (depth * EPS[compute] + 2 * EPS[p.dtype]) * product.abs() + spacing(p.dtype)
        slack = slack + torch.finfo(compute).tiny * others
        assert inside(p, product - slack, product + slack, others)

    def implicit(self, p, x, g, state, now, step) -> None:
        balance, depth = float(state["balance"]), self.group["depth"]
        options = {name: step[name] for name in ("lr", "q", "weight_decay")} | {"depth": depth}
        expected, size, error = exact_step(x, g, balance, **options)
        compute = compute_dtype(p.dtype)
        eps, largest = EPS[compute], torch.maximum(expected.abs(), x.double().abs())
        vanishing = (g != 0) & (g.abs() < 1e-25)  # times factors it may be 0, whose sign is 0
        size = torch.where(vanishing, torch.inf, size)
        bound = 1.01 * (eps * largest + MIRROR_ROUNDINGS * depth * eps * size + error) + 2 * EPS[p.dtype] * largest
        bound = bound + spacing(p.dtype) + (1e-33 if compute == torch.float32 else 1e-290)
        assert inside(p, expected - bound, expected + bound, size)
        kept = abs(1 - step["lr"] * step["weight_decay"]) ** step["q"]
        assert float(now["balance"]) == pytest.approx(balance * kept, rel=1e-14)


def check(case: Case) -> None:
    with home_of(case.home) as backend:
        Run(case, backend).run()


@hypothesis.settings(common, max_examples=200, derandomize=True)
@hypothesis.given(cases(HOMES))
def test_drawn_cases(case):
    check(case)


@pytest.mark.slow
@hypothesis.settings(common, max_examples=10_000)
@hypothesis.given(cases(HOMES))
def test_many_drawn_cases(case):
    check(case)


@pytest.mark.slow
@hypothesis.settings(common, max_examples=1000)
@hypothesis.given(cases(["numba"], narrow=True))
def test_drawn_cases_by_numba(case):
    check(case)


def state_of(optimizer: SteepestDescent) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [t for p in params for t in optimizer.state[p].values()]
    return [t.detach().clone() for t in (*params, *(p.grad for p in params if p.grad is not None), *states)]


def unchanged(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(map(same_bits, before, after))


@hypothesis.settings(common, max_examples=200, derandomize=True)
@hypothesis.given(
    st.lists(st.tuples(group_options, st.lists(parameters(), min_size=1, max_size=2)), min_size=1, max_size=2),
    bad_option,
    st.integers(0, 1 << 16),
)
def test_bad_options_write_nothing(groups, bad, number):
    """A bad option in any group, when it is built, joins or is changed later: an error, and every bit as it was."""
    torch.manual_seed(number)
    name, value = bad
    built = [{**options, "params": [nn.Parameter(one.value()) for one in own]} for options, own in groups]
    params = [p for group in built for p in group["params"]]
    for p, one in zip(params, (one for _, own in groups for one in own), strict=True):
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
    assert len(optimizer.param_groups) == len(groups)
    assert torch.equal(more["params"][0], torch.ones(3))
    optimizer.param_groups[at][name] = value
    with pytest.raises((ValueError, TypeError)):
        optimizer.step()
    assert unchanged(held, state_of(optimizer))


def test_the_check_finds_a_step_that_is_wrong():
    """A weight one unit in the last place beyond its bounds, a momentum or a neighbour that changed: each is seen."""
    case = Case(
        "reference",
        [(compatible({"lr": 0.05, "q": 1.5, "betas": (0.9, 0.99), "weight_decay": 0.3, "coupled_weight_decay": 0.1,
                      "normalize": False, "maximize": False, "depth": depth, "storage": "full", "init": "identity",
                      "scale": None}), [Described((7,), torch.float32, "strided", "strided", None, "plain")])
         for depth in (1, 3, 1)],
        [Action("step", 1)],
        0,
    )  # fmt: skip
    for spoil in ("weight", "state", "around", "gradient"):
        run = Run(case, "reference")
        for group in run.optimizers[0].param_groups:
            p = group["params"][0]
            p.grad = torch.randn(7)
            step = Check(run.optimizers[0], group, {})
            run.optimizers[0].step()
            step.after()
            with torch.no_grad():
                if spoil == "weight":
                    p[3] *= 1 + 2e-5
                elif spoil == "state":
                    run.optimizers[0].state[p]["momentum" if group["depth"] == 1 else "factor_2"][2] *= 1 + 2e-5
                elif spoil == "around":
                    torch.empty(0).set_(p.untyped_storage())[0] = 1.0
                else:
                    p.grad[1] = 5.0
            with pytest.raises(AssertionError):
                step.after()
            p.grad = None
