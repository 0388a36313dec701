"""Times on a GPU, between events on its stream, turn by turn with a copy; on a CPU by the clock, so that the code runs.

What is smaller than a few times the second-level cache is there several times, and each call takes the next: else a timing
would measure the cache.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from ..measure.timing import Step, copy_of

CACHES = 4  # so many times the cache are all sets of operands together
CPU_CACHE = 1 << 17  # stands for a cache where the code is tried

Operands = TypeVar("Operands")


def cache_bytes(device: str) -> int:
    return int(torch.cuda.get_device_properties().L2_cache_size) if device == "cuda" else CPU_CACHE


def beyond_cache(make: Callable[[], Operands], held: Callable[[Operands], int], device: str) -> list[Operands]:
    """So many that they hold more bytes together than the cache has, some times over; large operands are one."""
    first = make()
    count = -(-CACHES * cache_bytes(device) // max(held(first), 1))
    return [first, *(make() for _ in range(count - 1))]


def in_turn(steps: Sequence[Step]) -> Step:
    """Each call takes the next. What a step returned is kept until it returns again, so that results lie apart as well."""
    kept: list[object] = [None] * len(steps)
    turns = itertools.cycle(range(len(steps)))

    def step() -> None:
        i = next(turns)
        kept[i] = None
        kept[i] = steps[i]()

    return step if len(steps) > 1 else steps[0]


def copies_of(moved: int, device: str) -> Step:
    """A copy that reads and writes `moved` bytes in all, by turns of several where they are few."""
    return in_turn(beyond_cache(lambda: copy_of(moved, device), lambda _: moved, device))


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


def host_medians(
    steps: Mapping[str, Step], rounds: int, device: str, calls: int = 50, before: Step | None = None
) -> dict[str, float]:
    """Median seconds that a call keeps the host, which does not wait for the device: of so few calls that none queues up.

    Only the host's time counts, so the operands may lie in a cache of the device. `before` is called before every call, and its
    time is left out.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            synchronize(device)
            times[name].append(_of_the_host(step, calls, before))
    synchronize(device)
    return {name: statistics.median(own[1:]) for name, own in times.items()}


def _of_the_host(step: Step, calls: int, before: Step | None) -> float:
    if before is None:
        start = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - start) / calls
    seconds = 0.0
    for _ in range(calls):
        before()
        start = time.perf_counter()
        step()
        seconds += time.perf_counter() - start
    return seconds / calls
