"""Runs of diagonal networks on a GPU and on two cores of a CPU, by the step."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from pysteep import flow

from .gpu_works import WrongResultError

K, N, LR, SCALE = 80, 100, 1e-4, 0.1
STEPS = {"cuda": 50_000, "cpu": 10_000}
RUNS_OF_A_PROBLEM = 64
ROUNDS = 3
CHECKED = 200  # steps


def flow_seconds(device: str, backend: str, runs: int, scale: float, seed: int) -> float:
    """Seconds for a step of one of `runs` runs, 64 on each problem, depth 2, q = 1, float32; a CPU has two threads for them."""
    problems = max(1, round(runs // RUNS_OF_A_PROBLEM * min(1.0, 1e3 * scale)))
    steps = max(CHECKED, round(STEPS[device] * scale))
    problem = flow.regression(K, N, 5, seed=np.arange(problems)[:, None] + seed)
    lr = np.full((problems, RUNS_OF_A_PROBLEM), LR)
    options: dict[str, Any] = {"lr": lr, "depth": 2, "scale": SCALE, "record": 1, "progress": False}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        mine = flow.simulate(problem, q=2.0, steps=CHECKED, dtype="float32", device=device, backend=backend, **options).x
        right = flow.simulate(problem, q=2.0, steps=CHECKED, dtype="float64", backend="cpp", **options).x
        if not np.allclose(mine, right, rtol=1e-3, atol=1e-9):
            raise WrongResultError(f"diagonal_flow by {backend} is wrong by {abs(mine - right).max():.1e}")
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            flow.simulate(problem, q=1.0, steps=steps, dtype="float32", device=device, backend=backend, **options)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return sorted(times)[ROUNDS // 2] / steps / (problems * RUNS_OF_A_PROBLEM)
