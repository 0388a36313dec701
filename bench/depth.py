"""The depth ops' work and who does it: one weight as a product of factors, in pysteep and as torch's users write it.

Every contender is checked against the definition on its first elements before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import pysteep
from pysteep import functional
from pysteep.kernels.reference import factor_product as product_definition
from pysteep.kernels.reference import factor_step as step_definition
from pysteep.kernels.reference import mirror_step as mirror_definition

LR, DECAY, SCALE = 1e-4, 0.1, 0.7
WEIGHTS = 12_000_000
CHECKED = 5000  # elements
Step = Callable[[], object]
Product = Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True)
class Contender:
    """`make()` gives the function to time, already checked; `words` of memory it must move for each weight."""

    name: str
    words: int
    make: Callable[[], Step]
    missing: str = ""


def triad(words: int) -> Step:
    """w <- w + a g over as many bytes as `words` for each weight: the limit that memory sets."""
    w, g = torch.zeros(WEIGHTS * words // 3), torch.ones(WEIGHTS * words // 3)
    return lambda: w.add_(g, alpha=1e-9)


def random(seed: int, *, around: float = 0.0) -> Tensor:
    values = torch.randn(WEIGHTS, generator=torch.Generator().manual_seed(seed))
    return values.mul_(0.1).add_(around) if around else values


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


def _close(name: str, actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    actual, expected = actual.detach()[:CHECKED].double(), expected.double()
    error = (actual - expected).abs().max() / expected.abs().max()
    assert bool(error <= tolerance), f"{name} is wrong by {error:.1e}"


# ---- factor_step -------------------------------------------------------------------------------------------------------------


def _ours(name: str, depth: int, q: float, storage: str, backend: str) -> Step:
    init = {"init": "lambda", "scale": SCALE}
    p = nn.Parameter(random(0))
    p.grad = random(1)
    optimizer = pysteep.SteepestDescent(
        [p], lr=LR, q=q, weight_decay=DECAY, depth=depth, storage=storage, backend=backend, **init
    )
    if storage == "implicit":
        balance = torch.tensor(SCALE**q, dtype=torch.float64)
        expected = [p.detach()[:CHECKED].double()]
        numbers = {"weight_decay": DECAY, "maximize": False, "grad_scale": 1.0, "found_inf": 0.0}
        mirror_definition.mirror_step(expected, [p.grad[:CHECKED]], [balance], depth=depth, lr=LR, q=q, **numbers)
    else:
        stored = optimizer.factors(p) if storage == "full" else optimizer.factors(p)[:2]
        expected = _expected([w[:CHECKED] for w in stored], p.grad[:CHECKED], depth, q)
    optimizer.step()
    _close(name, p, expected[0])
    return optimizer.step


def _expected(stored: list[Tensor], gradient: Tensor, depth: int, q: float) -> list[Tensor]:
    factors, x = [[w.double()] for w in stored], [torch.empty(len(gradient), dtype=torch.float64)]
    numbers = {"coupled_weight_decay": 0.0, "maximize": False, "grad_scale": 1.0, "found_inf": 0.0, "betas": (0.0, 0.0)}
    step_definition.factor_step(x, [gradient], factors, None, depth=depth, lr=LR, q=q, weight_decay=DECAY, **numbers)
    return [*x, *(own[0] for own in factors)]


def _torch_step(name: str, product: Product, depth: int) -> Step:
    """Product, its backward pass, and fused SGD on the factors: gradient descent with decay."""
    factors = [nn.Parameter(random(k, around=SCALE)) for k in range(depth)]
    gradient = random(99)
    optimizer = torch.optim.SGD(factors, lr=LR, weight_decay=DECAY, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        product(factors).backward(gradient)
        optimizer.step()

    expected = _expected([w.detach()[:CHECKED] for w in factors], gradient[:CHECKED], depth, 2.0)
    step()
    for w, right in zip(factors, expected[1:], strict=True):
        _close(name, w, right)
    return step


def backends() -> list[tuple[str, str]]:
    """(name, why it is missing or "") of pysteep's CPU backends that are fast."""
    found = pysteep.backends()
    return [(name, "" if found[name].available else found[name].reason) for name in ("cpp", "numba")]


