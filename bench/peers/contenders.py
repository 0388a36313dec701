"""Who steps: pysteep's homes, torch's optimisers, other packages; each in its fastest setting for descent with decay.

All of them descend as pysteep does with the same q: torch's SGD at q = 2, the sign methods at q = 1 with their momenta switched
off, so that one definition checks everyone. Those that read and write momenta all the same have more bytes to move.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import pysteep

from ..measure.works import Work, sample

LR, DECAY = 0.1, 0.5
"""A step that 16 bits can see. Under one gradient for ever weights end at -u / DECAY, so timings see neither 0 nor infinity."""

Step = Callable[[], object]
Make = Callable[[list[nn.Parameter], float], Step]
SLOW = 4 * 10**8  # weights: more take those contenders minutes on a CPU
EVERY = (1.0, 1.5, 1.7, 2.0)


@dataclass(frozen=True)
class Contender:
    """`make(parameters, q)` gives a function that takes one step; `qs` are those it can do."""

    name: str
    make: Make
    qs: tuple[float, ...]
    missing: str = ""  # why it is absent
    words: int = 3  # of memory that it must move for each weight
    tensors: int = 1 << 30  # the longest list that it is asked for
    weights: int = 1 << 60  # and the most weights

    def absent(self, work: Work) -> str:
        """Why it does not take part; empty if it does."""
        if not self.missing and len(work.shapes) > self.tensors:
            return f"takes minutes to prepare {len(work.shapes)} tensors"
        if not self.missing and work.weights > self.weights:
            return f"takes minutes for {work.weights / 1e9:.1f} G weights"
        return self.missing


def _pysteep(backend: str) -> Make:
    return lambda parameters, q: pysteep.SteepestDescent(parameters, lr=LR, q=q, weight_decay=DECAY, backend=backend).step


def _sgd(**how: bool) -> Make:  # at q = 2 coupled and decoupled decay are the same
    return lambda parameters, _: torch.optim.SGD(parameters, lr=LR, weight_decay=DECAY, **how).step


def _adamw(**how: bool) -> Make:
    options = {"lr": LR, "weight_decay": DECAY, "betas": (0.0, 0.0), "eps": 1e-30}
    return lambda parameters, _: torch.optim.AdamW(parameters, **options, **how).step


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


def _lion_pytorch(parameters: list[nn.Parameter], _: float) -> Step:
    from lion_pytorch import Lion

    on_gpu = parameters[0].is_cuda
    return Lion(parameters, lr=LR, weight_decay=DECAY, betas=(0.0, 0.0), use_triton=on_gpu, decoupled_weight_decay=False).step


def _optimi_sgd(parameters: list[nn.Parameter], _: float) -> Step:
    from optimi import SGD

    return SGD(parameters, lr=LR, weight_decay=DECAY, kahan_sum=False, **_optimi_home(parameters)).step


def _optimi_lion(parameters: list[nn.Parameter], _: float) -> Step:
    from optimi import Lion

    options = {"betas": (0.0, 0.0), "kahan_sum": False}
    return Lion(parameters, lr=LR, weight_decay=DECAY, **options, **_optimi_home(parameters)).step


def _optimi_home(parameters: list[nn.Parameter]) -> dict[str, bool]:
    return {"triton": True} if parameters[0].is_cuda else {"foreach": True}


def _sign_sgd(parameters: list[nn.Parameter], _: float) -> Step:
    from pytorch_optimizer import SignSGD

    return SignSGD(parameters, lr=LR, momentum=0.0, weight_decay=DECAY, weight_decouple=True, foreach=True).step


def _bitsandbytes_lion(parameters: list[nn.Parameter], _: float) -> Step:
    from bitsandbytes.optim import Lion32bit

    return Lion32bit(parameters, lr=LR, weight_decay=DECAY, betas=(0.0, 0.0)).step


def _apex_sgd(parameters: list[nn.Parameter], _: float) -> Step:
    from apex.optimizers import FusedSGD

    return FusedSGD(parameters, lr=LR, weight_decay=DECAY).step


def _without(package: str, device: str = "", needed: str = "") -> str:
    """Why a package is missing on `device`, where it may need another."""
    if needed and device != needed:
        return "needs a GPU"
    return "" if importlib.util.find_spec(package) else f"{package} is not installed"


def pysteep_homes(device: str) -> dict[str, str]:
    """pysteep's backends that are fast on `device`, each with why it is missing, or ""."""
    found = pysteep.backends()
    return {
        name: "" if found[name].available else found[name].reason
        for name in (("cpp", "numba") if device == "cpu" else ("cuda", "triton"))
    }


def contenders(device: str = "cpu") -> list[Contender]:
    """All of them; those that cannot take part here say why in `missing`."""
    slow = SLOW if device == "cpu" else 1 << 60
    ours = [Contender(f"pysteep {name}", _pysteep(name), EVERY, missing) for name, missing in pysteep_homes(device).items()]
    return [
        *ours,
        Contender("torch SGD fused", _sgd(fused=True), (2.0,)),
        Contender("torch SGD foreach", _sgd(foreach=True), (2.0,)),
        Contender("torch AdamW fused", _adamw(fused=True), (1.0,), words=7, weights=slow),
        Contender("torch AdamW foreach", _adamw(foreach=True), (1.0,), words=7, weights=slow),
        Contender("torch.compile", _compiled, (1.0, 1.7, 2.0), tensors=200),
        Contender("torch eager", _eager, (1.0, 1.7, 2.0), weights=slow),
        Contender("lion-pytorch", _lion_pytorch, (1.0,), _without("lion_pytorch"), words=5, weights=slow),
        Contender("torch-optimi SGD", _optimi_sgd, (2.0,), _without("optimi"), weights=slow),
        Contender("torch-optimi Lion", _optimi_lion, (1.0,), _without("optimi"), words=5, weights=slow),
        Contender("pytorch_optimizer SignSGD", _sign_sgd, (1.0,), _without("pytorch_optimizer"), weights=slow),
        Contender("bitsandbytes Lion", _bitsandbytes_lion, (1.0,), _without("bitsandbytes", device, "cuda"), words=5),
        Contender("apex SGD", _apex_sgd, (2.0,), _without("apex", device, "cuda")),
    ]


def check(contender: Contender, parameters: list[nn.Parameter], q: float) -> Step:
    """The contender's step, after one whose result was found right against the definition in float64."""
    step = contender.make(parameters, q)
    before, gradients = sample(parameters), sample([p.grad for p in parameters if p.grad is not None])
    step()
    eps = torch.finfo(parameters[0].dtype).eps
    for after, w, g in zip(sample(parameters), before, gradients, strict=True):
        w, g = w.double(), g.double()
        u = g.sign() * g.abs() ** (q - 1)
        error = (after.double() - (w - LR * (u + DECAY * w))).abs()
        assert bool((error <= 2 * eps * (w.abs() + LR * u.abs())).all()), f"{contender.name} is wrong at q = {q}"
    return step
