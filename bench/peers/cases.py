"""What is timed, and how: each case by pytest-benchmark, and before each of its timings the triad and a copy of as many bytes.

`extra_info` of a case says what was done by whom, the fewest bytes that it must move, and which share of the memory's rate, as
the triad and the copy met it in the same moments, it reached.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from ..measure import machine
from ..measure.launches import launches
from ..measure.timing import LARGEST_COPY, Step, clock, copy_of, pause, repetitions, seconds

ROUNDS = 15
FEWEST_ROUNDS = 3
BUDGET = 1.5  # seconds for the rounds of a case
ABSENT: list[dict[str, str]] = []  # of this run: contender, suite, reason


@dataclass(frozen=True)
class Case:
    """`prepare(case, device, at_most)` gives the checked step and the triad beside it, of as many bytes as the second says."""

    suite: str
    work: str
    contender: str
    prepare: Callable[[Case, str, int | None], Prepared]
    dtype: torch.dtype = torch.float32
    q: float | None = None
    depth: int | None = None
    storage: str | None = None
    missing: str = ""
    what: Any = field(default=None, compare=False)  # for `prepare`
    more: dict[str, Any] = field(default_factory=dict, compare=False)  # for extra_info

    @property
    def group(self) -> str:
        options = [
            self.work,
            str(self.dtype).removeprefix("torch."),
            *([f"depth {self.depth}"] if self.depth and self.suite != "scaling" else []),
            *([f"q = {self.q:g}"] if self.q else []),
        ]
        return f"{self.suite}: {', '.join(options)}"

    @property
    def id(self) -> str:
        options = [
            str(self.dtype).removeprefix("torch."),
            *([self.storage] if self.storage else []),
            *([f"depth{self.depth}"] if self.depth else []),
            *([f"q{self.q:g}"] if self.q else []),
            *([f"{self.more['at']} {self.more['over']}"] if self.more.get("over") == "threads" else []),
        ]
        return "-".join([self.work, *options, self.contender])


@dataclass(frozen=True)
class Prepared:
    step: Step
    moved: int | None = None  # the fewest bytes of a call
    triad: Step | None = None
    triad_bytes: int = 0
    operations: int | None = None  # of a call
    more: dict[str, Any] = field(default_factory=dict)  # for extra_info


class PerCall:
    """pytest-benchmark's timer: the device's clock over the calls of a round, so that its statistics are of one call."""

    def __init__(self) -> None:
        self.device, self.calls = "cpu", 1

    def __call__(self) -> float:
        return clock(self.device) / self.calls


TIMER = PerCall()
per_call = pytest.mark.benchmark(timer=TIMER)


class WrongPeer(Exception):
    """A peer's answer is wrong, so its time says nothing."""


def run(benchmark: Any, case: Case, device: str, at_most: int | None) -> None:
    """Time a case, or say why it is absent."""
    if at_most:
        case = replace(case, work=f"{case.work}, its first {at_most} weights")
    benchmark.group = case.group
    if case.missing:
        absent(case, case.missing)
    try:
        prepared = case.prepare(case, device, at_most)
    except WrongPeer as error:
        absent(case, str(error))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        absent(case, "needs more memory than there is")
    limits: dict[str, tuple[Step, int]] = {}
    if prepared.moved is not None and prepared.triad is not None and not benchmark.disabled:
        copied = min(prepared.moved, LARGEST_COPY)
        limits = {"triad": (prepared.triad, prepared.triad_bytes), "copy": (copy_of(copied, device), copied)}
    _time(benchmark, case, device, prepared, limits)


def absent(case: Case, reason: str) -> None:
    entry = {"contender": case.contender, "suite": case.suite, "work": case.work, "reason": reason}
    if entry not in ABSENT:
        ABSENT.append(entry)
    pytest.skip(f"{case.contender}: {reason}")


def _time(benchmark: Any, case: Case, device: str, prepared: Prepared, limits: dict[str, tuple[Step, int]]) -> None:
    step = prepared.step
    inner, counts = repetitions(step, device), {name: repetitions(limit, device) for name, (limit, _) in limits.items()}
    times: dict[str, list[float]] = {name: [] for name in limits}

    def time_the_limits() -> None:
        for name, (limit, _) in limits.items():
            times[name].append(seconds(limit, counts[name], device))
        pause()
        step()  # what the limits left cold

    def timed() -> None:
        for _ in range(inner):
            step()

    TIMER.device, TIMER.calls = device, inner
    once = inner * seconds(step, 1, device)
    rounds = max(FEWEST_ROUNDS, min(ROUNDS, int(BUDGET / max(once, 1e-9))))
    benchmark.pedantic(timed, setup=time_the_limits, rounds=rounds)
    if benchmark.disabled:
        return
    own = benchmark.stats.stats.median
    info = {
        "suite": case.suite,
        "work": case.work,
        "contender": case.contender,
        "dtype": str(case.dtype).removeprefix("torch."),
        "q": case.q,
        "depth": case.depth,
        "storage": case.storage,
        "microseconds": round(own * 1e6, 2),
        "bytes": prepared.moved,
        "operations": prepared.operations,
        "launches": launches(step, device) or None,
        "calls_a_round": inner,
    }
    for name, (_, moved) in limits.items():
        assert prepared.moved is not None
        of_as_many = statistics.median(times[name]) * prepared.moved / moved
        info |= {f"{name}_microseconds": round(of_as_many * 1e6, 2), f"share_of_{name}": round(of_as_many / own, 3)}
    if prepared.moved is not None:
        info["gigabytes_per_second"] = round(prepared.moved / own / 1e9, 2)
    where = {
        "versions": machine.versions(case.contender),
        "device": machine.device_name(device),
        "commit": machine.commit()["id"],
    }
    benchmark.extra_info.update(info | case.more | prepared.more | where)