def factor_step_contenders(depth: int, q: float, storage: str) -> list[Contender]:
    words = 6 if storage == "tied" else 2 * depth + 2
    ours = [
        Contender(
            f"pysteep {backend}",
            words,
            lambda backend=backend: _ours(f"pysteep {backend}", depth, q, storage, backend),
            missing,
        )
        for backend, missing in backends()
    ]
    if q != 2 or storage != "full":
        return ours
    peers = [
        Contender(f"torch {name} + fused SGD", words, lambda name=name, f=product: _torch_step(name, f, depth))
        for name, product in products().items()
    ]
    return [*ours, *peers]


# ---- factor_product ----------------------------------------------------------------------------------------------------------


def _both_ways(name: str, product: Product, depth: int) -> Step:
    factors = [random(k, around=SCALE).requires_grad_() for k in range(depth)]
    gradient = random(99)

    def run() -> None:
        for w in factors:
            w.grad = None
        product(factors).backward(gradient)

    run()
    parts = [w.detach()[:CHECKED].double() for w in factors]
    right = product_definition.factor_gradients(gradient[:CHECKED].double(), parts)
    for w, expected in zip(factors, right, strict=True):
        assert w.grad is not None
        _close(name, w.grad, expected)
    _close(name, product(factors), product_definition.product(parts))
    return run


def factor_product_contenders(depth: int) -> list[Contender]:
    """Forward and backward: L + 1 and 2 L + 1 words."""
    ours = [
        (f"pysteep {name}", lambda factors, name=name: functional.factor_product(factors, backend=name), missing)
        for name, missing in backends()
    ]
    peers = [(f"torch {name}", product, "") for name, product in products().items()]
    return [
        Contender(name, 3 * depth + 2, lambda name=name, f=product: _both_ways(name, f, depth), missing)
        for name, product, missing in [*ours, *peers]
    ]


# ---- mirror_step -------------------------------------------------------------------------------------------------------------


def _torch_mirror(name: str, q: float, *, compiled: bool) -> Step:
    """Depth 2 in closed form, as one would write the flow: x <- x - lr (M(x) s_q(g) + 2 decay x)."""
    x, g = random(0), random(1)
    square = SCALE ** (2 * q)

    def plain(x: Tensor, g: Tensor) -> Tensor:
        metric = torch.sqrt(4 * x.abs() ** q + square) if q != 2 else torch.sqrt(4 * x * x + square)
        u = g.sign() if q == 1 else g
        return x - LR * (metric * u + 2 * DECAY * x)

    flow = torch.compile(plain, dynamic=False) if compiled else plain

    def step() -> None:
        x.copy_(flow(x, g))

    expected = [x[:CHECKED].double()]
    numbers = {"weight_decay": DECAY, "maximize": False, "grad_scale": 1.0, "found_inf": 0.0}
    balance = torch.tensor(SCALE**q, dtype=torch.float64)
    mirror_definition.mirror_step(expected, [g[:CHECKED]], [balance], depth=2, lr=LR, q=q, **numbers)
    step()
    _close(name, x, expected[0])  # the same to first order in lr
    return step


def _sgd() -> Step:
    p = nn.Parameter(random(0))
    p.grad = random(1)
    return torch.optim.SGD([p], lr=LR, weight_decay=DECAY, fused=True).step


def mirror_step_contenders(depth: int, q: float) -> list[Contender]:
    ours = [
        Contender(
            f"pysteep {backend}",
            3,
            lambda backend=backend: _ours(f"pysteep {backend}", depth, q, "implicit", backend),
            missing,
        )
        for backend, missing in backends()
    ]
    if depth != 2 or q not in (1.0, 2.0):
        return ours
    peers = [
        Contender(name, 3, lambda name=name, compiled=compiled: _torch_mirror(name, q, compiled=compiled))
        for name, compiled in (("torch eager, metric", False), ("torch.compile, metric", True))
    ]
    return [*ours, *peers, Contender("torch SGD fused, depth 1", 3, _sgd)]
