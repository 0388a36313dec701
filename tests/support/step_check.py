"""What SteepestDescent writes, against the definition in float64: each tensor of a step, factors that are made anew."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pysteep import SteepestDescent
from pysteep._state.depth import Depth
from pysteep._state.rounding import int16_of
from pysteep.kernels.reference import factor_step as reference
from pysteep.kernels.reference.mirror_step import balanced_factors
from pysteep.kernels.reference.rounding import SIXTEEN, widen_compensated
from pysteep.kernels.reference.signed_power import signed_power
from pysteep.kernels.reference.steepest_step import compute_dtype
from tests.support.cases import float64_bounds, same_bits, surroundings
from tests.support.mirror_cases import exact_step
from tests.support.tolerances import EPS, MIRROR_ROUNDINGS, STEP_ROUNDINGS, SUM_RTOL

LARGEST = {torch.float16: 6e4}  # beyond it the storage overflows; 1e15 elsewhere, where products of factors soon would


def inside(found: Tensor, low: Tensor, high: Tensor, size: Tensor | float = 0.0, storage: torch.dtype | None = None) -> bool:
    """Whether every element is between its bounds, or is of such a size that it may have overflowed its storage."""
    limit = LARGEST.get(storage or found.dtype, 1e15)
    found = found.detach().double()
    large = torch.maximum(torch.maximum(low.abs(), high.abs()), torch.as_tensor(size, dtype=torch.float64))
    return bool((((low <= found) & (found <= high)) | ~(large < limit)).all())


def spacing(dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps


def joined(rounded: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """What a weight or factor stands for: itself, or with the compensation that the state may have of it."""
    low = int16_of(state, name)
    return rounded.detach() if low is None else widen_compensated(rounded.detach(), low)


def lost(rounded: Tensor, value: Tensor) -> float:
    """What `joined` may lack beyond the rounding of its own dtype: a compensated float16 ends at 2^-40."""
    return 2.0**-40 if rounded.dtype == torch.float16 and value.dtype != torch.float16 else 0.0


def is_nearest(rounded: Tensor, value: Tensor) -> bool:
    """Whether no number of its dtype is nearer to the value, where that is within the range of the dtype."""
    nearest = value.to(rounded.dtype)
    away, least = ((t.detach().double() - value.double()).abs() for t in (rounded, nearest))
    return bool(((away <= least) | ~nearest.isfinite()).all())


class Check:
    """One group's step: all tensors before it, and after it whether they are what float64 says.

    `scale`: what gradients are divided by, for AMP and clipping; `skipped`: nothing may be written.
    """

    def __init__(self, optimizer: SteepestDescent, group: dict[str, Any], *, scale: float = 1.0, skipped: bool = False) -> None:
        self.optimizer, self.group, self.scale, self.skipped = optimizer, group, scale, skipped
        self.before = []
        for p in group["params"]:
            if group["depth"] > 1 and p.grad is not None:
                optimizer.factors(p)  # makes them if that is due
            state = {name: t.clone() for name, t in optimizer.state[p].items()}
            grad = None if p.grad is None else p.grad.detach().clone()
            self.before.append((p.detach().clone(), grad, state, surroundings(p.detach()) if p.numel() else None))

    def at_rest(self) -> bool:
        """A first step at lr = 0 and gradients of 0, which leaves no trace of decay in momenta: torch's checkpoints take it."""
        stepped = [(grad, state) for _, grad, state, _ in self.before if grad is not None]
        begun = any(name.startswith("momentum") or grad.any() for grad, state in stepped for name in (*state, ""))
        return float(self.group["lr"]) == 0 and not begun

    def after(self) -> None:
        group, lr = self.group, float(self.group["lr"])
        step = {name: group[name] for name in ("q", "betas", "weight_decay", "coupled_weight_decay")} | {"lr": lr}
        if self.at_rest():
            step["coupled_weight_decay"] = 0.0
        factor = (-1 if group["maximize"] else 1) / self.scale
        gradients = [None if g is None else factor * g.to(compute_dtype(x.dtype)).double() for x, g, *_ in self.before]
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
            if grad is None or self.skipped:
                assert same_bits(p.detach(), x)
                assert all(same_bits(t, now[name]) for name, t in state.items())
            elif bool(x.isfinite().all() & g.isfinite().all()) and spread is not None:
                self.kinds(x, now)
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
            w = joined(x, state, "compensation").double()
            m = state["momentum"].double() if "momentum" in state else torch.zeros_like(g)
            c = beta1 * m + (1 - beta1) * (g + coupled * w)
            size = beta1 * m.abs() + (1 - beta1) * (g.abs() + coupled * w.abs())
            total += float((c * signed_power(c, q)).sum())
            error += float((signed_power(size, q) * size).sum()) * q * STEP_ROUNDINGS * EPS[torch.float32]
        if not 0 < total < 1e30 or error > 1e-3 * total:
            return None
        scale = total ** ((2 - q) / q)
        step["lr"] *= scale
        step["weight_decay"] /= scale
        return SUM_RTOL + error / total

    def kinds(self, x: Tensor, now: dict[str, Tensor]) -> None:
        """The dtypes of the state, and which compensations there are."""
        narrow = x.dtype in SIXTEEN
        wide = narrow and self.group["state_dtype"] is not None
        for name, t in now.items():
            if name.startswith(("factor", "momentum")):
                assert t.dtype == (torch.float32 if wide else x.dtype), name
        if self.group["depth"] == 1 or self.group["storage"] == "implicit":
            rounded, names = narrow, ["compensation"]
        else:
            rounded, names = narrow and not wide, Depth.of(self.group).keys("compensation")
        expected = names if rounded and self.group["rounding"] == "compensated" else []
        assert [name for name in now if name.startswith("compensation")] == expected

    def stored(self, rounded, old, now, name, bounds, *, slack=0.0, size=0.0) -> None:
        """A weight or factor that was written: what it stands for, and that it is the nearest number to that."""
        value = joined(rounded, now, name)
        slack = slack + lost(rounded, old)
        assert inside(value, bounds.low - slack, bounds.high + slack, size, rounded.dtype), name
        assert is_nearest(rounded, value), name

    def momentum_of(self, state: dict[str, Tensor], name: str, like: Tensor) -> Tensor | None:
        """That of before the step: 0 in the dtype that it will have, if there was none."""
        if tuple(self.group["betas"]) == (0.0, 0.0):
            return None
        wide = self.group["state_dtype"] is not None and like.dtype in SIXTEEN
        return state[name] if name in state else torch.zeros_like(like, dtype=torch.float32 if wide else like.dtype)

    def plain(self, p, x, g, state, now, step, spread) -> None:
        first = "compensation" in now and "compensation" not in state  # which begins at 0
        w = x.float() if first else joined(x, state, "compensation")
        momentum = self.momentum_of(state, "momentum", x)
        bounds = float64_bounds(w, g, momentum, step)
        kept = w.double() * (1 - step["lr"] * step["weight_decay"])
        slack = spread * torch.maximum((bounds.low - kept).abs(), (bounds.high - kept).abs())
        self.stored(p, w, now, "compensation", bounds, slack=slack)
        if momentum is not None:
            m = now["momentum"]
            assert inside(m, bounds.momentum - bounds.momentum_error, bounds.momentum + bounds.momentum_error)

    def factored(self, p, x, g, state, now, step) -> None:
        depth, options = self.group["depth"], Depth.of(self.group)
        keys, lows = options.keys("factor"), options.keys("compensation")
        old = [joined(state[name], state, low) for name, low in zip(keys, lows, strict=True)]
        of_factors, of_one = (
            reference.gradients_of(each, [w.double() for w in old], depth) for each in (g, torch.ones_like(g))
        )
        # A scaled gradient may be subnormal; what its rounding loses is multiplied by the other factors.
        # The product of some factors may be too, and then be multiplied by a gradient of any size.
        others = reference.product_of([w.double().abs().clamp(min=1.0) for w in old], depth)
        lost_of_product = depth * g.abs() * others
        lost_of_gradient = [spacing(compute_dtype(x.dtype)) * (each.abs() + lost_of_product) for each in of_one]
        buffers = options.keys("momentum")
        for name, low, buffer, w, own, rest in zip(keys, lows, buffers, old, of_factors, lost_of_gradient, strict=True):
            momentum = self.momentum_of(state, buffer, state[name])
            bounds = float64_bounds(w, own, momentum, step, STEP_ROUNDINGS + depth)
            self.stored(now[name], w, now, low, bounds, size=torch.maximum(own.abs(), w.double().abs()))
            if momentum is not None:
                ends = (bounds.momentum + sign * (bounds.momentum_error + rest) for sign in (-1, 1))
                assert inside(now[buffer], *ends, own.abs()), buffer
        if step["lr"] == 0:
            assert same_bits(p.detach(), x), "at lr = 0 no weight may change"
            return
        new = [joined(now[name], now, low).double() for name, low in zip(keys, lows, strict=True)]
        product = reference.product_of(new, depth)
        compute = compute_dtype(p.dtype)
        # Products of some of the factors may underflow on the way, and then be multiplied by the others.
        others = reference.product_of([w.abs().clamp(min=1.0) for w in new], depth)
        slack = (depth * EPS[compute] + 1.01 * EPS[p.dtype]) * product.abs() + spacing(p.dtype)
        slack = slack + torch.finfo(compute).tiny * others
        assert inside(p, product - slack, product + slack, others)

    def implicit(self, p, x, g, state, now, step) -> None:
        balance, depth = float(state["balance"]), self.group["depth"]
        options = {name: step[name] for name in ("lr", "q", "weight_decay")} | {"depth": depth}
        old, value = joined(x, state, "compensation"), joined(p, now, "compensation")
        expected, size, error = exact_step(old, g, balance, **options)
        compute = compute_dtype(p.dtype)
        eps, largest = EPS[compute], torch.maximum(expected.abs(), old.double().abs())
        vanishing = (g != 0) & (g.abs() < 1e-25)  # times factors it may be 0, whose sign is 0
        # The power of y by which u(g) is multiplied is not, which only a huge gradient shows.
        power = balanced_factors(old, step["q"], depth, balance)[1] ** (step["q"] * (depth - 1))
        underflown = (power < torch.finfo(compute).tiny) & (g.abs() > 1e10)
        size = torch.where(vanishing | underflown, torch.inf, size)
        bound = 1.01 * (eps * largest + MIRROR_ROUNDINGS * depth * eps * size + error) + 2 * EPS[value.dtype] * largest
        bound = bound + spacing(value.dtype) + (1e-33 if compute == torch.float32 else 1e-290)
        self.stored(p, old, now, "compensation", SimpleNamespace(low=expected - bound, high=expected + bound), size=size)
        kept = abs(1 - step["lr"] * step["weight_decay"]) ** step["q"]
        assert float(now["balance"]) == pytest.approx(balance * kept, rel=1e-14)


