"""Rounding on a GPU: the bits of the reference on a CPU. `make gpu-check` runs these; elsewhere they are skipped by name."""

from __future__ import annotations

import itertools

import pytest
import torch

from pysteep import functional
from pysteep.kernels.rounding import Rounding
from tests.support.cases import EXACT_QS, options, random_values, same_bits
from tests.support.gpu_cases import HOMES, SIZES, check_bits, on_gpu
from tests.support.rounding_cases import MODES, MOMENTUM, SIXTEEN, Operands, step_of_shards
from tests.support.tolerances import EPS

pytestmark = pytest.mark.gpu

modes = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["rounding"])


@pytest.mark.parametrize("betas", [(0.0, 0.0), MOMENTUM], ids=str)
@pytest.mark.parametrize("q", EXACT_QS)
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@modes
@pytest.mark.parametrize("home", HOMES)
def test_steepest_step(home, mode, dtype, q, betas):
    operands = Operands("steepest_step", dtype, SIZES, betas=betas, rounding=mode["rounding"])
    check_bits(home, operands, q=q, betas=betas, **mode)


def factor_cases():
    """Triton takes long to compile for 64 factors: it does so once."""
    kinds = [(1, 1), (3, 3), (10, 10), (17, 17), (64, 64), (2, 2), (2, 10)]
    for home, mode, dtype, kind, betas in itertools.product(HOMES, MODES, SIXTEEN, kinds, [(0.0, 0.0), MOMENTUM]):
        of_case = (mode["rounding"], dtype, betas)
        if home == "cuda" or kind != (64, 64) or of_case == ("stochastic", torch.bfloat16, MOMENTUM):
            names = map(str, (home, *of_case[:2], kind, betas))
            yield pytest.param(home, mode, dtype, *kind, betas, id="-".join(names))


@pytest.mark.parametrize(("home", "mode", "dtype", "stored", "depth", "betas"), list(factor_cases()))
def test_factor_step(home, mode, dtype, stored, depth, betas):
    operands = Operands("factor_step", dtype, SIZES, stored=stored, betas=betas, rounding=mode["rounding"])
    check_bits(home, operands, depth=depth, q=1.5, betas=betas, **mode)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@modes
@pytest.mark.parametrize("home", HOMES)
def test_mirror_step(home, mode, dtype):
    """The float32 that is rounded differs by a few units in the last place, so that few of its 16-bit roundings differ."""
    operands = Operands("mirror_step", dtype, SIZES, rounding=mode["rounding"])
    result = on_gpu(operands).step(home, depth=3, **mode)
    before = operands.clone().weights
    operands.step("reference", depth=3, **mode)
    for mine, right, old in zip(result.weights, operands.weights, before, strict=True):
        w = mine.cpu()
        differ = (w != right) & ~(w.isnan() & right.isnan())
        assert float(differ.double().sum()) <= 1 + 0.01 * len(w)
        size = torch.maximum(old.double().abs(), right.double().abs())
        assert ((w.double() - right.double()).abs() <= 2 * EPS[dtype] * size)[differ].all()


@pytest.mark.parametrize("home", HOMES)
def test_shards_draw_the_numbers_of_the_whole(home):
    start, cuts = 2**38 + 5, (0, 8195, 16390, 250003)
    w, g = (random_values((cuts[-1],), torch.bfloat16) for _ in range(2))
    shards, gradients = ([t[a:b].cuda() for a, b in itertools.pairwise(cuts)] for t in (w, g))
    draws = {"mode": "stochastic", "seed": 2**40 + 3, "step": 17.0}
    step_of_shards("reference", [w], [g], Rounding(**draws, streams=[2**32 - 1], firsts=[start]))
    firsts = [start + cut for cut in cuts[:-1]]
    step_of_shards(home, shards, gradients, Rounding(**draws, streams=[2**32 - 1] * 3, firsts=firsts))
    assert same_bits(torch.cat(shards).cpu(), w)


@pytest.mark.parametrize("home", HOMES)
def test_a_replayed_step_draws_the_numbers_of_the_step_on_the_device(home):
    w, g = (random_values((9001,), torch.bfloat16) for _ in range(2))
    mine, gradient, count = w.cuda(), g.cuda(), torch.tensor(0.0, device="cuda")

    def step(weight, gradient, number, backend):
        how = {"rounding": "stochastic", "seed": 3, "step": number, "backend": backend}
        functional.steepest_step([weight], [gradient], **options(), **how)

    step(mine.clone(), gradient, count, home)  # compiles, which a capture cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(mine, gradient, count, home)
    mine.copy_(w)
    for k in (5, 2**24 - 1):
        count.fill_(k)
        graph.replay()
        step(w, g, float(k), "reference")
    assert same_bits(mine.cpu(), w)


@modes
@pytest.mark.parametrize("home", HOMES)
def test_thousands_of_tensors(home, mode):
    operands = Operands("steepest_step", torch.bfloat16, [i % 41 for i in range(2500)], rounding=mode["rounding"])
    check_bits(home, operands, **mode)
