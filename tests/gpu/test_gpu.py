"""What only a GPU can show. `make gpu-check` runs these; elsewhere they are skipped by name."""

from __future__ import annotations

import pytest
import torch

import pysteep
from bench.gpu.gpu_flow import whole
from pysteep import SteepestDescent, flow, functional
from pysteep._ops.sign_vote import packed_rows
from pysteep.vote import count_votes
from tests.support.cases import (
    DTYPES,
    EXACT_QS,
    GENERAL_QS,
    LAYOUTS,
    laid_out,
    options,
    random_values,
    same_bits,
    surroundings,
)
from tests.support.step_cases import BETAS, SIZES, check_bounds, cloned, operands
from tests.support.tolerances import SUM_RTOL

pytestmark = pytest.mark.gpu
HOMES = ("cuda", "triton")


def to_gpu(*roles, device="cuda"):
    return [None if role is None else [tensor.to(device) for tensor in role] for role in roles]


def step_on_gpu(home, weights, gradients, momenta, step, **more):
    """One step on copies on the GPU: weights and momenta, back on the CPU."""
    w, g, m = to_gpu(weights, gradients, momenta)
    functional.steepest_step(w, g, m, **step, **more, backend=home)
    return [t.cpu() for t in w], [t.cpu() for t in m or []]


