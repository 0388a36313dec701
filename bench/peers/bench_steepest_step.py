"""Throughput of a step, by work, dtype, q and contender: `pytest bench --benchmark-only -k "steepest and cpp"`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from ..measure import operations
from ..measure.timing import triad
from ..measure.works import Work, works
from .cases import Case, Prepared, WrongPeer, per_call, run
from .contenders import Contender, check, contenders

pytestmark = per_call
QS = (1.0, 1.5, 1.7, 2.0)


def cases(device: str) -> list[Case]:
    return [
        Case(
            "steepest_step",
            work.name,
            contender.name,
            prepare,
            dtype,
            q,
            missing=contender.absent(work),
            what=(work, contender),
        )
        for dtype in (torch.float32, torch.bfloat16)
        for work in works(dtype, device)
        for q in QS
        for contender in contenders(device)
        if q in contender.qs
    ]


@functools.lru_cache(maxsize=1)
def parameters_of(work: Work, dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    """One list for all contenders, which come one after another."""
    return work.parameters(dtype, device)


def prepare(case: Case, device: str, at_most: int | None) -> Prepared:
    work, contender = case.what
    assert isinstance(work, Work)
    assert isinstance(contender, Contender)
    assert case.q is not None
    work = work.at_most(at_most) if at_most else work
    parameters = parameters_of(work, case.dtype, device)
    try:
        step = check(contender, parameters, case.q)
    except AssertionError as error:
        if contender.name.startswith("pysteep"):
            raise
        raise WrongPeer(f"its result in {str(case.dtype).removeprefix('torch.')} is wrong") from error
    useful = operations.steepest_step(case.q) * work.weights
    moved = work.bytes(case.dtype, contender.words)
    return Prepared(step, moved, triad(parameters), work.bytes(case.dtype), None if "AdamW" in contender.name else useful)


def bench_steepest_step(benchmark: Any, case: Case, device: str, at_most: int | None) -> None:
    run(benchmark, case, device, at_most)
