"""Times on a GPU, between events on its stream, turn by turn with a copy; on a CPU by the clock, so that the code runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from .timing import Step


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def medians(steps: Mapping[str, Step], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of one call, one of each step in every round, after calls that compile and warm."""
    for step in steps.values():
        for _ in range(3):
            step()
    synchronize(device)
    timed = _between_events if device == "cuda" else _on_the_clock
    times: dict[str, list[Callable[[], float]]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(timed(step))
    synchronize(device)
    return {name: statistics.median(each() for each in own) for name, own in times.items()}


def _between_events(step: Step) -> Callable[[], float]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    return lambda: start.elapsed_time(end) / 1e3


def _on_the_clock(step: Step) -> Callable[[], float]:
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    return lambda: seconds


def host_medians(steps: Mapping[str, Step], rounds: int, device: str, calls: int = 50) -> dict[str, float]:
    """Median seconds that a call keeps the host, which does not wait for the device: of so few calls that none queues up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                step()
            times[name].append((time.perf_counter() - start) / calls)
    synchronize(device)
    return {name: statistics.median(own[1:]) for name, own in times.items()}
