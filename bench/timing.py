"""Times taken turn by turn, so that what disturbs a shared machine disturbs every contender alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from .works import Work

Step = Callable[[], object]


def triad(work: Work, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Step:
    """w <- w + a g over as many bytes as a step over `work` must move: the limit that memory sets."""
    w = torch.randn(work.weights, dtype=dtype, device=device)
    g = torch.randn(work.weights, dtype=dtype, device=device)
    return lambda: w.add_(g, alpha=1e-9)


def repetitions(step: Step, at_least: float = 2e-3) -> int:
    """How often to call `step` within one timing, so that the clock's resolution does not matter."""
    start = time.perf_counter()
    step()
    return max(1, int(at_least / max(time.perf_counter() - start, 1e-7)))


def medians(steps: Mapping[str, Step], rounds: int) -> dict[str, float]:
    """Median seconds of one call of each step, one timing of each in every round."""
    counts = {}
    for name, step in steps.items():
        step()
        counts[name] = repetitions(step)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(counts[name]):
                step()
            times[name].append((time.perf_counter() - start) / counts[name])
    return {name: statistics.median(values) for name, values in times.items()}
