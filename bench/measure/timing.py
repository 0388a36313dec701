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

LARGEST_COPY = 1 << 30  # bytes; the rate of longer copies is that of this one


def triad(parameters: list[nn.Parameter]) -> Step:
    """w <- w + a g over the very memory of `parameters` from `Work.parameters`: the limit that memory sets to a step."""

    def block(tensor: Tensor) -> Tensor:
        return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())

    assert parameters[0].grad is not None
    w, g = block(parameters[0].detach()), block(parameters[0].grad)
    return lambda: w.add_(g, alpha=1e-9)


def triad_of(moved: int, device: str = "cpu") -> Step:
    """w <- w + a g that reads and writes `moved` bytes in all."""
    w, g = (torch.full((max(moved // 12, 1),), value, device=device) for value in (0.5, 1.0))
    return lambda: w.add_(g, alpha=1e-9)


def copy_of(moved: int, device: str = "cpu") -> Step:
    """A copy from memory to memory that reads and writes `moved` bytes in all."""
    source = torch.empty(max(moved // 2, 1), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def clock(device: str) -> float:
    """Seconds, once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def pause() -> None:
    """Until the OpenMP threads of what ran before stop spinning, for milliseconds, on cores that others want."""
    time.sleep(0.01)


def seconds(step: Step, count: int, device: str = "cpu") -> float:
    """Of one of `count` calls."""
    start = clock(device)
    for _ in range(count):
        step()
    return (clock(device) - start) / count


def repetitions(step: Step, device: str = "cpu") -> int:
    """How often to call `step` within one timing, so that neither the clock's resolution nor waiting for the device matters."""
    at_least = 2e-2 if device == "cuda" else 2e-3
    return max(1, int(at_least / max(seconds(step, 1, device), 1e-7)))


def medians(steps: Mapping[Name, Step], rounds: int, device: str = "cpu") -> dict[Name, float]:
    """Median seconds of one call of each step, one timing of each in every round."""
    counts = {}
    for name, step in steps.items():
        step()
        counts[name] = repetitions(step, device)
    times: dict[Name, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            pause()
            step()  # what the one before left cold
            times[name].append(seconds(step, counts[name], device))
    return {name: statistics.median(values) for name, values in times.items()}
