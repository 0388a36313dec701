"""Times taken turn by turn, so that what disturbs a shared machine disturbs every contender alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Name = TypeVar("Name")
Step = Callable[[], object]

ROUNDS = 15


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


def benchmark_beside(benchmark: Any, step: Step, limit: Step, moved: int, **info: object) -> None:
    """Time `step` by pytest-benchmark and, before each of its timings, `limit`: the triad over the `moved` bytes."""
    limit()
    inner_limit, times = repetitions(limit), []

    def time_the_limit() -> None:
        start = time.perf_counter()
        for _ in range(inner_limit):
            limit()
        times.append((time.perf_counter() - start) / inner_limit)
        pause()

    inner = repetitions(step)

    def timed() -> None:
        for _ in range(inner):
            step()

    benchmark.pedantic(timed, setup=time_the_limit, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.disabled:
        return
    seconds, limit_seconds = benchmark.stats.stats.median / inner, statistics.median(times)
    benchmark.extra_info.update(
        info,
        bytes=moved,
        microseconds=round(seconds * 1e6, 2),
        gigabytes_per_second=round(moved / seconds / 1e9, 2),
        triad_microseconds=round(limit_seconds * 1e6, 2),
        share_of_triad=round(limit_seconds / seconds, 3),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
    )
