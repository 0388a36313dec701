"""Times on a GPU, between events on its stream, turn by turn with a copy; on a CPU by the clock, so that the code runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Step = Callable[[], object]

LARGEST_COPY = 1 << 31  # bytes of a buffer; more are copied in several goes


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Copy:
    """Copies on the device that read and write about `moved` bytes in all: the limit that memory sets."""

    def __init__(self, moved: int, device: str) -> None:
        size = min(max(moved // 2, 16), LARGEST_COPY)
        self.source = torch.empty(size, dtype=torch.uint8, device=device).random_()
        self.target = torch.empty_like(self.source)
        self.times = max(1, round(moved / 2 / size))
        self.share = moved / (2 * size * self.times)  # of the bytes asked for in those copied

    def __call__(self) -> None:
        for _ in range(self.times):
            self.target.copy_(self.source)


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


def kernels_of(step: Step) -> list[str]:
    """The names of the kernels that a call launches on the GPU, once for each launch."""
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in names if not name.startswith(("Memcpy", "Memset"))]
