"""Threads flush subnormal numbers where the caller does, and have their own mode again afterwards."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from pysteep import flow, functional
from tests.support.cases import BACKENDS, same_bits

FLUSHING = [name for name in BACKENDS if name != "reference"]
"""The reference is torch's own operations, whose threads keep a mode of their own."""


@contextmanager
def mode(*, threads, flush):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert torch.set_flush_denormal(flush)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


N = 150_001
DRAWN = [torch.randn(N, dtype=torch.float64).mul(1e-38).float() for _ in range(3)]
"""Around float32's smallest normal number; made here, in the mode that flushes nothing."""


def tiny(which=0):
    return DRAWN[which].clone()


def steps(backend):
    """What every op makes of numbers near 1e-38."""
    w, g, m = map(tiny, range(3))
    for q in (1.5, 1.7, 2.0):
        functional.steepest_step([w], [g], [m], lr=0.5, q=q, betas=(0.9, 0.99), coupled_weight_decay=0.1, backend=backend)
    small = [tiny(), torch.ones(N)]
    product = functional.factor_product(small, backend=backend)
    factors = [tiny(), torch.ones(N)]
    x = tiny()
    functional.factor_step([x], [tiny(1)], [factors], depth=2, lr=0.5, q=2.0, backend=backend)
    implicit = tiny()
    functional.mirror_step(
        [implicit], [tiny(1)], [torch.zeros(1, dtype=torch.float64)], depth=2, lr=0.5, q=2.0, backend=backend
    )
    runs = flow.simulate(
        flow.regression(5, 7, 1),
        q=[1.5, 2.0],
        depth=[[1], [2], [3]],
        scale=1e-38,
        lr=1e-3,
        steps=3,
        dtype="float32",
        backend=backend,
        progress=False,
    )
    flows = [torch.from_numpy(np.array(values)) for values in (runs.first, runs.rest)]
    return [w, m, product, x, *factors, implicit, *flows]


def one_step(backend):
    w, g = tiny(0), tiny(1)
    functional.steepest_step([w], [g], lr=0.5, q=2.0, backend=backend)
    return [w]


def check_threads(work, backend):
    results = {}
    for flush in (True, False, True):
        for threads in (1, 2, 4):
            with mode(threads=threads, flush=flush):
                results.setdefault(flush, []).append(work(backend))
    for same in results.values():
        for other in same[1:]:
            assert all(map(same_bits, same[0], other))
    assert not all(map(same_bits, results[True][0], results[False][0]))


@pytest.mark.parametrize("backend", FLUSHING)
def test_threads_take_the_callers_mode_and_give_it_back(backend):
    check_threads(one_step, backend)
    subnormal = torch.full((N,), 1e-39)
    with mode(threads=4, flush=False):
        subnormal * 1.0  # torch's threads start here, and a thread starts in the mode of who starts it
    with mode(threads=4, flush=True):
        one_step(backend)
    with mode(threads=4, flush=False):
        assert (subnormal * 1.0 != 0).all(), "a thread of torch still flushes"


SLOW_TO_COMPILE = [pytest.param(name, marks=pytest.mark.slow if name == "numba" else ()) for name in FLUSHING]


@pytest.mark.parametrize("backend", SLOW_TO_COMPILE)
def test_threads_of_every_op(backend):
    check_threads(steps, backend)


FLAGS = 0x3F  # of x86: what has happened


def modes_of(pool):
    from pysteep.kernels.numba.float_mode import float_mode

    return {found & ~FLAGS for found in pool.of(4).map(lambda _: float_mode(), range(64))}


@pytest.mark.skipif("numba" not in BACKENDS, reason="no numba")
def test_numba_threads_have_their_own_mode_again():
    from pysteep.kernels.numba.float_mode import float_mode
    from pysteep.kernels.numba.parallel import pool

    pool.forget()  # a thread starts in the mode of who starts it
    with mode(threads=4, flush=False):
        own = modes_of(pool)
    with mode(threads=4, flush=True):
        one_step("numba")
        assert float_mode() & ~FLAGS not in own
        assert modes_of(pool) == own
