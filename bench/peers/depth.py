"""Who trains products of factors: pysteep's homes of the depth ops, and what torch's users write.

Each contender is checked against the definition, with a step that float32 and 16 bits can see, before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import pysteep
from pysteep import functional
from pysteep.kernels.reference import factor_product as product_definition
from pysteep.kernels.reference import factor_step as step_definition
from pysteep.kernels.reference import mirror_step as mirror_definition

from ..measure.works import random, sample
from .contenders import pysteep_homes

LR, CHECKED_LR = 1e-4, 0.05
DECAY, SCALE = 0.1, 0.7
Step = Callable[[], object]
Product = Callable[[list[Tensor]], Tensor]
Factors = list[list[Tensor]]  # [factor][tensor]
Make = Callable[[list[nn.Parameter], float], tuple[Step, Callable[[], float]]]


@dataclass(frozen=True)
class Contender:
    """`make(parameters, lr)` gives a function that takes a step, and one that says by how much its results are off."""

    name: str
    words: int  # of memory that it must move for each weight
    make: Make
    depth: int
    missing: str = ""
    storage: str = "full"


def check(contender: Contender, parameters: list[nn.Parameter]) -> Step:
    """The contender's step, once a larger one of the same parameters was found right."""
    step, error = contender.make(parameters, CHECKED_LR)
    step()
    tolerance = max(10, 2 * contender.depth) * torch.finfo(parameters[0].dtype).eps
    found = error()
    assert found <= tolerance, f"{contender.name} is wrong by {found:.1e} of the largest"
    return contender.make(parameters, LR)[0]


def chain(factors: list[Tensor]) -> Tensor:
    x = factors[0]
    for w in factors[1:]:
        x = x * w
    return x


def stacked(factors: list[Tensor]) -> Tensor:
    return torch.stack(factors).prod(0)


def products() -> dict[str, Product]:
    """How torch's users multiply factors, each with its name."""
    return {"chain": chain, "stack().prod()": stacked, "torch.compile": torch.compile(chain, dynamic=False)}


def gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def worst(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of two lists of tensors, over the largest number."""
    errors = [
        float((a.detach().double() - b.double()).abs().max() / b.abs().max()) for a, b in zip(actual, expected, strict=True)
    ]
    return max(errors)


# ---- factor_step and mirror_step: the optimiser at a depth -------------------------------------------------------------------


def _ours(backend: str, depth: int, q: float, storage: str) -> Make:
    def make(parameters: list[nn.Parameter], lr: float) -> tuple[Step, Callable[[], float]]:
        start = {"init": "lambda", "scale": SCALE} if storage == "implicit" else {"init": "balanced"}
        options: dict[str, Any] = {"depth": depth, "storage": storage, "backend": backend, **start}
        optimizer = pysteep.SteepestDescent(parameters, lr=lr, q=q, weight_decay=DECAY, **options)
        gradient = sample(gradients(parameters))
        if storage == "implicit":
            expected = _mirrored(sample(parameters), gradient, depth, q, lr)
        else:
            stored = [optimizer.factors(p)[: 2 if storage == "tied" else depth] for p in parameters]
            expected = _stepped([sample(list(factor)) for factor in zip(*stored, strict=True)], gradient, depth, q, lr)[0]
        return optimizer.step, lambda: worst(sample(parameters), expected)

    return make


def _mirrored(x: list[Tensor], gradient: list[Tensor], depth: int, q: float, lr: float) -> list[Tensor]:
    x = [each.double() for each in x]
    numbers = {"weight_decay": DECAY, "maximize": False, "grad_scale": 1.0, "found_inf": 0.0}
    balances = [torch.tensor(SCALE**q, dtype=torch.float64)] * len(x)
    mirror_definition.mirror_step(x, gradient, balances, depth=depth, lr=lr, q=q, **numbers)
    return x


def _stepped(stored: Factors, gradient: list[Tensor], depth: int, q: float, lr: float) -> tuple[list[Tensor], Factors]:
    """x and the factors after a step of the definition."""
    factors = [[each.double() for each in factor] for factor in stored]
    x = [torch.empty_like(each) for each in factors[0]]
    numbers = {"coupled_weight_decay": 0.0, "maximize": False, "grad_scale": 1.0, "found_inf": 0.0, "betas": (0.0, 0.0)}
    step_definition.factor_step(x, gradient, factors, None, depth=depth, lr=lr, q=q, weight_decay=DECAY, **numbers)
    return x, factors


def _drawn(parameters: list[nn.Parameter], depth: int) -> Iterator[list[Tensor]]:
    """Random factors of each parameter."""
    for p in parameters:
        values = random(depth * p.numel(), 2, p.dtype, str(p.device)).view(depth, *p.shape)
        yield [SCALE + 0.1 * w for w in values]


def _torch_factors(product: Product, depth: int) -> Make:
    """Products, their backward pass, and SGD on the factors: gradient descent with decay."""

    def make(parameters: list[nn.Parameter], lr: float) -> tuple[Step, Callable[[], float]]:
        of_each = [[nn.Parameter(w) for w in factors] for factors in _drawn(parameters, depth)]
        flat = [w for factors in of_each for w in factors]
        optimizer, gradient = _sgd(flat, lr), gradients(parameters)

        def step() -> None:
            optimizer.zero_grad()
            torch.autograd.backward([product(list(factors)) for factors in of_each], gradient)
            optimizer.step()

        return step, _error_of(of_each, gradient, depth, lr)

    return make


def _sgd(factors: list[nn.Parameter], lr: float) -> torch.optim.SGD:
    """torch's fastest that is right: on a CPU its fused one leaves out blocks of 16-bit weights (pytorch#191763)."""
    fused = factors[0].is_cuda or factors[0].dtype == torch.float32
    return torch.optim.SGD(factors, lr=lr, weight_decay=DECAY, fused=fused, foreach=not fused)


def _error_of(of_each: list[list[nn.Parameter]], gradient: list[Tensor], depth: int, lr: float) -> Callable[[], float]:
    """How far factors, by parameter, are from where a step of gradient descent from here ends."""
    expected = _stepped([sample(list(factor)) for factor in zip(*of_each, strict=True)], sample(gradient), depth, 2.0, lr)[1]

    def error() -> float:
        return max(
            worst(sample(list(factor)), right) for factor, right in zip(zip(*of_each, strict=True), expected, strict=True)
        )

    return error


class _Product(nn.Module):
    """As a parametrization of a weight."""

    def __init__(self, start: list[Tensor]) -> None:
        super().__init__()
        self.start = start

    def forward(self, *factors: Tensor) -> Tensor:
        return chain(list(factors))

    def right_inverse(self, _: Tensor) -> list[Tensor]:
        return self.start


def _parametrized(depth: int) -> Make:
    """The same by torch.nn.utils.parametrize."""

    def make(parameters: list[nn.Parameter], lr: float) -> tuple[Step, Callable[[], float]]:
        modules = []
        for start in _drawn(parameters, depth):
            module = nn.Module()
            module.weight = nn.Parameter(chain(start))
            parametrize.register_parametrization(module, "weight", _Product(start))
            modules.append(module)
        of_each = [[getattr(m.parametrizations.weight, f"original{k}") for k in range(depth)] for m in modules]
        flat = [w for factors in of_each for w in factors]
        optimizer, gradient = _sgd(flat, lr), gradients(parameters)

        def step() -> None:
            optimizer.zero_grad()
            torch.autograd.backward([module.weight for module in modules], gradient)
            optimizer.step()

        return step, _error_of(of_each, gradient, depth, lr)

    return make


def factor_step_contenders(depth: int, q: float, storage: str, device: str = "cpu") -> list[Contender]:
    words = {"tied": 6, "full": 2 * depth + 2, "implicit": 3}[storage]
    ours = [
        Contender(f"pysteep {name}", words, _ours(name, depth, q, storage), depth, missing, storage)
        for name, missing in pysteep_homes(device).items()
    ]
    if storage == "implicit" and depth == 2 and q in (1.0, 2.0):
        return [*ours, *_metric_contenders(q)]
    if q != 2 or storage != "full":
        return ours
    peers = [
        Contender(f"torch {name} + SGD", words, _torch_factors(product, depth), depth) for name, product in products().items()
    ]
    return [*ours, *peers, Contender("torch parametrize + SGD", words, _parametrized(depth), depth)]


def _metric_contenders(q: float) -> list[Contender]:
    """Depth 2 in closed form, as one would write the flow: x <- x - lr (M(x) s_q(g) + 2 decay x)."""

    def maker(compiled: bool) -> Make:
        def make(parameters: list[nn.Parameter], lr: float) -> tuple[Step, Callable[[], float]]:
            square = SCALE ** (2 * q)

            def plain(x: Tensor, g: Tensor) -> Tensor:
                metric = torch.sqrt(4 * x.abs() ** q + square) if q != 2 else torch.sqrt(4 * x * x + square)
                u = g.sign() if q == 1 else g
                return x - lr * (metric * u + 2 * DECAY * x)

            flow, gradient = torch.compile(plain, dynamic=False) if compiled else plain, gradients(parameters)
            before = sample(parameters)

            @torch.no_grad()
            def step() -> None:
                for x, g in zip(parameters, gradient, strict=True):
                    x.copy_(flow(x, g))

            def error() -> float:
                """To first order in lr it is the definition: beyond, as much as two steps may differ from one."""
                expected = _mirrored(before, sample(gradient), 2, q, lr)
                second = [(new.double() - old.double()).abs().max() * lr for new, old in zip(expected, before, strict=True)]
                allowed = max(float(each / new.abs().max()) for each, new in zip(second, expected, strict=True))
                return max(0.0, worst(sample(parameters), expected) - 4 * allowed)

            return step, error

        return make

    return [
        Contender("torch eager, metric", 3, maker(compiled=False), 2, storage="implicit"),
        Contender("torch.compile, metric", 3, maker(compiled=True), 2, storage="implicit"),
    ]


# ---- factor_product ----------------------------------------------------------------------------------------------------------


def _both_ways(product: Product, depth: int) -> Make:
    def make(parameters: list[nn.Parameter], _: float) -> tuple[Step, Callable[[], float]]:
        of_each = [[w.requires_grad_() for w in factors] for factors in _drawn(parameters, depth)]
        gradient = gradients(parameters)

        def step() -> None:
            for factors in of_each:
                for w in factors:
                    w.grad = None
            torch.autograd.backward([product(factors) for factors in of_each], gradient)

        def error() -> float:
            errors = []
            for factors, g in zip(of_each, gradient, strict=True):
                parts, own = [sample([w])[0].double() for w in factors], [w.grad for w in factors if w.grad is not None]
                right = product_definition.factor_gradients(sample([g])[0].double(), parts)
                errors.append(worst([*sample_each(own), *sample([product(factors)])], [*right, chain(parts)]))
            return max(errors)

        return step, error

    return make


def sample_each(tensors: list[Tensor]) -> list[Tensor]:
    return [sample([t])[0] for t in tensors]


def factor_product_contenders(depth: int, device: str = "cpu") -> list[Contender]:
    """Forward and backward: L + 1 and 2 L + 1 words."""
    ours = [
        (f"pysteep {name}", lambda factors, name=name: functional.factor_product(factors, backend=name), missing)
        for name, missing in pysteep_homes(device).items()
    ]
    peers = [(f"torch {name}", product, "") for name, product in products().items()]
    return [
        Contender(name, 3 * depth + 2, _both_ways(product, depth), depth, missing) for name, product, missing in [*ours, *peers]
    ]
