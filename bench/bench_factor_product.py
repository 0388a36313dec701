"""Throughput of a product of factors, forward and backward: `pytest bench --benchmark-only -k factor_product`.

Every contender's answer is checked first. Before each of its timings the triad over the same bytes is timed as well.
"""

from __future__ import annotations

from typing import Any

import pytest

from . import depth as works
from .timing import benchmark_beside

CASES = [(depth, contender) for depth in (2, 3, 10) for contender in works.factor_product_contenders(depth)]
IDS = [f"depth{depth}-{contender.name}" for depth, contender in CASES]


@pytest.mark.parametrize(("depth", "contender"), CASES, ids=IDS)
def bench_factor_product(benchmark: Any, depth: int, contender: works.Contender) -> None:
    if contender.missing:
        pytest.skip(f"{contender.name}: {contender.missing}")
    benchmark.group = f"factor_product forward and backward, depth {depth}"
    moved = 4 * contender.words * works.WEIGHTS
    benchmark_beside(benchmark, contender.make(), works.triad(contender.words), moved, contender=contender.name, depth=depth)
