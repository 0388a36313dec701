"""Throughput of a step, by work, contender and q: `make bench`, or `pytest bench --benchmark-only -k "cpp and q1.7"`.

Every contender's answer is checked first. Before each of its timings the triad over the same bytes is timed as well, so
`extra_info` holds a share of the memory's limit taken in the same moments.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .contenders import Contender, check, contenders
from .timing import benchmark_beside, triad
from .works import WORKS, Work

CASES = [(work, contender, q) for work in WORKS for contender in contenders() for q in contender.qs]
IDS = [f"{work.name}-{contender.name}-q{q:g}" for work, contender, q in CASES]


@pytest.mark.parametrize(("work", "contender", "q"), CASES, ids=IDS)
def bench_steepest_step(benchmark: Any, work: Work, contender: Contender, q: float) -> None:
    if contender.missing:
        pytest.skip(f"{contender.name}: {contender.missing}")
    parameters = work.parameters()
    benchmark.group = f"{work.name}, q = {q:g}"
    moved = work.bytes(torch.float32)
    benchmark_beside(benchmark, check(contender, parameters, q), triad(parameters), moved, contender=contender.name, q=q)
