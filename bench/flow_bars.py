"""What pysteep.flow must reach on a CPU, beside torch and JAX on the same runs: `python -m bench.flow_bars`.

Prints a Markdown table for each work, and the bars with what was reached; exits 1 if one is missed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pysteep import flow

from .reporting import Bar, report
from .timing import medians

K, N, RUNS, LR, SCALE = 80, 100, 64, 1e-4, 0.1
STEPS = 5000  # of a timing; eager torch takes CHECKED
CHECKED = 200
FEW = 4  # runs that torch takes one at a time
Trainer = Callable[[float, int], np.ndarray]  # q, steps -> x [runs, n]


def ours(problem: flow.Problem, dtype: str) -> Trainer:
    lr = np.full(RUNS, LR)

    def train(q: float, steps: int) -> np.ndarray:
        options: dict[str, Any] = {"q": q, "depth": 2, "scale": SCALE, "record": 1, "dtype": dtype, "progress": False}
        return flow.simulate(problem, lr=lr, steps=steps, **options).x

    return train


def signed_power(g: torch.Tensor, q: float) -> torch.Tensor:
    return g.sign() if q == 1 else g


def torch_batched(problem: flow.Problem) -> Trainer:
    """Rows times matrices, with either order of Z in memory: eight times as fast here as matrices times columns."""
    Z, y = torch.from_numpy(problem.Z).float(), torch.from_numpy(problem.y).float()[..., None, :]
    Z, y = Z.expand(RUNS, K, N).contiguous(), y.expand(RUNS, 1, K).contiguous()
    transposed = Z.mT.contiguous()

    def train(q: float, steps: int) -> np.ndarray:
        first, rest = torch.zeros(RUNS, 1, N), torch.full((RUNS, 1, N), SCALE)
        for _ in range(steps):
            g = torch.bmm((torch.bmm(first * rest, transposed) - y) * (2 / K), Z)
            of_first, of_rest = g * rest, g * first
            first.add_(signed_power(of_first, q), alpha=-LR)
            rest.add_(signed_power(of_rest, q), alpha=-LR)
        return (first * rest)[:, 0].numpy()

    return train


def torch_one_at_a_time(problem: flow.Problem) -> Trainer:
    """Of FEW runs."""
    data = torch.from_numpy(problem.Z).float().expand(RUNS, K, N), torch.from_numpy(problem.y).float().expand(RUNS, K)

    def train(q: float, steps: int) -> np.ndarray:
        done = []
        for Z, y in zip(*(each[:FEW] for each in data), strict=True):
            first, rest = torch.zeros(N), torch.full((N,), SCALE)
            for _ in range(steps):
                g = Z.T @ ((Z @ (first * rest) - y) * (2 / K))
                of_first, of_rest = g * rest, g * first
                first.add_(signed_power(of_first, q), alpha=-LR)
                rest.add_(signed_power(of_rest, q), alpha=-LR)
            done.append(first * rest)
        return torch.stack(done).numpy()

    return train


def jax_scan(problem: flow.Problem) -> Trainer:
    import jax
    import jax.numpy as jnp

    Z, y = (jnp.asarray(np.broadcast_to(a, (RUNS, *a.shape[-d:])), jnp.float32) for a, d in ((problem.Z, 2), (problem.y, 1)))

    def run(Z: Any, y: Any, q: float, steps: int) -> Any:
        def step(factors: Any, _: None) -> Any:
            first, rest = factors
            g = Z.T @ ((Z @ (first * rest) - y) * (2 / K))
            u = jnp.sign if q == 1 else lambda c: c
            return (first - LR * u(g * rest), rest - LR * u(g * first)), None

        (first, rest), _ = jax.lax.scan(step, (jnp.zeros(N), jnp.full(N, SCALE)), None, steps)
        return first * rest

    def compiled(q: float, steps: int) -> Any:
        return jax.jit(jax.vmap(lambda Z, y: run(Z, y, q, steps)))

    all_compiled = {asked: compiled(*asked) for asked in ((2.0, CHECKED), (1.0, STEPS))}
    return lambda q, steps: np.asarray(all_compiled[q, steps](Z, y))


def measure(title: str, problem: flow.Problem, rounds: int) -> tuple[dict[str, float], str]:
    """Median seconds by contender for one step of one run on one core, and a table of them. All are checked first."""
    trainers: dict[str, Trainer] = {
        "pysteep cpp": ours(problem, "float32"),
        "pysteep cpp, float64": ours(problem, "float64"),
        "torch eager, bmm": torch_batched(problem),
        "torch eager, one run at a time": torch_one_at_a_time(problem),
    }
    if importlib.util.find_spec("jax"):
        trainers["JAX, jit of vmap of lax.scan"] = jax_scan(problem)
    expected = trainers["pysteep cpp, float64"](2.0, CHECKED)
    for name, train in trainers.items():
        x = train(2.0, CHECKED)
        assert np.allclose(x, expected[: len(x)], rtol=1e-3, atol=1e-9), name
    steps = {name: CHECKED if "eager" in name else STEPS for name in trainers}
    seconds = medians({name: lambda name=name: trainers[name](1.0, steps[name]) for name in trainers}, rounds)
    cores = torch.get_num_threads()
    times = {name: t * cores / steps[name] / (FEW if "one run" in name else RUNS) for name, t in seconds.items()}
    lines = [f"| {title} | µs a step and run, per core | against pysteep |", "|---|---|---|"]
    lines += [f"| {name} | {t * 1e6:.2f} | {t / times['pysteep cpp']:.1f} |" for name, t in times.items()]
    if "JAX, jit of vmap of lax.scan" not in times:
        lines.append("| JAX | absent: not installed | |")
    print("\n".join(lines), "", sep="\n", flush=True)
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.flow_bars", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="timings of each contender (default 9)")
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()

    rows: list[Bar] = []
    tables = []
    for title, problem in (
        ("64 problems", flow.regression(K, N, 5, seed=range(RUNS))),
        ("64 runs on one problem", flow.regression(K, N, 5)),
    ):
        times, table = measure(f"{title}, k = {K}, n = {N}, L = 2, q = 1, float32", problem, arguments.rounds)
        tables.append(table)
        own = times["pysteep cpp"]
        rows.append(Bar(f"{title}: µs a step and run, per core", own * 1e6, "<=", 1.0))
        rows.append(
            Bar(f"{title}: torch eager, one run at a time / time", times["torch eager, one run at a time"] / own, ">=", 50)
        )
        rows.append(Bar(f"{title}: torch eager, bmm / time", times["torch eager, bmm"] / own, ">=", 3))
        if "JAX, jit of vmap of lax.scan" in times:
            rows.append(Bar(f"{title}: JAX / time", times["JAX, jit of vmap of lax.scan"] / own, ">=", 3))
    rows.append(Bar("Table 4, 21 rows of 1e6 steps: seconds", table_4(), "<=", 60))

    return report(rows, tables, f"{RUNS} runs, medians of {arguments.rounds} rounds taken in turn", arguments.output)


if __name__ == "__main__":
    sys.exit(main())
