"""What the tests of rounding share: operands of every op in 16 bits, modes of rounding, steps of shards."""

from __future__ import annotations

import torch

from pysteep import functional
from pysteep._ops import steepest_step as _steepest_step
from pysteep._ops.options import StepOptions
from tests.support.cases import home_of, options, random_values

SIXTEEN = (torch.float16, torch.bfloat16)
SIZES = (0, 1, 7, 64, 511, 513, 4099)
MOMENTUM = (0.9, 0.99)
DRAWS = {"rounding": "stochastic", "seed": 2**63 + 12345678901, "step": 2**33 + 7}
SPREAD = torch.tensor([0.0, -0.0, 2.0**-24, -(2.0**-24), 2.0**-14, 6e-5, 65504.0, -65504.0, float("inf"), float("nan")])
MODES = ({"rounding": "compensated"}, DRAWS)


def low_bits(like: torch.Tensor) -> torch.Tensor:
    """Compensations as they may be left by another number."""
    return torch.randint(-(2**15), 2**15, like.shape, dtype=torch.int16)


class Operands:
    """What one op takes, at random: weights, gradients, and of factors and momenta lists by weight."""

    def __init__(self, op, dtype, sizes=SIZES, *, stored=1, betas=(0.0, 0.0), rounding="compensated"):
        def values():
            tensors = [random_values((n,), dtype, wide=True) for n in sizes]
            for t in tensors:
                t[: len(SPREAD)] = SPREAD[: len(t)].to(dtype)
            return tensors

        self.op, self.weights, self.gradients = op, values(), values()
        of_factor = op == "factor_step"
        count = stored if of_factor else 1
        self.factors = list(map(list, zip(*(values() for _ in range(count)), strict=True)))
        self.momenta = [[t.clone() for t in own] for own in self.factors] if any(betas) else []
        rounded = self.factors if of_factor else [[w] for w in self.weights]
        self.compensations = [list(map(low_bits, own)) for own in rounded] if rounding == "compensated" else []
        self.balances = [torch.tensor(0.01, dtype=torch.float64) for _ in sizes]

    def written(self):
        lists = (*self.factors, *self.momenta, *self.compensations)
        return [*self.weights, *(t for own in lists for t in own)]

    def clone(self):
        twin = object.__new__(type(self))
        twin.op = self.op
        for name in ("weights", "gradients", "balances"):
            setattr(twin, name, [t.clone() for t in getattr(self, name)])
        for name in ("factors", "momenta", "compensations"):
            setattr(twin, name, [[t.clone() for t in own] for own in getattr(self, name)])
        return twin

    def step(self, home, *, depth=None, **step):
        given = options(**step)
        with home_of(home) as backend:
            if self.op == "factor_step":
                buffers = {"compensations": self.compensations or None, "depth": depth, "backend": backend}
                functional.factor_step(self.weights, self.gradients, self.factors, self.momenta, **given, **buffers)
                return self
            flat = [own[0] for own in self.compensations] or None
            if self.op == "mirror_step":
                del given["betas"], given["coupled_weight_decay"]
                arguments = (self.weights, self.gradients, self.balances)
                functional.mirror_step(*arguments, depth=depth, **given, compensations=flat, backend=backend)
            else:
                momenta = [own[0] for own in self.momenta]
                functional.steepest_step(self.weights, self.gradients, momenta, **given, compensations=flat, backend=backend)
        return self


def step_of_shards(home, shards, gradients, rounding):
    with home_of(home) as backend:
        _steepest_step.prepare(shards, gradients, [], StepOptions(**options()), backend=backend, rounding=rounding)()
