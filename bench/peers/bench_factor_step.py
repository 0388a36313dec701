"""Throughput of a step on factors, full and tied: `pytest bench --benchmark-only -k "factor_step and tied and cpp"`."""

from __future__ import annotations

from typing import Any

from .cases import Case, per_call, run
from .depth_cases import steps

pytestmark = per_call


def cases(device: str) -> list[Case]:
    return steps("factor_step", ("full", "tied"), device)


def bench_factor_step(benchmark: Any, case: Case, device: str, at_most: int | None) -> None:
    run(benchmark, case, device, at_most)
