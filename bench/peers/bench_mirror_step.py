"""Throughput of a step of the mirror flow: `pytest bench --benchmark-only -k "mirror_step and cpp"`."""

from __future__ import annotations

from typing import Any

from .cases import Case, per_call, run
from .depth_cases import steps

pytestmark = per_call


def cases(device: str) -> list[Case]:
    return steps("mirror_step", ("implicit",), device)


def bench_mirror_step(benchmark: Any, case: Case, device: str, at_most: int | None) -> None:
    run(benchmark, case, device, at_most)
