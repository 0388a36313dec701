"""Throughput of a product of factors, forward and backward: `pytest bench --benchmark-only -k factor_product`."""

from __future__ import annotations

from typing import Any

from .cases import Case, per_call, run
from .depth_cases import products

pytestmark = per_call


def cases(device: str) -> list[Case]:
    return products(device)


def bench_factor_product(benchmark: Any, case: Case, device: str, at_most: int | None) -> None:
    run(benchmark, case, device, at_most)
