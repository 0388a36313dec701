"""Times taken turn by turn, so that what disturbs a shared machine disturbs every contender alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

Name = TypeVar("Name")
Step = Callable[[], object]


def triad(parameters: list[nn.Parameter]) -> Step:
    """w <- w + a g over the very memory of `parameters` from `Work.parameters`: the limit that memory sets to a step."""

    def block(tensor: Tensor) -> Tensor:
        return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())

    assert parameters[0].grad is not None
    w, g = block(parameters[0].detach()), block(parameters[0].grad)
    return lambda: w.add_(g, alpha=1e-9)


def pause() -> None:
    """Until the OpenMP threads of what ran before stop spinning, for milliseconds, on cores that others want."""
    time.sleep(0.01)


def repetitions(step: Step, at_least: float = 2e-3) -> int:
    """How often to call `step` within one timing, so that the clock's resolution does not matter."""
    start = time.perf_counter()
    step()
    return max(1, int(at_least / max(time.perf_counter() - start, 1e-7)))


def medians(steps: Mapping[Name, Step], rounds: int) -> dict[Name, float]:
    """Median seconds of one call of each step, one timing of each in every round."""
    counts = {}
    for name, step in steps.items():
        step()
        counts[name] = repetitions(step)
    times: dict[Name, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            pause()
            step()  # what the one before left cold
            start = time.perf_counter()
            for _ in range(counts[name]):
                step()
            times[name].append((time.perf_counter() - start) / counts[name])
    return {name: statistics.median(values) for name, values in times.items()}