class Repair:
    """A parameter with factors that is written to from outside: what becomes of these."""

    def __init__(self, optimizer: SteepestDescent, group: dict[str, Any], p: Tensor) -> None:
        self.optimizer, self.p, self.depth = optimizer, p, Depth.of(group)
        optimizer.factors(p)  # makes them if that is due
        self.before = {name: t.clone() for name, t in optimizer.state[p].items()}

    @staticmethod
    def concerns(group: dict[str, Any]) -> bool:
        return group["depth"] > 1 and group["storage"] != "implicit"

    def after(self) -> None:
        """Where x is still the product of its factors all state is as it was; elsewhere what belongs to factors is 0."""
        self.optimizer.factors(self.p)
        names = zip(self.depth.keys("factor"), self.depth.keys("compensation"), strict=True)
        compute = compute_dtype(self.p.dtype)
        factors = [joined(self.before[name], self.before, low).to(compute) for name, low in names]
        product = reference.product_of(factors, self.depth.depth).to(self.p.dtype)
        kept = (product == self.p) | (product.isnan() & self.p.isnan())
        for name in self.before:
            is_low = name.startswith("compensation")
            own = [int16_of(state, name) if is_low else state[name] for state in (self.before, self.optimizer.state[self.p])]
            assert same_bits(own[1][kept], own[0][kept]), name
            assert name.startswith("factor") or not own[1][~kept].any(), name
