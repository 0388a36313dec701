"""Throughput of the simulator: whole training runs of diagonal networks. `pytest bench --benchmark-only -k diagonal_flow`."""

from __future__ import annotations

from typing import Any

from pysteep import flow

from ..measure import operations
from .cases import Case, Prepared, per_call, run
from .simulators import K, N, Simulator, check, simulators

pytestmark = per_call


def cases(device: str) -> list[Case]:
    runs = 4096 if device == "cuda" else 64
    return [
        Case(
            "diagonal_flow",
            work,
            simulator.name,
            prepare,
            simulator.dtype,
            q=1.0,
            depth=2,
            missing=simulator.missing,
            what=(simulator, problems, runs),
        )
        for work, problems in ((f"{runs} runs on 64 problems", 64), (f"{runs} runs on one problem", 1))
        for simulator in simulators(device)
    ]


def prepare(case: Case, device: str, at_most: int | None) -> Prepared:
    simulator, problems, runs = case.what
    assert isinstance(simulator, Simulator)
    seeds = [i % problems for i in range(runs)]
    problem = flow.regression(K, N, 5, seed=seeds if problems > 1 else 0)
    train, runs = check(simulator, problem, runs, device)
    steps = min(simulator.steps, at_most or simulator.steps)
    flops = operations.diagonal_flow(K, N) * steps * runs
    return Prepared(lambda: train(1.0, steps), operations=flops, more={"steps": steps * runs})


def bench_diagonal_flow(benchmark: Any, case: Case, device: str, at_most: int | None) -> None:
    run(benchmark, case, device, at_most)
