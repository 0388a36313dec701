"""Throughput of a step of the mirror flow: `pytest bench --benchmark-only -k "mirror_step and cpp"`.

Every contender's answer is checked first. Before each of its timings the triad over the same bytes is timed as well.
"""

from __future__ import annotations

from typing import Any

import pytest

from . import depth as works
from .timing import benchmark_beside

CASES = [
    (depth, q, contender)
    for depth in (2, 3, 10)
    for q in (1.0, 1.5, 1.7, 2.0)
    for contender in works.mirror_step_contenders(depth, q)
]
IDS = [f"depth{depth}-q{q:g}-{contender.name}" for depth, q, contender in CASES]


@pytest.mark.parametrize(("depth", "q", "contender"), CASES, ids=IDS)
def bench_mirror_step(benchmark: Any, depth: int, q: float, contender: works.Contender) -> None:
    if contender.missing:
        pytest.skip(f"{contender.name}: {contender.missing}")
    benchmark.group = f"mirror_step, depth {depth}, q = {q:g}"
    moved = 4 * contender.words * works.WEIGHTS
    benchmark_beside(
        benchmark, contender.make(), works.triad(contender.words), moved, contender=contender.name, q=q, depth=depth
    )
