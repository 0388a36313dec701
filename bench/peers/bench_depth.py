"""Throughput of the ops on depth: a product of factors, forward and backward, a step on factors, a step of the mirror flow.

`pytest bench --benchmark-only -k "factor_step and tied and cpp"`; also `-k factor_product` and `-k mirror_step`.
"""

from __future__ import annotations

from typing import Any

from .cases import Case, per_call, run
from .depth_cases import products, steps

pytestmark = per_call


def cases(device: str) -> list[Case]:
    return [
        *products(device),
        *steps("factor_step", ("full", "tied"), device),
        *steps("mirror_step", ("implicit",), device),
    ]


def bench_factor_product(benchmark: Any, case: Case, device: str, at_most: int | None) -> None:
    run(benchmark, case, device, at_most)


def bench_factor_step(benchmark: Any, case: Case, device: str, at_most: int | None) -> None:
    run(benchmark, case, device, at_most)


def bench_mirror_step(benchmark: Any, case: Case, device: str, at_most: int | None) -> None:
    run(benchmark, case, device, at_most)
