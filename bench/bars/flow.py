"""What the simulator must reach on a CPU, beside torch and JAX on the same runs: `python -m bench bars flow`."""

from __future__ import annotations

import time

import numpy as np
import torch

from pysteep import flow

from ..measure.reporting import Bar, Suite
from ..measure.timing import medians
from ..peers.simulators import K, N, check, simulators

ROUNDS = 9
RUNS = 64
JAX = "JAX, jit of vmap of lax.scan"


def times_of(title: str, problem: flow.Problem, rounds: int) -> tuple[dict[str, float], str]:
    """Median seconds by simulator for one step of one run on one core, and a table of them. All are checked first."""
    present = [simulator for simulator in simulators() if not simulator.missing and "numba" not in simulator.name]
    trainers = {simulator.name: (*check(simulator, problem, RUNS, "cpu"), simulator.steps) for simulator in present}
    seconds = medians(
        {name: lambda train=train, steps=steps: train(1.0, steps) for name, (train, _, steps) in trainers.items()}, rounds
    )
    cores = torch.get_num_threads()
    times = {name: t * cores / trainers[name][2] / trainers[name][1] for name, t in seconds.items()}
    lines = [f"| {title} | µs a step and run, per core | against pysteep |", "|---|---|---|"]
    lines += [f"| {name} | {t * 1e6:.2f} | {t / times['pysteep cpp']:.1f} |" for name, t in times.items()]
    lines += [f"| {simulator.name} | absent: {simulator.missing} | |" for simulator in simulators() if simulator.missing]
    return times, "\n".join(lines)


def table_4() -> float:
    """Seconds for the 21 rows of Table 4, a million steps each, in float64."""
    decays = np.array([0.0, 1e-4, 1e-3, 1e-2, 0.0, 0.0, 0.0]), np.array([0.0, 0.0, 0.0, 0.0, 1e-4, 1e-3, 1e-2])
    begun = time.perf_counter()
    flow.simulate(
        flow.regression(K, N, 5),
        q=1.0,
        depth=np.array([[1], [2], [10]]),
        lr=1e-4,
        steps=1_000_000,
        weight_decay=decays[0],
        coupled_weight_decay=decays[1],
        progress=False,
    )
    return time.perf_counter() - begun


def measure(rounds: int) -> Suite:
    rows: list[Bar] = []
    tables = []
    for title, problem in (
        ("64 problems", flow.regression(K, N, 5, seed=range(RUNS))),
        ("64 runs on one problem", flow.regression(K, N, 5)),
    ):
        times, table = times_of(f"{title}, k = {K}, n = {N}, L = 2, q = 1, float32", problem, rounds)
        tables.append(table)
        own = times["pysteep cpp"]
        rows.append(Bar(f"{title}: µs a step and run, per core", own * 1e6, "<=", 1.0))
        rows.append(
            Bar(f"{title}: torch eager, one run at a time / time", times["torch eager, one run at a time"] / own, ">=", 50)
        )
        rows.append(Bar(f"{title}: torch eager, bmm / time", times["torch eager, bmm"] / own, ">=", 3))
        if JAX in times:
            rows.append(Bar(f"{title}: JAX / time", times[JAX] / own, ">=", 3))
    rows.append(Bar("Table 4, 21 rows of 1e6 steps: seconds", table_4(), "<=", 60))

    return Suite(rows, tables, f"{RUNS} runs, medians of {rounds} rounds taken in turn")
