"""Time of a step against size, number of tensors, threads and depth: `pytest bench --benchmark-only -k scaling`."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

from ..measure.works import RESNET50, Work
from . import bench_steepest_step, depth_cases
from .cases import Case, Prepared, per_call, run
from .contenders import contenders

pytestmark = per_call
SIZES = [10**exponent for exponent in range(3, 9)]
COUNTS = (1, 10, 100, 1000, 10_000)
DEPTHS = (2, 3, 5, 10, 20)
PEERS = ("torch SGD fused", "torch SGD foreach")


def cases(device: str) -> list[Case]:
    return [*_sizes(device), *_counts(device), *_threads(device), *_depths(device)]


def _step(over: str, at: int, work: Work, device: str, qs: tuple[float, ...]) -> list[Case]:
    return [
        Case(
            "scaling",
            work.name,
            contender.name,
            prepare_step,
            q=q,
            missing=contender.absent(work),
            what=(work, contender),
            more={"over": over, "at": at},
        )
        for contender in contenders(device)
        for q in qs
        if q in contender.qs and (contender.name in PEERS or contender.name.startswith("pysteep"))
    ]


def _sizes(device: str) -> list[Case]:
    return [
        case
        for size in SIZES
        for case in _step("size", size, Work(f"one tensor of {size}", ((size,),)), device, (1.0, 1.7, 2.0))
    ]


def _counts(device: str) -> list[Case]:
    works = [(count, Work(f"{count} tensors of 1000", ((1000,),) * count)) for count in COUNTS]
    return [case for count, work in works for case in _step("tensors", count, work, device, (2.0,))]


def _threads(device: str) -> list[Case]:
    if device != "cpu":
        return []
    counts = sorted({1, os.cpu_count() or 1, *(2**k for k in range(1, 8) if 2**k <= (os.cpu_count() or 1))})
    return [case for count in counts for case in _step("threads", count, RESNET50, device, (1.0, 1.7, 2.0))]


def _depths(device: str) -> list[Case]:
    names = ("pysteep cpp", "pysteep cuda", "torch chain + SGD")
    return [
        replace(case, more={"over": "depth", "at": depth})
        for depth in DEPTHS
        for storage in ("full", "tied", "implicit")
        for case in depth_cases.step("scaling", depth_cases.one(device), torch.float32, depth, 2.0, storage, device)
        if case.contender in names
    ]


def prepare_step(case: Case, device: str, at_most: int | None) -> Prepared:
    if case.more["over"] == "threads":
        torch.set_num_threads(case.more["at"])
    return bench_steepest_step.prepare(case, device, at_most)


def bench_scaling(benchmark: Any, case: Case, device: str, at_most: int | None) -> None:
    threads = torch.get_num_threads()
    try:
        run(benchmark, case, device, at_most)
    finally:
        torch.set_num_threads(threads)
