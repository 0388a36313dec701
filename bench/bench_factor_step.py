"""Throughput of a step on factors, full and tied: `pytest bench --benchmark-only -k "factor_step and tied and cpp"`.

Every contender's answer is checked first. Before each of its timings the triad over the same bytes is timed as well.
"""

from __future__ import annotations

from typing import Any

import pytest

from . import depth as works
from .timing import benchmark_beside

CASES = [
    (storage, depth, q, contender)
    for storage, depths in (("full", (2, 3, 10)), ("tied", (3, 10)))
    for depth in depths
    for q in (1.0, 1.5, 1.7, 2.0)
    for contender in works.factor_step_contenders(depth, q, storage)
]
IDS = [f"{storage}-depth{depth}-q{q:g}-{contender.name}" for storage, depth, q, contender in CASES]


@pytest.mark.parametrize(("storage", "depth", "q", "contender"), CASES, ids=IDS)
def bench_factor_step(benchmark: Any, storage: str, depth: int, q: float, contender: works.Contender) -> None:
    if contender.missing:
        pytest.skip(f"{contender.name}: {contender.missing}")
    benchmark.group = f"factor_step {storage}, depth {depth}, q = {q:g}"
    moved = 4 * contender.words * works.WEIGHTS
    benchmark_beside(
        benchmark,
        contender.make(),
        works.triad(contender.words),
        moved,
        contender=contender.name,
        q=q,
        depth=depth,
        storage=storage,
    )
