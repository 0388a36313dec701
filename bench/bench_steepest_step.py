"""Throughput of a step, by work, contender and q: `make bench`, or `pytest bench --benchmark-only -k "cpp and q1.7"`.

Every contender's answer is checked first. Before each of its timings the triad over the same bytes is timed as well, so
`extra_info` holds a share of the memory's limit taken in the same moments.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch

from .contenders import Contender, check, contenders
from .timing import pause, repetitions, triad
from .works import WORKS, Work

ROUNDS = 15
CASES = [(work, contender, q) for work in WORKS for contender in contenders() for q in contender.qs]
IDS = [f"{work.name}-{contender.name}-q{q:g}" for work, contender, q in CASES]


@pytest.mark.parametrize(("work", "contender", "q"), CASES, ids=IDS)
def bench_steepest_step(benchmark: Any, work: Work, contender: Contender, q: float) -> None:
    if contender.missing:
        pytest.skip(f"{contender.name}: {contender.missing}")
    parameters = work.parameters()
    step, limit = check(contender, parameters, q), triad(parameters)
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

    benchmark.group = f"{work.name}, q = {q:g}"
    benchmark.pedantic(timed, setup=time_the_limit, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.disabled:
        return
    seconds, triad_seconds = benchmark.stats.stats.median / inner, statistics.median(times)
    moved = work.bytes(torch.float32)
    benchmark.extra_info.update(
        contender=contender.name,
        q=q,
        bytes=moved,
        microseconds=round(seconds * 1e6, 2),
        gigabytes_per_second=round(moved / seconds / 1e9, 2),
        triad_microseconds=round(triad_seconds * 1e6, 2),
        share_of_triad=round(triad_seconds / seconds, 3),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
    )
