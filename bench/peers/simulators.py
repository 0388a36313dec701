"""Who trains diagonal networks: pysteep.flow, and the same in torch and JAX. All are checked against pysteep in float64."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pysteep import flow

from .contenders import pysteep_homes

K, N, LR, SCALE = 80, 100, 1e-4, 0.1
CHECKED = 200  # steps
FEW = 4  # runs that torch takes one at a time
Trainer = Callable[[float, int], np.ndarray]  # q, steps -> x [runs, n]


@dataclass(frozen=True)
class Simulator:
    """`make(problem, runs, device)` gives a function that trains them for so many steps; it is timed for `steps`."""

    name: str
    make: Callable[[flow.Problem, int, str], Trainer]
    dtype: torch.dtype = torch.float32
    missing: str = ""
    steps: int = 5000
    at_most: int | None = None  # runs


def _ours(backend: str, dtype: torch.dtype) -> Callable[[flow.Problem, int, str], Trainer]:
    def make(problem: flow.Problem, runs: int, device: str) -> Trainer:
        lr = np.full(runs, LR)
        options: dict[str, Any] = {"depth": 2, "scale": SCALE, "record": 1, "progress": False}
        options |= {"dtype": str(dtype).removeprefix("torch."), "backend": backend, "device": device}

        def train(q: float, steps: int) -> np.ndarray:
            return flow.simulate(problem, q=q, lr=lr, steps=steps, **options).x

        return train

    return make


def _signed_power(g: torch.Tensor, q: float) -> torch.Tensor:
    return g.sign() if q == 1 else g


def _data(problem: flow.Problem, runs: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    Z, y = (torch.from_numpy(a).float().to(device) for a in (problem.Z, problem.y))
    return Z.expand(runs, K, N), y.expand(runs, K)


def _torch_batched(problem: flow.Problem, runs: int, device: str) -> Trainer:
    """Rows times matrices, with either order of Z in memory: eight times as fast on a CPU as matrices times columns."""
    Z, y = _data(problem, runs, device)
    Z, y = Z.contiguous(), y[:, None, :].contiguous()
    transposed = Z.mT.contiguous()

    def train(q: float, steps: int) -> np.ndarray:
        first, rest = torch.zeros(runs, 1, N, device=device), torch.full((runs, 1, N), SCALE, device=device)
        for _ in range(steps):
            g = torch.bmm((torch.bmm(first * rest, transposed) - y) * (2 / K), Z)
            of_first, of_rest = g * rest, g * first
            first.add_(_signed_power(of_first, q), alpha=-LR)
            rest.add_(_signed_power(of_rest, q), alpha=-LR)
        return (first * rest)[:, 0].cpu().numpy()

    return train


def _torch_one_at_a_time(problem: flow.Problem, runs: int, device: str) -> Trainer:
    data = _data(problem, runs, device)

    def train(q: float, steps: int) -> np.ndarray:
        done = []
        for Z, y in zip(*data, strict=True):
            first, rest = torch.zeros(N, device=device), torch.full((N,), SCALE, device=device)
            for _ in range(steps):
                g = Z.T @ ((Z @ (first * rest) - y) * (2 / K))
                of_first, of_rest = g * rest, g * first
                first.add_(_signed_power(of_first, q), alpha=-LR)
                rest.add_(_signed_power(of_rest, q), alpha=-LR)
            done.append(first * rest)
        return torch.stack(done).cpu().numpy()

    return train


def _jax_scan(problem: flow.Problem, runs: int, device: str) -> Trainer:
    import jax
    import jax.numpy as jnp

    def placed(a: np.ndarray, dims: int) -> Any:
        everyone = np.broadcast_to(a, (runs, *a.shape[-dims:])).astype(np.float32)
        return jax.device_put(jnp.asarray(everyone), jax.devices("gpu" if device == "cuda" else "cpu")[0])

    Z, y = placed(problem.Z, 2), placed(problem.y, 1)

    def run(Z: Any, y: Any, q: float, steps: int) -> Any:
        def step(factors: Any, _: None) -> Any:
            first, rest = factors
            g = Z.T @ ((Z @ (first * rest) - y) * (2 / K))
            u = jnp.sign if q == 1 else lambda c: c
            return (first - LR * u(g * rest), rest - LR * u(g * first)), None

        (first, rest), _ = jax.lax.scan(step, (jnp.zeros(N), jnp.full(N, SCALE)), None, steps)
        return first * rest

    compiled: dict[tuple[float, int], Any] = {}

    def train(q: float, steps: int) -> np.ndarray:
        if (q, steps) not in compiled:
            compiled[q, steps] = jax.jit(jax.vmap(lambda Z, y: run(Z, y, q, steps)))
        return np.asarray(compiled[q, steps](Z, y))

    return train


def simulators(device: str = "cpu") -> list[Simulator]:
    dtypes = ((torch.float32, ""), (torch.float64, ", float64"))
    ours = [
        Simulator(f"pysteep {name}{suffix}", _ours(name, dtype), dtype, missing)
        for name, missing in pysteep_homes(device).items()
        for dtype, suffix in dtypes
    ]
    jax = "" if importlib.util.find_spec("jax") else "jax is not installed"
    if not jax and device == "cuda":
        import jax as jax_module

        jax = "" if jax_module.default_backend() == "gpu" else "jax is installed without GPU support"
    return [
        *ours,
        Simulator("torch eager, bmm", _torch_batched, steps=CHECKED),
        Simulator("torch eager, one run at a time", _torch_one_at_a_time, steps=CHECKED, at_most=FEW),
        Simulator("JAX, jit of vmap of lax.scan", _jax_scan, missing=jax),
    ]


def check(simulator: Simulator, problem: flow.Problem, runs: int, device: str) -> tuple[Trainer, int]:
    """The simulator's trainer, once its first steps were found right, and how many of the runs it trains."""
    runs = min(runs, simulator.at_most or runs)
    if simulator.at_most and problem.Z.ndim == 3:
        problem = flow.Problem(problem.Z[:runs], problem.y[:runs])
    train = simulator.make(problem, runs, device)
    backend = "cpp" if not pysteep_homes("cpu")["cpp"] else "reference"
    expected = _ours(backend, torch.float64)(problem, runs, "cpu")(2.0, CHECKED)
    x = train(2.0, CHECKED)
    assert x.shape == expected.shape, simulator.name
    assert np.allclose(x, expected, rtol=1e-3, atol=1e-9), f"{simulator.name} is wrong"
    return train, runs
