"""Optimisers of their own in many Python threads at once: the bits of each are those that it has alone."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from pysteep import SteepestDescent
from tests.support.cases import BACKENDS, same_bits

THREADS, STEPS = 8, 50
DECAY = {"lr": 0.01, "weight_decay": 0.1}
MOMENTUM = {**DECAY, "betas": (0.9, 0.99), "coupled_weight_decay": 0.01}
OPTIONS = {
    "plain": {**DECAY, "q": 1.25},
    "normalised": {**MOMENTUM, "q": 1.5, "normalize": True},
    "full": {**MOMENTUM, "depth": 3, "storage": "full", "init": "lambda", "scale": 0.7},
    "tied": {**MOMENTUM, "depth": 4},
    "implicit": {**DECAY, "q": 1.5, "depth": 3, "storage": "implicit", "init": "lambda", "scale": 0.5},
}
# From 32768 elements on a call has threads of its own, which wait for a core each: now and then is enough.
SHAPES = {"cpp": ((181, 193), (7, 13), (1,), (0,)), "numba": ((181, 193), (7, 13)), "reference": ((17, 5), (3,))}


# numba compiles for seconds what each of the others needs.
JOBS = [(backend, name) for backend in BACKENDS for name in OPTIONS if backend != "numba" or name == "tied"]
SLOW_JOBS = [(backend, name) for backend in BACKENDS for name in OPTIONS if (backend, name) not in JOBS]


def trained(backend, name, seed):
    """Parameters and states after STEPS steps on gradients drawn from `seed`."""
    draw = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES[backend]]
    optimizer = SteepestDescent(params, **OPTIONS[name], backend=backend)
    for step in range(STEPS):
        for p in params:
            small = p.numel() < 32768
            p.grad = torch.randn(p.shape, generator=draw) if small or step % 25 == 0 else None
        optimizer.step()
    return [p.detach() for p in params] + [t for state in optimizer.state.values() for t in state.values()]


def in_threads(functions):
    """Run all of them at once; their results in order."""
    results, errors, together = [None] * len(functions), [], threading.Barrier(len(functions))

    def run(index):
        try:
            together.wait()
            results[index] = functions[index]()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return results


def differentiated():
    """Backward passes, whose threads and the steps' take turns on the same cores."""
    draw = torch.Generator().manual_seed(99)
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) / 8)
    optimizer = SteepestDescent(net.parameters(), lr=1e-3, q=2.0, depth=2)
    x = torch.randn(32, 64, generator=draw)
    losses = []
    for _ in range(STEPS):
        loss = (net(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("backend", "name"), [*JOBS, *(pytest.param(*job, marks=pytest.mark.slow) for job in SLOW_JOBS)])
def test_steps_in_many_threads(backend, name):
    expected = [trained(backend, name, seed) for seed in range(THREADS)]
    found = in_threads([lambda seed=seed: trained(backend, name, seed) for seed in range(THREADS)])
    for alone, together in zip(expected, found, strict=True):
        assert len(alone) == len(together)
        assert all(map(same_bits, alone, together))


def test_backends_and_storages_beside_backward():
    jobs = [(*job, seed) for seed, job in enumerate(JOBS)]
    expected = [trained(*job) for job in jobs]
    losses = differentiated()
    found = in_threads([*(lambda job=job: trained(*job) for job in jobs), differentiated, differentiated])
    for alone, together in zip(expected, found[: len(jobs)], strict=True):
        assert all(map(same_bits, alone, together))
    for others in found[len(jobs) :]:
        assert others == pytest.approx(losses, rel=1e-3), "sums in another order, for other numbers of threads"
        assert others[-1] < others[0]
