"""The work of the GPU bars: tensors of real shapes that fit, with fresh random numbers, and slices to check results on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pysteep import functional
from pysteep.kernels.reference import factor_product as product_definition
from pysteep.kernels.reference import factor_step as factor_definition
from pysteep.kernels.reference import mirror_step as mirror_definition
from pysteep.kernels.reference import steepest_step as step_definition

from . import models
from .timing import Step
from .works import Work

CHECKED = 4096  # elements of a slice
SHARE = 0.8  # of the free memory, that operands may take


LLAMA_8B = Work("Llama-8B, 291 tensors", tuple(models.llama_8b()))

LR, DECAY, SCALE = 1e-3, 0.1, 0.7
Numbers = torch.Generator


class WrongResultError(Exception):
    """A result that is not that of the definition; it must not be timed."""


def fitting(work: Work, itemsize: int, copies: int, scale: float, device: str) -> Work:
    """`work` with its tensors cut to `scale` of their first dimension, and further until `copies` of all fit in memory."""
    free = torch.cuda.mem_get_info()[0] * SHARE if device == "cuda" else math.inf
    share = min(scale, free / (work.weights * itemsize * copies))
    if share >= 1:
        return work
    shapes = tuple((max(1, round(first * share)), *rest) for first, *rest in work.shapes)
    return Work(work.name, shapes)


def random(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, numbers: Numbers) -> list[Tensor]:
    """Normal numbers in one block of memory, each tensor where an allocation might start."""
    padded = [-(-math.prod(shape) // 128) * 128 for shape in shapes]
    block = torch.empty(sum(padded), dtype=dtype, device=numbers.device).normal_(generator=numbers)
    return [part[: math.prod(shape)].view(shape) for part, shape in zip(block.split(padded), shapes, strict=True)]


class Slices:
    """Where results are looked at: head, tail and places between, of some tensors, the first and the last among them."""

    def __init__(self, tensors: Sequence[Tensor], numbers: Numbers) -> None:
        drawn = torch.rand(6, generator=numbers, device=numbers.device).tolist()
        chosen = {0, len(tensors) - 1, *(int(u * len(tensors)) for u in drawn)}
        self.places: list[tuple[int, int, int]] = []
        for i in sorted(chosen):
            last = max(tensors[i].numel() - CHECKED, 0)
            for start in sorted({0, last, *(int(u * last) for u in drawn)}):
                self.places.append((i, start, min(start + CHECKED, tensors[i].numel())))

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies in float64."""
        return [tensors[i].detach().view(-1)[start:stop].double() for i, start, stop in self.places]


def check(name: str, actual: list[Tensor], expected: list[Tensor], size: list[Tensor], dtype: torch.dtype, rtol: float) -> None:
    """Raise where an element is further off than its storage and `rtol` of `size`, its terms, allow."""
    for mine, right, terms in zip(actual, expected, size, strict=True):
        allowed = torch.finfo(dtype).eps * right.abs() + rtol * terms + torch.finfo(dtype).tiny
        if not bool(((mine - right).abs() <= allowed).all()):
            worst = float(((mine - right).abs() / allowed).nan_to_num(math.inf).max())
            raise WrongResultError(f"{name} is wrong: {worst:.1e} times what is allowed")


def check_written(name: str, x: Tensor) -> None:
    """Raise where an element of what was NaN before was not written."""
    if not math.isfinite(float(x.sum(dtype=torch.float64))):
        raise WrongResultError(f"{name} left elements unwritten, or wrote what is no number")


# Each has `moved`, the fewest bytes of a step, and step(home), a function that takes one after it was found right.


class Steepest:
    """w and g, with decoupled decay."""

    def __init__(self, work: Work, dtype: torch.dtype, numbers: Numbers) -> None:
        self.work, self.dtype, self.moved = work, dtype, work.bytes(dtype)
        self.weights, self.gradients = random(work.shapes, dtype, numbers), random(work.shapes, dtype, numbers)
        self.slices = Slices(self.weights, numbers)

    def parameters(self) -> list[nn.Parameter]:
        """The same memory, for optimisers."""
        parameters = list(map(nn.Parameter, self.weights))
        for p, g in zip(parameters, self.gradients, strict=True):
            p.grad = g
        return parameters

    def step(self, home: str, q: float) -> Step:
        def run() -> None:
            functional.steepest_step(self.weights, self.gradients, lr=LR, q=q, weight_decay=DECAY, backend=home)

        before, g = self.slices.of(self.weights), self.slices.of(self.gradients)
        run()
        after = self.slices.of(self.weights)
        expected = [w.clone() for w in before]
        options = {"betas": (0.0, 0.0), "weight_decay": DECAY, "coupled_weight_decay": 0.0, "maximize": False}
        full = options | {"step_scale": 1.0, "grad_scale": 1.0, "found_inf": 0.0}
        step_definition.steepest_step(expected, g, None, lr=LR, q=q, **full)
        size = [w.abs() + (new - w).abs() for w, new in zip(before, expected, strict=True)]
        check(f"steepest_step by {home}", after, expected, size, self.dtype, 1e-6)
        return run


