"""What steepest_step must reach on a CPU: `python -m bench bars steepest_step`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from ..contenders import check, contenders
from ..reporting import Bar, Suite
from ..timing import medians, triad
from ..works import MANY_TINY, ONE_LARGE, RESNET50, Work

ROUNDS = 25
Times = dict[tuple[str, float], float]


def times_of(work: Work, rounds: int, qs: tuple[float, ...]) -> Times:
    """Median seconds by (contender, q), with the triad as ("triad", 0)."""
    parameters = work.parameters()
    steps = {("triad", 0.0): triad(parameters)}
    for contender in contenders():
        if contender.missing:
            print(f"absent: {contender.name} ({contender.missing})")
            continue
        for q in contender.qs:
            if q in qs:
                steps[contender.name, q] = check(contender, parameters, q)
    return medians(steps, rounds)


def table(work: Work, times: Times) -> str:
    limit = times["triad", 0.0]
    lines = [f"| {work.name} | q | time | against the triad |", "|---|---|---|---|"]
    for (name, q), seconds in times.items():
        shown = f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"
        lines.append(f"| {name} | {f'{q:g}' if q else ''} | {shown} | {seconds / limit:.2f} |")
    return "\n".join(lines)


def import_seconds(rounds: int) -> tuple[float, float]:
    """Median time of `import torch`, and of `import torch, pysteep`, in fresh processes taken in turn."""

    def start(code: str) -> Callable[[], float]:
        command = [sys.executable, "-c", f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"]
        return lambda: float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    runs = {name: start(code) for name, code in (("torch", "import torch"), ("both", "import torch, pysteep"))}
    values: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            values[name].append(run())
    return sorted(values["torch"])[rounds // 2], sorted(values["both"])[rounds // 2]


def measure(rounds: int) -> Suite:
    resnet = times_of(RESNET50, rounds, (1.0, 1.5, 1.7, 2.0))
    large = times_of(ONE_LARGE, max(1, rounds // 2), (1.0, 1.7, 2.0))
    tiny = times_of(MANY_TINY, rounds * 4, (1.0, 1.7, 2.0))
    alone, together = import_seconds(7)

    def ratio(times: Times, name: str, q: float, other: tuple[str, float] = ("triad", 0.0)) -> float:
        return times[name, q] / times[other]

    cpp, numba, fused = "pysteep cpp", "pysteep numba", ("torch SGD fused", 2.0)
    exact = (1.0, 1.5, 2.0)
    rows: list[Bar] = []
    for q in exact:
        rows.append(Bar(f"C++, ResNet-50, q = {q:g}: time / triad", ratio(resnet, cpp, q), "<=", 1.15))
        rows.append(Bar(f"C++, ResNet-50, q = {q:g}: torch fused SGD / time", 1 / ratio(resnet, cpp, q, fused), ">=", 1.2))
    rows.append(Bar("C++, 50 M, q = 1.7: time / triad", ratio(large, cpp, 1.7), "<=", 1.4))
    rows.append(Bar("C++, 50 M, q = 1.7: torch eager / time", 1 / ratio(large, cpp, 1.7, ("torch eager", 1.7)), ">=", 15.0))
    for q in (1.0, 2.0):
        rows.append(Bar(f"C++, 161 tensors of 8, q = {q:g}: torch fused SGD / time", 1 / ratio(tiny, cpp, q, fused), ">=", 2.0))
        rows.append(Bar(f"numba, ResNet-50, q = {q:g}: time / triad", ratio(resnet, numba, q), "<=", 1.3))
        rows.append(Bar(f"numba, 50 M, q = {q:g}: time / triad", ratio(large, numba, q), "<=", 1.3))
    rows.append(Bar("numba, ResNet-50, q = 1.7: time / triad", ratio(resnet, numba, 1.7), "<=", 3.0))
    rows.append(Bar("numba, 50 M, q = 1.7: time / triad", ratio(large, numba, 1.7), "<=", 3.0))
    rows.append(Bar("import pysteep beyond import torch, seconds", together - alone, "<=", 0.3))

    tables = [table(work, times) for work, times in ((RESNET50, resnet), (ONE_LARGE, large), (MANY_TINY, tiny))]
    return Suite(rows, tables, f"medians of {rounds} rounds taken in turn")
