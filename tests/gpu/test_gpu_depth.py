"""The ops of depth on a GPU, by both homes. `make gpu-check` runs these; elsewhere they are skipped by name."""

from __future__ import annotations

import pytest
import torch

from pysteep import functional
from pysteep.vote import count_votes, pack_signs
from tests.support.cases import DTYPES, EXACT_QS, LAYOUTS, laid_out, options, random_values, same_bits, surroundings
from tests.support.gpu_cases import HOMES, SIZES, check_bits
from tests.support.mirror_cases import BALANCES, balance, exact_step
from tests.support.product_cases import derivatives, leaves
from tests.support.rounding_cases import MOMENTUM, Operands
from tests.support.tolerances import EPS, MIRROR_ROUNDINGS

pytestmark = pytest.mark.gpu
KINDS = ((1, 1), (2, 2), (3, 3), (10, 10), (17, 17), (2, 3), (2, 10))
"""Factors that are stored, and depth."""


def step_of(op, home, *, depth=3, q=1.5, lr=0.05):
    """A function of x, g and two factors that takes a step of that op; what it writes comes first among them."""

    def run(x, g, first, rest):
        if op == "steepest_step":
            functional.steepest_step([x], [g], **options(q=q, lr=lr), backend=home)
        elif op == "factor_step":
            functional.factor_step([x], [g], [[first, rest]], depth=depth, **options(q=q, lr=lr), backend=home)
        elif op == "mirror_step":
            lam = balance(0.1).to(x.device)
            functional.mirror_step([x], [g], [lam], depth=depth, q=q, lr=lr, weight_decay=0.3, backend=home)
        else:
            x.copy_(functional.factor_product([g, first, rest], backend=home))

    return run


OPS = ("steepest_step", "factor_step", "mirror_step", "factor_product")


