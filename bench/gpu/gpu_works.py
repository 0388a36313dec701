"""The work of the GPU bars: tensors of real shapes that fit, and steps that are timed after every element was found right.

A check fills what the op reads and steps with fresh numbers and what it only writes with NaN, runs it once, and compares every
element with the definition in float64, piece by piece on the device; operands that are only read and the guards around every
tensor must be as they were.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pysteep import functional
from pysteep.kernels.reference import factor_product as product_definition
from pysteep.kernels.reference import factor_step as factor_definition
from pysteep.kernels.reference import mirror_step as mirror_definition
from pysteep.kernels.reference import steepest_step as step_definition

from ..measure import models
from ..measure.timing import Step
from ..measure.works import Work
from ..peers.contenders import DECAY, LR  # a step that 16 bits can see
from .gpu_memory import Block, Numbers, WrongResultError, check, results_in

SHARE = 0.8  # of the free memory, that operands may take

LLAMA_8B = Work("Llama-8B, 291 tensors", tuple(models.llama_8b()))

FACTOR_LR, FACTOR_DECAY, SCALE = 1e-3, 0.1, 0.7
"""Of steps at depth, which longer ones would take to infinity before they are timed; all in float32."""

RTOL = 1e-6
"""Of the terms of a result: roundings of float32, and powers of 4 units in the last place."""


def fitting(work: Work, itemsize: int, copies: int, scale: float, device: str) -> Work:
    """`work` with its tensors cut to `scale` of their first dimension, and further until `copies` of all fit in memory."""
    free = torch.cuda.mem_get_info()[0] * SHARE if device == "cuda" else math.inf
    share = min(scale, free / (work.weights * itemsize * copies))
    if share >= 1:
        return work
    shapes = tuple((max(1, round(first * share)), *rest) for first, *rest in work.shapes)
    return Work(work.name, shapes)


# Each has `moved`, the fewest bytes of a step, `held`, the bytes of its operands, and step(home), which gives a function that
# takes a step after one was found right.


class Steepest:
    """w and g, with decoupled decay."""

    def __init__(self, work: Work, dtype: torch.dtype, numbers: Numbers) -> None:
        self.numbers, self.moved = numbers, work.bytes(dtype)
        self.weights, self.gradients = (Block(work.shapes, dtype, numbers.device) for _ in range(2))
        self.gradients.fill(numbers)
        self.held = self.weights.held + self.gradients.held

    def parameters(self) -> list[nn.Parameter]:
        """The same memory, for optimizers."""
        self.weights.fill(self.numbers)
        parameters = list(map(nn.Parameter, self.weights.tensors))
        for p, g in zip(parameters, self.gradients.tensors, strict=True):
            p.grad = g
        return parameters

    def step(self, home: str, q: float) -> Step:
        def run() -> None:
            options = {"lr": LR, "q": q, "weight_decay": DECAY}
            functional.steepest_step(self.weights.tensors, self.gradients.tensors, **options, backend=home)

        return self.checked(f"steepest_step by {home}", run, q)

    def checked(self, name: str, run: Step, q: float, gradients: Block | None = None) -> Step:
        """`run`, anyone's step with LR and DECAY over these weights, once it was found right; `gradients`: other ones."""
        seen = gradients or self.gradients
        self.weights.fill(self.numbers)
        run()
        options = {"betas": (0.0, 0.0), "weight_decay": DECAY, "coupled_weight_decay": 0.0, "maximize": False}
        full = options | {"step_scale": 1.0, "grad_scale": 1.0, "found_inf": 0.0}
        for k, after in enumerate(self.weights.pieces):
            w = self.weights.drawn(k).double()
            right = w.clone()
            step_definition.steepest_step([right], [seen.pieces[k].double()], None, lr=LR, q=q, **full)
            check(name, after, right, w.abs() + (right - w).abs(), RTOL)
        self.weights.check_guards(name)
        seen.check_as_drawn(name)
        return run


class Factors:
    """Factors near SCALE of one float32 weight of `elements`, of which `stored` are stored, and the weight's gradient."""

    def __init__(self, elements: int, stored: int, depth: int, numbers: Numbers) -> None:
        self.depth, self.numbers, self.shape = depth, numbers, (elements,)
        self.factors = [self.block(SCALE, 0.1) for _ in range(stored)]
        self.gradient = self.block()
        for block in (*self.factors, self.gradient):
            block.fill(numbers)
        self.held = (stored + 1) * self.gradient.held

    def block(self, mean: float = 0.0, deviation: float = 1.0) -> Block:
        """Of one tensor of the weight's shape."""
        return Block([self.shape], torch.float32, self.numbers.device, mean, deviation)

    @property
    def tensors(self) -> list[Tensor]:
        return [block.tensors[0] for block in self.factors]

    def check_product(self, name: str, x: Block, depth: int) -> None:
        """Of the factors as they are stored now."""
        for k, piece in enumerate(x.pieces):
            right = factor_definition.product_of([block.pieces[k].double() for block in self.factors], depth)
            check(name, piece, right, right.abs(), depth * torch.finfo(torch.float32).eps)
        x.check_guards(name)