class Factors:
    """Factors near SCALE of one float32 weight of `elements`, of which `stored` are stored, and the weight's gradient."""

    def __init__(self, elements: int, stored: int, depth: int, numbers: Numbers) -> None:
        self.depth, self.numbers = depth, numbers
        self.factors = [w.mul_(0.1).add_(SCALE) for w in random([(elements,)] * stored, torch.float32, numbers)]
        (self.gradient,) = random([(elements,)], torch.float32, numbers)
        self.slices = Slices([self.gradient], numbers)

    def parts(self) -> list[Tensor]:
        """Slices of each factor, in float64."""
        return [torch.cat(self.slices.of([w])) for w in self.factors]


class FactorStep(Factors):
    def __init__(self, elements: int, stored: int, depth: int, numbers: Numbers) -> None:
        super().__init__(elements, stored, depth, numbers)
        self.x = torch.empty_like(self.gradient)
        self.moved = (2 * stored + 2) * elements * 4

    def step(self, home: str, q: float) -> Step:
        def run() -> None:
            options = {"depth": self.depth, "lr": LR, "q": q, "weight_decay": DECAY}
            functional.factor_step([self.x], [self.gradient], [self.factors], **options, backend=home)

        self.x.fill_(torch.nan)
        stored, g = [[w] for w in self.parts()], torch.cat(self.slices.of([self.gradient]))
        before = [own[0].clone() for own in stored]
        run()
        check_written(f"factor_step by {home}", self.x)
        x = [torch.empty_like(g)]
        options = {"betas": (0.0, 0.0), "weight_decay": DECAY, "coupled_weight_decay": 0.0, "maximize": False}
        full = options | {"grad_scale": 1.0, "found_inf": 0.0}
        factor_definition.factor_step(x, [g], stored, None, depth=self.depth, lr=LR, q=q, **full)
        expected = [*(own[0] for own in stored), x[0]]
        actual = [*self.parts(), torch.cat(self.slices.of([self.x]))]
        size = [*(w.abs() + (own[0] - w).abs() for w, own in zip(before, stored, strict=True)), self.depth * x[0].abs()]
        check(f"factor_step by {home}", actual, expected, size, torch.float32, 1e-6)
        return run


class FactorProduct(Factors):
    def __init__(self, elements: int, depth: int, numbers: Numbers) -> None:
        super().__init__(elements, depth, depth, numbers)
        self.moved_forward, self.moved_backward = (depth + 1) * elements * 4, (2 * depth + 1) * elements * 4

    def forward(self, home: str) -> Step:
        def run() -> Tensor:
            return functional.factor_product(self.factors, backend=home)

        x, right = run(), product_definition.product(self.parts())
        check_written(f"factor_product by {home}", x)
        size = [self.depth * right.abs()]
        check(f"factor_product by {home}", [torch.cat(self.slices.of([x]))], [right], size, torch.float32, 1e-6)
        return run

    def backward(self, home: str) -> Step:
        leaves = [w.detach().requires_grad_() for w in self.factors]
        x = functional.factor_product(leaves, backend=home)

        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(x, leaves, self.gradient, retain_graph=True)

        name, results = f"the gradient of factor_product by {home}", run()
        for result in results:
            check_written(name, result)
        right = product_definition.factor_gradients(torch.cat(self.slices.of([self.gradient])), self.parts())
        actual = [torch.cat(self.slices.of([result])) for result in results]
        check(name, actual, right, [self.depth * each.abs() for each in right], torch.float32, 1e-6)
        return run


class MirrorStep:
    """x without factors, float32, and the balance that stands for them."""

    def __init__(self, elements: int, numbers: Numbers) -> None:
        (self.x,), (self.gradient,) = (random([(elements,)], torch.float32, numbers) for _ in range(2))
        self.x.mul_(0.1)
        self.slices, self.moved = Slices([self.x], numbers), 3 * elements * 4

    def step(self, home: str, depth: int, q: float) -> Step:
        balance = torch.tensor(SCALE**q, dtype=torch.float64, device=self.x.device)

        def run() -> None:
            options = {"depth": depth, "lr": LR, "q": q, "weight_decay": DECAY}
            functional.mirror_step([self.x], [self.gradient], [balance], **options, backend=home)

        before, g = (torch.cat(self.slices.of([t])) for t in (self.x, self.gradient))
        expected, own = [before.clone()], balance.clone()
        run()
        numbers = {"weight_decay": DECAY, "maximize": False, "grad_scale": 1.0, "found_inf": 0.0}
        mirror_definition.mirror_step(expected, [g], [own], depth=depth, lr=LR, q=q, **numbers)
        # The change is right to a few roundings of the terms that it is a sum of, which its largest elements are like.
        change = (expected[0] - before).abs()
        size = [before.abs() + 100 * torch.maximum(change, change.max() * 0.01)]
        check(f"mirror_step by {home}", [torch.cat(self.slices.of([self.x]))], expected, size, torch.float32, 1e-6)
        return run
