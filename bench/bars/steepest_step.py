"""What steepest_step must reach on a CPU: `python -m bench bars steepest_step`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence

import torch

from ..measure.reporting import Bar, Suite, Time
from ..measure.timing import medians, triad
from ..measure.works import MANY_TINY, ONE_LARGE, RESNET50, THOUSANDS, Work, llama_8b
from ..peers.contenders import check, contenders

ROUNDS = 25
Times = dict[tuple[str, float], float]


def times_of(work: Work, rounds: int, qs: tuple[float, ...]) -> Times:
    """Median seconds by (contender, q), with the triad as ("triad", 0)."""
    parameters = work.parameters()
    steps = {("triad", 0.0): triad(parameters)}
    for contender in contenders():
        for q in contender.qs:
            if q in qs and not contender.absent(work):
                steps[contender.name, q] = check(contender, parameters, q)
    return medians(steps, rounds)


def rows(work: Work, times: Times) -> list[Time]:
    """What was timed, and who was not."""
    limit = times["triad", 0.0] * 1e6
    timed = [Time(work.name, name, q or None, seconds * 1e6, limit) for (name, q), seconds in times.items()]
    reasons = {contender.name: contender.absent(work) for contender in contenders()}
    return [*timed, *(Time(work.name, name, None, None, None, reason) for name, reason in reasons.items() if reason)]


def table(times: Sequence[Time]) -> str:
    lines = [f"| {times[0].work} | q | time | against the triad |", "|---|---|---|---|"]
    for _, name, q, microseconds, limit, reason in times:
        if microseconds is None or limit is None:
            lines.append(f"| {name} | | absent: {reason} | |")
            continue
        shown = f"{microseconds / 1e3:.2f} ms" if microseconds >= 1e3 else f"{microseconds:.0f} µs"
        lines.append(f"| {name} | {f'{q:g}' if q else ''} | {shown} | {microseconds / limit:.2f} |")
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
    few, some = (1.0, 1.7, 2.0), max(1, rounds // 2)
    llama = llama_8b(torch.float32, "cpu")
    found = {
        work: times_of(work, count, qs)
        for work, count, qs in (
            (RESNET50, rounds, (1.0, 1.5, 1.7, 2.0)),
            (llama, max(1, rounds // 5), few),
            (ONE_LARGE, some, few),
            (THOUSANDS, rounds, few),
            (MANY_TINY, rounds * 4, few),
        )
    }
    resnet, large, tiny = found[RESNET50], found[ONE_LARGE], found[MANY_TINY]
    alone, together = import_seconds(7)

    def ratio(times: Times, name: str, q: float, other: tuple[str, float] = ("triad", 0.0)) -> float:
        return times[name, q] / times[other]

    cpp, numba, fused = "pysteep cpp", "pysteep numba", ("torch SGD fused", 2.0)
    exact = (1.0, 1.5, 2.0)
    bars: list[Bar] = []
    for q in exact:
        bars.append(Bar(f"C++, ResNet-50, q = {q:g}: time / triad", ratio(resnet, cpp, q), "<=", 1.15))
        bars.append(Bar(f"C++, ResNet-50, q = {q:g}: torch fused SGD / time", 1 / ratio(resnet, cpp, q, fused), ">=", 1.2))
    bars.append(Bar("C++, 50 M, q = 1.7: time / triad", ratio(large, cpp, 1.7), "<=", 1.4))
    bars.append(Bar("C++, 50 M, q = 1.7: torch eager / time", 1 / ratio(large, cpp, 1.7, ("torch eager", 1.7)), ">=", 15.0))
    for q in (1.0, 2.0):
        bars.append(Bar(f"C++, 161 tensors of 8, q = {q:g}: torch fused SGD / time", 1 / ratio(tiny, cpp, q, fused), ">=", 2.0))
        bars.append(Bar(f"numba, ResNet-50, q = {q:g}: time / triad", ratio(resnet, numba, q), "<=", 1.3))
        bars.append(Bar(f"numba, 50 M, q = {q:g}: time / triad", ratio(large, numba, q), "<=", 1.3))
    bars.append(Bar("numba, ResNet-50, q = 1.7: time / triad", ratio(resnet, numba, 1.7), "<=", 3.0))
    bars.append(Bar("numba, 50 M, q = 1.7: time / triad", ratio(large, numba, 1.7), "<=", 3.0))
    bars.append(Bar("import pysteep beyond import torch, seconds", together - alone, "<=", 0.3))

    times = [rows(work, of_work) for work, of_work in found.items()]
    every = [time for of_work in times for time in of_work if time.contender != "triad"]
    return Suite(bars, [table(of_work) for of_work in times], f"medians of {rounds} rounds taken in turn", every)