class FactorStep(Factors):
    def __init__(self, elements: int, stored: int, depth: int, numbers: Numbers) -> None:
        super().__init__(elements, stored, depth, numbers)
        self.x = self.block()
        self.held += self.x.held
        self.moved = (2 * stored + 2) * elements * 4

    def step(self, home: str, q: float) -> Step:
        name, (g,), (x,), factors = f"factor_step by {home}", self.gradient.tensors, self.x.tensors, self.tensors

        def run() -> None:
            options = {"depth": self.depth, "lr": FACTOR_LR, "q": q, "weight_decay": FACTOR_DECAY}
            functional.factor_step([x], [g], [factors], **options, backend=home)

        for block in self.factors:
            block.fill(self.numbers)
        self.x.poison()
        run()
        options = {"betas": (0.0, 0.0), "weight_decay": FACTOR_DECAY, "coupled_weight_decay": 0.0, "maximize": False}
        full = options | {"depth": self.depth, "lr": FACTOR_LR, "q": q, "grad_scale": 1.0, "found_inf": 0.0}
        for k, piece in enumerate(self.gradient.pieces):
            before = [block.drawn(k).double() for block in self.factors]
            right = [w.clone() for w in before]
            gradient = piece.double()
            factor_definition.factor_step([torch.empty_like(gradient)], [gradient], [[w] for w in right], None, **full)
            for block, w, new in zip(self.factors, before, right, strict=True):
                check(name, block.pieces[k], new, w.abs() + (new - w).abs(), RTOL)
        for block in self.factors:
            block.check_guards(name)
        self.gradient.check_as_drawn(name)
        self.check_product(name, self.x, self.depth)
        return run


class FactorProduct(Factors):
    def __init__(self, elements: int, depth: int, numbers: Numbers) -> None:
        super().__init__(elements, depth, depth, numbers)
        self.moved_forward, self.moved_backward = (depth + 1) * elements * 4, (2 * depth + 1) * elements * 4

    def forward(self, home: str) -> Step:
        name, factors, x = f"factor_product by {home}", self.tensors, self.block()

        def run() -> Tensor:
            return functional.factor_product(factors, backend=home)

        self.fill_factors(run)
        x.poison()
        with results_in([x]):
            check_place(name, [run()], [x])
        self.check_product(name, x, self.depth)
        for block in self.factors:
            block.check_as_drawn(name)
        return run

    def backward(self, home: str) -> Step:
        name, results = f"the gradient of factor_product by {home}", [self.block() for _ in self.factors]
        (gradient,), leaves = self.gradient.tensors, [w.detach().requires_grad_() for w in self.tensors]

        def product() -> Tensor:
            return functional.factor_product(leaves, backend=home)

        self.fill_factors(product)
        x = product()

        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(x, leaves, gradient, retain_graph=True)

        for block in results:
            block.poison()
        with results_in(results):
            check_place(name, run(), results)
        rtol = self.depth * torch.finfo(torch.float32).eps
        for k, piece in enumerate(self.gradient.pieces):
            right = product_definition.factor_gradients(piece.double(), [block.pieces[k].double() for block in self.factors])
            for block, own in zip(results, right, strict=True):
                check(name, block.pieces[k], own, own.abs(), rtol)
        for block in results:
            block.check_guards(name)
        for block in (*self.factors, self.gradient):
            block.check_as_drawn(name)
        return run

    def fill_factors(self, product: Step) -> None:
        """With fresh numbers, after a first call, in which a home may allocate for a check of its own."""
        product()
        for block in self.factors:
            block.fill(self.numbers)


def check_place(name: str, results: list[Tensor] | tuple[Tensor, ...], blocks: list[Block]) -> None:
    """Raise unless each result is the tensor of its block, which alone is looked at."""
    if [x.data_ptr() for x in results] != [block.tensors[0].data_ptr() for block in blocks]:
        raise WrongResultError(f"{name} wrote its results elsewhere than into what it allocated for them")


class MirrorStep:
    """x without factors, float32, and the balance that stands for them."""

    def __init__(self, elements: int, numbers: Numbers) -> None:
        self.numbers, self.moved = numbers, 3 * elements * 4
        self.x = Block([(elements,)], torch.float32, numbers.device, deviation=0.1)
        self.gradient = Block([(elements,)], torch.float32, numbers.device)
        self.gradient.fill(numbers)
        self.held = self.x.held + self.gradient.held

    def step(self, home: str, depth: int, q: float) -> Step:
        name, (x,), (g,) = f"mirror_step by {home}", self.x.tensors, self.gradient.tensors
        balances = Block([(1,)], torch.float64, self.numbers.device)
        (balance,) = balances.tensors
        balance.fill_(SCALE**q)
        own = balance.clone()

        def run() -> None:
            options = {"depth": depth, "lr": FACTOR_LR, "q": q, "weight_decay": FACTOR_DECAY}
            functional.mirror_step([x], [g], [balance], **options, backend=home)

        self.x.fill(self.numbers)
        run()
        full = {"weight_decay": FACTOR_DECAY, "maximize": False, "grad_scale": 1.0, "found_inf": 0.0}
        for k, after in enumerate(self.x.pieces):
            before = self.x.drawn(k).double()
            right = before.clone()
            gradient = self.gradient.pieces[k].double()
            mirror_definition.mirror_step([right], [gradient], [own], depth=depth, lr=FACTOR_LR, q=q, **full)
            # The change is right to a few roundings of the terms that it is a sum of, which its largest elements are like.
            change = (right - before).abs()
            check(name, after, right, before.abs() + 100 * torch.maximum(change, change.max() * 0.01), RTOL)
        kept = own * (1 - FACTOR_LR * FACTOR_DECAY) ** q
        check(f"the balance of {name}", balance, kept, kept, 1e-14)
        for block in (self.x, balances):
            block.check_guards(name)
        self.gradient.check_as_drawn(name)
        return run