@pytest.mark.parametrize("home", HOMES)
def test_every_gpu_backend_is_available(home):
    backend = pysteep.backends()[home]
    assert backend.available, backend.reason


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("q", EXACT_QS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("home", HOMES)
def test_same_bits_as_the_reference_on_a_cpu(home, dtype, q, betas):
    weights, gradients, momenta = operands(dtype=dtype, betas=betas, special=True)
    w, m = step_on_gpu(home, weights, gradients, momenta, options(q=q, betas=betas))
    expected, expected_m = cloned(weights, momenta)
    functional.steepest_step(expected, gradients, expected_m, **options(q=q, betas=betas), backend="reference")
    assert all(map(same_bits, w, expected))
    assert all(map(same_bits, m, expected_m or []))


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("q", GENERAL_QS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("home", HOMES)
def test_general_q_against_float64(home, dtype, q, betas):
    weights, gradients, momenta = operands(dtype=dtype, betas=betas)
    step = options(q=q, betas=betas)
    w, m = step_on_gpu(home, weights, gradients, momenta, step)
    check_bounds(weights, gradients, momenta, w, m, step)


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_and_triton_agree_to_the_bit_at_general_q(dtype, betas):
    tensors = operands(dtype=dtype, betas=betas, special=True)
    results = [step_on_gpu(home, *tensors, options(q=1.7, betas=betas)) for home in HOMES]
    assert all(map(same_bits, results[0][0], results[1][0]))
    assert all(map(same_bits, results[0][1], results[1][1]))


@pytest.mark.parametrize("gradient_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("home", HOMES)
def test_layouts(home, layout, gradient_layout):
    values = [random_values((3, 5, 4, 7), torch.float32).cuda() for _ in range(2)]
    w, g = (laid_out(v, at) for v, at in zip(values, (layout, gradient_layout), strict=True))
    around, expected = surroundings(w), values[0].clone()
    functional.steepest_step([w], [g], **options(q=1.5), backend=home)
    functional.steepest_step([expected], [values[1]], **options(q=1.5), backend=home)
    assert same_bits(w, expected)
    assert torch.equal(around, surroundings(w))


@pytest.mark.parametrize("gradient_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("home", HOMES)
def test_mixtures_of_dtypes(home, dtype, gradient_dtype):
    weights, gradients = operands((5, 0, 9000), dtype)[0], operands((5, 0, 9000), gradient_dtype)[1]
    for momentum_dtype in DTYPES:
        momenta = operands((5, 0, 9000), momentum_dtype)[0]
        step = options(q=1.5, betas=(0.9, 0.99))
        w, m = step_on_gpu(home, weights, gradients, momenta, step)
        expected, expected_m = cloned(weights, momenta)
        functional.steepest_step(expected, gradients, expected_m, **step, backend="reference")
        assert all(map(same_bits, w, expected))
        assert all(map(same_bits, m, expected_m))


@pytest.mark.parametrize("home", HOMES)
def test_thousands_of_tensors(home):
    weights = [random_values((i % 41,), torch.float32) for i in range(2500)]
    gradients = [random_values((i % 41,), torch.float32) for i in range(2500)]
    w, _ = step_on_gpu(home, weights, gradients, None, options())
    functional.steepest_step(weights, gradients, **options(), backend="reference")
    assert all(map(same_bits, w, weights))


@pytest.mark.parametrize("q", [1.0, 1.7])
@pytest.mark.parametrize("home", HOMES)
def test_normalize(home, q):
    weights, gradients, _ = operands()
    step = options(q=q, normalize=True)
    w, _ = step_on_gpu(home, weights, gradients, None, step)
    expected = cloned(weights)[0]
    functional.steepest_step(expected, gradients, **step, backend="reference")
    for updated, exact, start in zip(w, expected, weights, strict=True):
        moved = (exact - start).abs().max() if start.numel() else torch.tensor(0.0)
        assert bool(((updated - exact).abs() <= SUM_RTOL * moved + 1e-6 * exact.abs()).all())


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("home", HOMES)
def test_a_step_waits_for_nothing(home, normalize):
    """lr, grad_scale and found_inf are read on the device; an infinity stops the writing there."""
    w = torch.ones(5000, device="cuda")
    g = torch.randn(5000, device="cuda")
    lr, scale = torch.tensor(0.1, device="cuda"), torch.tensor(8.0, device="cuda")
    found = torch.tensor(1.0, device="cuda")
    functional.steepest_step([w], [g], lr=lr, q=1.5, normalize=normalize, backend=home)
    expected = w.clone()
    functional.steepest_step([expected], [g], lr=float(lr.cpu()), q=1.5, normalize=normalize, backend=home)
    g8 = g * 8
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        functional.steepest_step([w], [g8], lr=lr, q=1.5, normalize=normalize, grad_scale=scale, backend=home)
        functional.steepest_step([w], [g8], lr=lr, q=1.5, grad_scale=scale, found_inf=found, backend=home)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(w, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("home", HOMES)
def test_replay_of_a_captured_step_reads_the_new_lr(home):
    parameters = [torch.nn.Parameter(torch.ones(n, device="cuda")) for n in SIZES]
    for p in parameters:
        p.grad = torch.ones_like(p)
    lr = torch.tensor(0.0, device="cuda")
    optimizer = SteepestDescent(parameters, lr=lr, backend=home)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for rate in (0.25, 0.5):
        lr.fill_(rate)
        graph.replay()
    assert all(bool((p == 0.25).all()) for p in parameters)


@pytest.mark.parametrize("home", HOMES)
def test_the_graphs_of_torch_compile(home):
    """They share a pool of memory, and warm up in it: nothing that a call keeps may lie there."""
    factors = [torch.full((300, 70), 1.0 + i / 8, device="cuda", requires_grad=True) for i in range(3)]
    optimizer = SteepestDescent(factors, lr=0.125, backend=home)

    @torch.compile(mode="reduce-overhead")
    def loss_of(x):
        return (functional.factor_product(factors, backend=home) * x).sum()

    for k in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.full((300, 70), k / 64, device="cuda")
        loss_of(x).backward()
        expected = [x * (factors[0] * factors[1] * factors[2]) / factor for factor in factors]
        for factor, gradient in zip(factors, expected, strict=True):
            torch.testing.assert_close(factor.grad, gradient.detach())
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("home", HOMES)
def test_runs_on_the_callers_stream(home):
    """The step must see what the same stream wrote just before, and be seen by what it reads just after."""
    w, g = torch.zeros(1 << 24, device="cuda"), torch.zeros(1 << 24, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        g.fill_(1.0)
        functional.steepest_step([w], [g], lr=1.0, backend=home)
        total = w.sum()
    stream.synchronize()
    assert total.item() == -float(1 << 24)


def run_everywhere(op, home, device):
    """What an op writes, by tensors of 9000 elements that are the same on every device."""
    values = torch.arange(9000, dtype=torch.float32, device=device) / 4096
    x, g, first, rest = values + 1, values - 1, values / 2 + 1, values / 4 + 1
    step = {"lr": 0.5, "q": 1.5, "backend": home}
    if op == "steepest_step":
        functional.steepest_step([x], [g], **step)
        return x
    if op == "normalize":
        functional.steepest_step([x], [g], **step, normalize=True)
        return x
    if op == "factor_step":
        functional.factor_step([x], [g], [[first, rest]], depth=3, **step)
        return torch.stack([x, first, rest])
    if op == "mirror_step":
        balance = torch.tensor(0.5, dtype=torch.float64, device=device)
        functional.mirror_step([x], [g], [balance], depth=3, **step)
        return x
    if op == "factor_product":
        leaves = [first.requires_grad_(), rest.requires_grad_()]
        product = functional.factor_product(leaves, backend=home)
        once = torch.autograd.grad((product * g).sum(), leaves, create_graph=True)
        twice = torch.autograd.grad((once[0] * x).sum(), rest)
        return torch.stack([product, *once, *twice]).detach()
    if op == "sign_vote":
        words = packed_rows(g.view(3, 3000), 375, 1, home)
        return torch.cat([words.flatten(), count_votes(words, 3000, backend=home)])
    problem = flow.regression(13, 21, 3, seed=1)
    runs = {"q": 1.5, "depth": 2, "lr": 1e-3, "steps": 5, "progress": False}
    return torch.as_tensor(whole(flow.simulate(problem, device=device, backend=home, **runs)).first)


OPS = ("steepest_step", "normalize", "factor_step", "mirror_step", "factor_product", "sign_vote", "diagonal_flow")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("home", HOMES)
def test_a_device_that_is_not_the_current_one(home, op):
    """Twice there: the first call of a kernel compiles it."""
    expected = run_everywhere(op, home, torch.device("cuda", 0)).cpu()
    for _ in range(2):
        assert same_bits(run_everywhere(op, home, torch.device("cuda", 1)).cpu(), expected)
        assert torch.cuda.current_device() == 0


def test_groups_on_two_kinds_of_device():
    on_cpu, on_gpu = torch.nn.Parameter(torch.ones(9)), torch.nn.Parameter(torch.ones(9, device="cuda"))
    on_cpu.grad, on_gpu.grad = torch.ones(9), torch.full((9,), 3.0, device="cuda")
    SteepestDescent([on_cpu, on_gpu], lr=torch.tensor(0.5), q=1.5, normalize=True).step()
    scale = (9 + 9 * 3**1.5) ** (0.5 / 1.5)
    assert torch.allclose(on_cpu, torch.tensor(1 - 0.5 * scale).expand(9))
    assert torch.allclose(on_gpu.cpu(), torch.tensor(1 - 0.5 * scale * 3**0.5).expand(9))


@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("home", HOMES)
def test_more_than_two_to_the_31_elements(home):
    n = 2**31 + 12345
    w = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    g = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    g[::3] = -2.0
    functional.steepest_step([w], [g], lr=0.5, q=1.0, backend=home)
    g.sign_().mul_(-0.5)
    assert torch.equal(w, g)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("optimizer", ["steepest", "adam"])
@pytest.mark.parametrize("size", [pytest.param((13, 21), marks=pytest.mark.sanitized), (80, 100), (300, 100)])
@pytest.mark.parametrize("home", HOMES)
def test_simulated_runs_are_those_of_the_reference(home, size, optimizer, batch_size, dtype):
    problem = flow.regression(*size, 3, seed=range(2))
    steps = {"q": [[1.5], [2.0], [1.7]], "depth": [[[1]], [[2]], [[10]]], "lr": 1e-3, "steps": 20, "scale": 0.6}
    steps |= {"optimizer": optimizer, "batch_size": batch_size, "dtype": dtype, "weight_decay": 0.1, "progress": False}
    result = whole(flow.simulate(problem, device="cuda", backend=home, **steps))
    expected = whole(flow.simulate(problem, backend="reference", **steps))
    tolerance = 3e-5 if dtype == "float32" else 1e-11
    for name in ("first", "rest"):
        mine, right = getattr(result, name), getattr(expected, name)
        assert abs(mine - right).max() <= tolerance * max(1.0, abs(right).max())


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("home", HOMES)
def test_votes_are_those_of_the_reference(home, dtype):
    for rows, n in ((1, 100_003), (2, 4096), (5, 777), (300, 65)):
        gradient = random_values((rows, n), dtype, special=True)
        words = packed_rows(gradient, n // 8 + 3, 1, "reference")
        assert torch.equal(packed_rows(gradient.to("cuda"), n // 8 + 3, 1, home).cpu(), words)
        majority = count_votes(words, n, dtype=dtype, backend="reference")
        assert torch.equal(count_votes(words.to("cuda"), n, dtype=dtype, backend=home).cpu(), majority)
