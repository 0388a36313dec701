"""Runs of diagonal networks on a GPU and on two cores of a CPU, by the step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import pysteep
from pysteep import flow

from .gpu_memory import Block, WrongResultError

K, N, LR, SCALE = 80, 100, 1e-4, 0.1
CHECKED_LR = 1e-2  # of the runs that are checked: both factors of every coordinate move
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
    options: dict[str, Any] = {"depth": 2, "scale": SCALE, "record": 1, "progress": False}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        check_runs(problem, lr.shape, device, backend, options)
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            whole(flow.simulate(problem, q=1.0, lr=lr, steps=steps, dtype="float32", device=device, backend=backend, **options))
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return sorted(times)[ROUNDS // 2] / steps / (problems * RUNS_OF_A_PROBLEM)


def whole(result: flow.Result) -> flow.Result:
    """The result of runs that nobody interrupted: `simulate` returns what it has, which is no wrong number."""
    if result.interrupted:
        raise KeyboardInterrupt
    return result


def check_runs(problem: flow.Problem, runs: tuple[int, ...], device: str, backend: str, options: dict[str, Any]) -> None:
    """Raise unless both factors of every coordinate of every run are those of C++ in float64, and nothing else was written.

    At q = 1 a step from the start alone: later ones follow signs of sums near zero, which roundings decide, as they do there
    where a gradient is close to zero.
    """
    first_gradient = np.abs((problem.y[..., None] * problem.Z).sum(-2))
    certain = first_gradient > 1e-4 * first_gradient.max()
    name = f"diagonal_flow by {backend}"
    for q, steps in ((2.0, CHECKED), (1.0, 1)):
        same: dict[str, Any] = {"q": q, "lr": np.full(runs, CHECKED_LR), "steps": steps, **options}
        with guarded(backend, name):
            mine = whole(flow.simulate(problem, dtype="float32", device=device, backend=backend, **same))
        right = whole(flow.simulate(problem, dtype="float64", backend="cpp", **same))
        for part, start in (("first", 0.0), ("rest", SCALE)):
            own, expected = getattr(mine, part), getattr(right, part)
            error = np.abs(own - expected)
            if q == 1:
                error = np.where(certain, error, 0.0)
            change = np.abs(expected - start)
            allowed = 1e-4 * change + 2e-6 * change.max() + np.finfo(np.float32).eps * np.abs(expected)
            if not (error <= allowed).all():
                raise WrongResultError(f"{name} is wrong by {error.max():.1e} at q = {q:g}")


@contextmanager
def guarded(backend: str, name: str) -> Iterator[None]:
    """Runs are in blocks with guards around them, and their data are seen to stay as they are."""
    home = pysteep.backends()[backend].home("diagonal_flow")
    run = home.diagonal_flow

    def in_blocks(first: Tensor, rest: Tensor, moments: Tensor | None, Z: Tensor, y: Tensor, **options: Any) -> None:
        given = (first, rest, Z, y)
        blocks = [Block([tensor.shape], tensor.dtype, tensor.device) for tensor in given]
        operands = [block.tensors[0].copy_(tensor) for block, tensor in zip(blocks, given, strict=True)]
        run(operands[0], operands[1], moments, *operands[2:], **options)
        for block in blocks:
            block.check_guards(name)
        if not all(torch.equal(operand, tensor) for operand, tensor in zip(operands[2:], given[2:], strict=True)):
            raise WrongResultError(f"{name} wrote to an operand that it may only read")
        first.copy_(operands[0])
        rest.copy_(operands[1])

    with mock.patch.object(home, "diagonal_flow", in_blocks):
        yield
