"""What rounding to 16 bits may cost beside rounding to the nearest, on a CPU: `python -m bench bars rounding`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pysteep import SteepestDescent

from ..measure.reporting import Bar, Suite
from ..measure.timing import Step, medians, triad
from ..measure.works import RESNET50, Work

ROUNDS = 25
MODES = ("nearest", "stochastic", "compensated")
BARS = {"stochastic": 1.3, "compensated": 1.5}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "C++, q = 1": ("cpp", {"q": 1.0}),
    "C++, q = 2": ("cpp", {"q": 2.0}),
    "C++, q = 1, momentum": ("cpp", {"q": 1.0, "betas": (0.9, 0.99)}),
    "C++, q = 1, tied depth 3": ("cpp", {"q": 1.0, "depth": 3}),
    "numba, q = 1": ("numba", {"q": 1.0}),
}


def parameters_of(work: Work) -> list[nn.Parameter]:
    parameters = [nn.Parameter(p.detach().bfloat16()) for p in work.parameters()]
    for p in parameters:
        p.grad = torch.randn_like(p)
    return parameters


def times_of(work: Work, rounds: int) -> tuple[list[Bar], str]:
    steps: dict[tuple[str, str], Step] = {}
    wide = work.parameters()
    for kind, (backend, options) in KINDS.items():
        for mode in MODES:
            optimizer = SteepestDescent(parameters_of(work), lr=1e-6, rounding=mode, backend=backend, **options)
            steps[kind, mode] = optimizer.step
    steps["triad of float32", ""] = triad(wide)
    times = medians(steps, rounds)
    lines = [f"| {work.name}, bfloat16 | ms | beside nearest |", "|---|---|---|"]
    bars = []
    for (kind, mode), seconds in times.items():
        ratio = seconds / times[kind, MODES[0]] if mode else float("nan")
        lines.append(f"| {kind} {mode} | {seconds * 1e3:.2f} | {f'{ratio:.2f}' if mode else ''} |")
        if mode in BARS and kind.startswith("C++"):
            bars.append(Bar(f"{kind}: {mode} / nearest", ratio, "<=", BARS[mode]))
    return bars, "\n".join(lines)


def measure(rounds: int) -> Suite:
    bars, table = times_of(RESNET50, rounds)
    return Suite(bars, [table], f"medians of {rounds} rounds taken in turn")
