"""Who steps: pysteep's homes, torch's optimisers, other packages; each in its fastest setting for descent with decay."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import pysteep

LR, DECAY = 1e-6, 0.1
Step = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """`make(parameters, q)` gives a function that takes one step; `qs` are those it can do."""

    name: str
    make: Callable[[list[nn.Parameter], float], Step]
    qs: tuple[float, ...]
    missing: str = ""  # why it is absent


def _pysteep(backend: str) -> Callable[[list[nn.Parameter], float], Step]:
    return lambda parameters, q: pysteep.SteepestDescent(parameters, lr=LR, q=q, weight_decay=DECAY, backend=backend).step


def _sgd(**how: bool) -> Callable[[list[nn.Parameter], float], Step]:  # at q = 2 coupled and decoupled decay are the same
    return lambda parameters, _: torch.optim.SGD(parameters, lr=LR, weight_decay=DECAY, **how).step


def _eager(parameters: list[nn.Parameter], q: float) -> Step:
    @torch.no_grad()
    def step() -> None:
        for p in parameters:
            assert p.grad is not None
            u = p.grad.sign() if q == 1 else p.grad.sign() * p.grad.abs().pow(q - 1)
            p.mul_(1 - LR * DECAY).sub_(u, alpha=LR)

    return step


def _compiled(parameters: list[nn.Parameter], q: float) -> Step:
    torch._dynamo.config.recompile_limit = 100  # one function, compiled for every work and q
    return torch.compile(_eager(parameters, q))


def _lion(parameters: list[nn.Parameter], _: float) -> Step:
    from lion_pytorch import Lion

    return Lion(parameters, lr=LR, weight_decay=DECAY, betas=(0.0, 0.0)).step


def contenders(device: str = "cpu") -> list[Contender]:
    """All of them; those that cannot take part here say why in `missing`."""
    every = (1.0, 1.5, 1.7, 2.0)
    backends = pysteep.backends()
    names = ("cpp", "numba") if device == "cpu" else ("cuda", "triton")
    ours = [
        Contender(f"pysteep {name}", _pysteep(name), every, missing="" if backends[name].available else backends[name].reason)
        for name in names
    ]
    lion = "" if importlib.util.find_spec("lion_pytorch") else "lion-pytorch is not installed"
    return [
        *ours,
        Contender("torch SGD fused", _sgd(fused=True), (2.0,)),
        Contender("torch SGD foreach", _sgd(foreach=True), (2.0,)),
        Contender("torch.compile", _compiled, every),
        Contender("lion-pytorch", _lion, (1.0,), missing=lion),
        Contender("torch eager", _eager, every),
    ]


def check(contender: Contender, parameters: list[nn.Parameter], q: float) -> Step:
    """The contender's step, after one whose result was found right against the definition in float64."""
    starts = [p.detach().clone() for p in parameters]
    step = contender.make(parameters, q)
    step()
    eps = torch.finfo(parameters[0].dtype).eps
    for p, start in zip(parameters, starts, strict=True):
        assert p.grad is not None
        w, g = start.double(), p.grad.double()
        expected = w - LR * (g.sign() * g.abs() ** (q - 1) + DECAY * w)
        error = (p.detach().double() - expected).abs()
        assert bool((error <= 2 * eps * (w.abs() + LR)).all()), f"{contender.name} is wrong at q = {q}"
    return step