@pytest.mark.parametrize("betas", [(0.0, 0.0), MOMENTUM], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("home", HOMES)
def test_factor_step_has_the_bits_of_the_reference(home, dtype, kind, betas):
    """With zeros, infinities and NaN among the numbers, decay of both kinds, and sizes that end anywhere."""
    stored, depth = kind
    q = EXACT_QS[(stored + depth) % 3]
    operands = Operands("factor_step", dtype, SIZES, stored=stored, betas=betas, rounding="nearest")
    check_bits(home, operands, depth=depth, q=q, betas=betas)


@pytest.mark.parametrize("q", EXACT_QS)
@pytest.mark.parametrize("kind", [(3, 3), (2, 10)], ids=str)
@pytest.mark.parametrize("home", HOMES)
def test_factor_step_at_every_exact_q(home, kind, q):
    stored, depth = kind
    check_bits(home, Operands("factor_step", torch.float32, SIZES, stored=stored, rounding="nearest"), depth=depth, q=q)


@pytest.mark.parametrize("kind", [(3, 3), (2, 10)], ids=str)
@pytest.mark.parametrize("home", HOMES)
def test_factors_of_thousands_of_weights(home, kind):
    stored, depth = kind
    sizes = [i % 41 for i in range(2500)]
    check_bits(home, Operands("factor_step", torch.float32, sizes, stored=stored, rounding="nearest"), depth=depth, q=1.0)


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 10, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("home", HOMES)
def test_factor_product_and_both_derivatives(home, dtype, depth):
    for n in (0, 1, 7, 513, 70_001):
        operands = leaves(depth, (n,), dtype, wide=True, special=True)
        expected = derivatives(*operands, "reference")
        factors, gradient, tangents = operands
        there = [[t.detach().cuda().requires_grad_(t.requires_grad) for t in role] for role in (factors, [gradient], tangents)]
        found = derivatives(there[0], there[1][0], there[2], home)
        assert all(same_bits(mine.detach().cpu(), right.detach()) for mine, right in zip(found, expected, strict=True))


@pytest.mark.parametrize("depth", [2, 3, 10])
@pytest.mark.parametrize("q", [1.0, 1.5, 1.7, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("home", HOMES)
def test_mirror_step_against_float64(home, dtype, q, depth):
    """As on a CPU: the change of x is right to a few units in the last place of what it is a sum of."""
    step = {"depth": depth, "lr": 0.01, "q": q, "weight_decay": 0.3}
    weights = [random_values((n,), dtype) for n in (1, 7, 513, 4099, 70_001)]
    gradients = [random_values(x.shape, dtype, wide=True) for x in weights]
    for x, g in zip(weights, gradients, strict=True):
        x[::7], g[::11] = 0.0, 0.0
    updated, balances = [x.cuda() for x in weights], [balance(lam).cuda() for lam in BALANCES]
    functional.mirror_step(updated, [g.cuda() for g in gradients], balances, **step, backend=home)
    eps, underflow = EPS[dtype], 1e-33 if dtype == torch.float32 else 1e-290
    for x, g, new, lam in zip(weights, gradients, updated, BALANCES, strict=True):
        expected, size, error = exact_step(x, g, lam, **step)
        bound = eps * torch.maximum(expected.abs(), x.double().abs()) + MIRROR_ROUNDINGS * depth * eps * size + error
        assert bool(((new.cpu().double() - expected).abs() <= 1.01 * bound + underflow).all())


@pytest.mark.parametrize("home", HOMES)
def test_balances_of_thousands_of_weights(home):
    sizes = [i % 41 for i in range(2500)]
    weights, gradients = ([random_values((n,), torch.float32).cuda() for n in sizes] for _ in range(2))
    alone = [x.clone() for x in weights]
    step = {"depth": 3, "lr": 0.01, "q": 1.5, "weight_decay": 0.3, "backend": home}
    balances = [balance(0.01 * (i % 7)).cuda() for i in range(2500)]
    functional.mirror_step(weights, gradients, balances, **step)
    for i in range(0, 2500, 100):
        functional.mirror_step([alone[i]], [gradients[i]], [balance(0.01 * (i % 7)).cuda()], **step)
        assert same_bits(alone[i], weights[i])


@pytest.mark.sanitized
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("home", HOMES)
def test_views_keep_what_is_around_them(home, op):
    """Each operand in another layout, unaligned ones among them: the result of contiguous ones, and no other byte written."""
    run = step_of(op, home)
    for first in range(len(LAYOUTS)):
        values = [random_values((3, 5, 4, 7), torch.float32).cuda() for _ in range(4)]
        views = [laid_out(v, LAYOUTS[(first + i) % len(LAYOUTS)]) for i, v in enumerate(values)]
        around = list(map(surroundings, views))
        run(*views)
        run(*values)
        assert all(map(same_bits, views, values))
        assert all(map(torch.equal, around, map(surroundings, views)))


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("home", HOMES)
def test_sizes_around_a_chunk(home, op, dtype):
    """One element more or less than blocks and chunks have, at an aligned address and beside one: the bits of its slices."""
    run = step_of(op, home)
    for n in (1, 1023, 1025, 8191, 8193, 20_001):
        for start in (0, 1):
            values = [random_values((n + 1,), dtype).cuda()[start : start + n] for _ in range(4)]
            halves = [[v[part].clone() for v in values] for part in (slice(0, n // 2), slice(n // 2, n))]
            run(*values)
            for half in halves:
                run(*half)
            assert same_bits(values[0], torch.cat([half[0] for half in halves]))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("home", HOMES)
def test_runs_on_the_callers_stream(home, op):
    """The step sees what the same stream wrote just before, and is seen by what it reads just after."""
    run = step_of(op, home)
    n = 1 << 22
    values = [random_values((n,), torch.float32).cuda() for _ in range(4)]
    expected = [v.clone() for v in values]
    run(*expected)
    there = [torch.zeros_like(v) for v in values]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for target, v in zip(there, values, strict=True):
            target.copy_(v)
        run(*there)
        result = there[0].clone()
    stream.synchronize()
    assert same_bits(result, expected[0])


def needs_memory(gigabytes):
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory")


@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("op", [op for op in OPS if op != "steepest_step"])
@pytest.mark.parametrize("home", HOMES)
def test_more_than_two_to_the_31_elements(home, op):
    """The numbers repeat, and so must the result, which is that of one period alone."""
    needs_memory(30)
    period, times, rest = 1_048_577, 2048, 777  # more than 2^31 by far, and an odd size
    run = step_of(op, home)
    small = [random_values((period,), torch.bfloat16).cuda() for _ in range(4)]
    large = [torch.cat([v.repeat(times), v[:rest]]) for v in small]
    assert large[0].numel() > 2**31
    run(*small)
    run(*large)
    assert same_bits(large[0][-rest:], small[0][:rest])
    for part in large[0][:-rest].view(times, period).split(256):
        assert bool(((part == small[0]) | (part.isnan() & small[0].isnan())).all())


@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("home", HOMES)
def test_votes_on_more_than_two_to_the_31_elements(home):
    needs_memory(16)
    n = 2**31 + 8 * 24
    gradient = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    gradient[::3] = -2.0
    words = pack_signs(gradient, backend=home)
    triples = words[: n // 24 * 3].view(-1, 3)
    assert bool((triples == triples[0]).all())
    assert [bin(byte).count("1") for byte in triples[0].tolist()] == [5, 5, 6]
    votes = count_votes(words[None], n, dtype=torch.bfloat16, backend=home)
    assert torch.equal(votes, gradient.sign_())
