"""What only the numba backend can get wrong: threads, forks, the split of the work, conversions, vectorisation."""

from __future__ import annotations

import multiprocessing
import os
import platform
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from numba import njit
from torch import Tensor

from pysteep.kernels.numba import dtype as dtypes
from pysteep.kernels.numba import factor_product as numba_product
from pysteep.kernels.numba import factor_step as numba_factors
from pysteep.kernels.numba import mirror_step as numba_mirror
from pysteep.kernels.numba import parallel
from pysteep.kernels.numba import rounding as numba_rounding
from pysteep.kernels.numba import steepest_step as numba_step
from pysteep.kernels.reference import rounding as reference_rounding
from pysteep.kernels.reference import steepest_step as reference_step
from pysteep.kernels.rounding import Rounding
from tests.support.cases import same_bits

SIZES = (0, 1, 3 * parallel.CHUNK, 16383, 7, 100_003)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def step(weights: list[Tensor], gradients: list[Tensor], q: float = 1.0) -> None:
    numba_step.steepest_step(
        weights,
        gradients,
        None,
        lr=0.25,
        q=q,
        betas=(0.0, 0.0),
        weight_decay=0.5,
        coupled_weight_decay=0.0,
        maximize=False,
        step_scale=1.0,
        grad_scale=1.0,
        found_inf=0.0,
    )


def power_sum(weights: list[Tensor], gradients: list[Tensor], q: float) -> float:
    options = {"betas": (0.0, 0.0), "coupled_weight_decay": 0.0, "maximize": False, "grad_scale": 1.0}
    return numba_step.steepest_power_sum(weights, gradients, None, q=q, **options).item()


def factor_step(weights: list[Tensor], gradients: list[Tensor], factors: list[list[Tensor]], depth: int, q: float) -> None:
    options = {"betas": (0.0, 0.0), "weight_decay": 0.5, "coupled_weight_decay": 0.0, "maximize": False}
    numbers = {"lr": 0.25, "q": q, "grad_scale": 1.0, "found_inf": 0.0}
    numba_factors.factor_step(weights, gradients, factors, None, depth=depth, **options, **numbers)


def mirror_step(weights: list[Tensor], gradients: list[Tensor], depth: int, q: float) -> None:
    balances = [torch.tensor(0.1, dtype=torch.float64)] * len(weights)
    options = {"lr": 0.25, "q": q, "weight_decay": 0.5, "maximize": False, "grad_scale": 1.0, "found_inf": 0.0}
    numba_mirror.mirror_step(weights, gradients, balances, depth=depth, **options)


def problem(seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    weights, gradients = ([torch.randn(n, generator=generator) for n in SIZES] for _ in range(2))
    return weights, gradients


def expected(weights: list[Tensor], gradients: list[Tensor]) -> list[np.ndarray]:
    half = np.float32(0.875)
    return [w.numpy() * half - np.float32(0.25) * np.sign(g.numpy()) for w, g in zip(weights, gradients, strict=True)]


def agrees(weights: list[Tensor], answers: list[np.ndarray]) -> bool:
    return all(np.array_equal(w.numpy(), answer) for w, answer in zip(weights, answers, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 7])
def test_every_element_once(set_threads, threads):
    @njit(nogil=True)
    def count(tensor, begin, n, chunk, addresses, seen, chunks):
        chunks[chunk] += 1
        for i in range(n):
            seen[addresses[0, tensor] + begin + i] += 1

    numel = np.array(SIZES, np.int64)
    addresses = np.zeros((3, numel.size), np.int64)
    addresses[0, 1:] = np.cumsum(numel)[:-1]
    seen, chunks = np.zeros(numel.sum(), np.int64), np.zeros((-(-numel // parallel.CHUNK)).sum(), np.int64)
    set_threads(threads)
    parallel.run(parallel.for_each_chunk(count), parallel.Tensors(addresses, numel, ()), seen, chunks)
    assert (seen == 1).all()
    assert (chunks == 1).all()


def test_same_bits_for_any_number_of_threads(set_threads):
    sums, steps = [], []
    for threads in (1, 2, 3, 5):
        set_threads(threads)
        weights, gradients = problem()
        sums.append(power_sum(weights, gradients, 1.7))
        step(weights, gradients, 1.7)
        steps.append(weights)
    assert sums == [sums[0]] * len(sums)
    assert all(torch.equal(a, b) for other in steps for a, b in zip(steps[0], other, strict=True))


def test_same_depth_steps_for_any_number_of_threads(set_threads):
    answers = []
    for threads in (1, 2, 3, 5):
        set_threads(threads)
        weights, gradients = problem()
        seen = [problem(seed)[0] for seed in range(1, 6)]
        factor_step(seen[0], gradients, seen[1:4], 3, 1.5)
        factor_step(seen[4], gradients, seen[2:4], 5, 1.5)
        mirror_step(weights, gradients, 4, 1.5)
        answers.append([weights, *seen])
    for other in answers:
        assert all(torch.equal(a, b) for roles in zip(answers[0], other, strict=True) for a, b in zip(*roles, strict=True))


@pytest.mark.parametrize("storage", dtypes.STORAGES)
def test_blocks_of_many_factors_fit_the_stack(storage):
    memory, real = dtypes.STORAGES[storage].memory, dtypes.compute_type(storage)
    for rows in range(1, 129):
        length = parallel.row_length(memory, real, rows)
        assert 32 <= length <= parallel.BLOCK
        assert rows * length * np.dtype(real).itemsize <= parallel.ROWS


def test_concurrent_python_threads(set_threads):
    set_threads(3)
    problems = [problem(seed) for seed in range(6)]
    answers = [expected(*each) for each in problems]
    start = threading.Barrier(len(problems))

    def steps(weights, gradients):
        start.wait()
        for _ in range(20):
            step(weights, gradients)

    for weights, gradients in problems:
        step(weights, gradients)
    assert all(agrees(each[0], answer) for each, answer in zip(problems, answers, strict=True))
    for _ in range(20):
        answers = [expected([torch.from_numpy(w) for w in a], p[1]) for a, p in zip(answers, problems, strict=True)]
    threads = [threading.Thread(target=steps, args=each, daemon=True) for each in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert all(agrees(each[0], answer) for each, answer in zip(problems, answers, strict=True))


def child_steps() -> None:
    # numpy compares: torch's own threads do not survive a fork.
    rng = np.random.default_rng(0)
    weights, gradients = ([torch.from_numpy(rng.standard_normal(n, np.float32)) for n in SIZES] for _ in range(2))
    answers = expected(weights, gradients)
    step(weights, gradients)
    sys.exit(0 if agrees(weights, answers) and parallel.pool.workers == 3 else 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork_after_use(set_threads):
    set_threads(3)
    weights, gradients = problem()
    step(weights, gradients)
    child = multiprocessing.get_context("fork").Process(target=child_steps, daemon=True)
    child.start()
    answers = expected(weights, gradients)
    step(weights, gradients)
    child.join(60)
    if child.exitcode is None:
        child.kill()
    assert child.exitcode == 0
    assert agrees(weights, answers)


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
def test_sixteen_bit_conversions(storage):
    load, store = dtypes.converters(storage, np.float32)

    @njit
    def widen(halves, floats):
        for i in range(halves.size):
            floats[i] = load(halves[i])

    @njit
    def narrow(floats, halves):
        for i in range(floats.size):
            halves[i] = store(floats[i])

    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    floats = torch.empty(halves.numel())
    widen(halves.numpy().view(np.uint16), floats.numpy())
    torch.testing.assert_close(floats, halves.view(storage).float(), rtol=0, atol=0, equal_nan=True)

    # Every float32 near a tie between two neighbours, and every exponent.
    middles = (torch.arange(2**16)[:, None] << 16) + torch.tensor(
        [0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001]
    )
    floats = middles.flatten().to(torch.int32).view(torch.float32)
    halves = torch.empty(floats.numel(), dtype=torch.int16)
    narrow(floats.numpy(), halves.numpy().view(np.uint16))
    finite, answer = ~floats.isnan(), floats.to(storage)
    assert torch.equal(halves[finite], answer.view(torch.int16)[finite])
    assert halves.view(storage)[~finite].isnan().all()


def test_random_numbers_follow_stream_and_first_element(set_threads):
    """Whatever the chunk and the thread: shards of parameters with more than 2^35 elements too."""
    set_threads(3)
    sizes, firsts = (3 * parallel.CHUNK + 13, 0, 5, parallel.BLOCK + 1), (2**40 + 5, 3, 8 * 2**32 - 2, 7)
    weights = [torch.randn(n).bfloat16() for n in sizes]
    gradients = [torch.randn(n).bfloat16() for n in sizes]
    rounding = Rounding("stochastic", 2**64 - 1, torch.tensor(2.0**33 + 7, dtype=torch.float64), [2**32 - 1, 0, 3, 9], firsts)
    options = {"lr": 0.01, "q": 1.0, "betas": (0.0, 0.0), "weight_decay": 0.5, "coupled_weight_decay": 0.0, "maximize": False}
    options |= {"step_scale": 1.0, "grad_scale": 1.0, "found_inf": 0.0, "rounding": rounding}
    answers = [w.clone() for w in weights]
    reference_step.steepest_step(answers, gradients, None, **options)
    numba_step.steepest_step(weights, gradients, None, **options)
    assert all(map(same_bits, weights, answers))


def test_power_sum_of_compensated_weights():
    """That of the float32 weights which they are the halves of."""
    wide = [torch.randn(n) for n in SIZES]
    gradients = [torch.randn(n).bfloat16() for n in SIZES]
    halves = [reference_rounding.round_compensated(w, torch.bfloat16) for w in wide]
    options = {"q": 1.5, "betas": (0.0, 0.0), "coupled_weight_decay": 0.7, "maximize": False, "grad_scale": 3.0}
    rounding = Rounding("compensated", compensations=[[low for _, low in halves]])
    total = numba_step.steepest_power_sum([w for w, _ in halves], gradients, None, **options, rounding=rounding)
    assert torch.equal(total, numba_step.steepest_power_sum(wide, gradients, None, **options))


def test_wider_weights_share_the_kernel_for_rounding_to_nearest():
    x = [torch.ones(3)]
    kinds = {numba_step.kind_of(x, x, None, 1.0, 0.0, Rounding(mode)) for mode in ("nearest", "stochastic", "compensated")}
    assert len(kinds) == 1


VECTOR = {
    "x86_64": r"mulps\s.*[xyz]mm",
    "amd64": r"mulps\s.*[xyz]mm",
    "aarch64": r"fmul\s+v\d+\.4s",
    "arm64": r"fmul(\.4s|\s+v\d+\.4s)",
}


@pytest.mark.skipif(platform.machine().lower() not in VECTOR, reason="no pattern for this machine's assembly")
@pytest.mark.parametrize(
    ("q", "storage"), [*((q, torch.float32) for q in (1.0, 1.5, 2.0, 1.7)), (1.0, torch.bfloat16), (1.7, torch.float16)]
)
def test_vectorised(q, storage):
    weight, gradient = torch.ones(64, dtype=storage), torch.ones(64, dtype=storage)
    step([weight], [gradient], q)
    power_sum([weight], [gradient], q)
    kind = numba_step.kind_of([weight], [gradient], None, q, 0.0)
    for kernel in numba_step.step_kernel(kind), numba_step.power_kernel(kind):
        (assembly,) = kernel.inspect_asm().values()
        assert re.search(VECTOR[platform.machine().lower()], assembly)


@pytest.mark.skipif(platform.machine().lower() not in VECTOR, reason="no pattern for this machine's assembly")
@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["stochastic", "compensated"])
def test_rounding_vectorised(mode, storage):
    rounded = numba_rounding.rounded(storage, np.float32, mode)

    @njit(error_model="numpy")
    def halve(addresses, n, arguments):
        numbers = rounded.elements(addresses, 0, 0, 0, n, 0, arguments)
        for i in range(n):
            rounded.store(numbers, i, rounded.load(numbers, i) * np.float32(0.5))

    x, low = torch.ones(64, dtype=storage), torch.zeros(64, dtype=torch.int16)
    rounding = Rounding(mode, 1, 2.0, [0], [0], [[low]])
    tensors, arguments = numba_rounding.tensors_and_arguments(rounding, mode, [x])
    halve(tensors.addresses, 64, arguments)
    assert (x == 0.5).all()
    (assembly,) = halve.inspect_asm().values()
    assert re.search(VECTOR[platform.machine().lower()], assembly)


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="no pattern for this machine's assembly")
def test_noise_vectorised():
    noise = np.zeros(32, np.uint64)
    numba_rounding.fill_noise(noise, 8, *np.zeros(5, np.uint64))
    (assembly,) = numba_rounding.fill_noise.inspect_asm().values()
    assert re.search(r"pmuludq\s.*[xyz]mm", assembly)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine().lower() not in VECTOR, reason="no pattern for this machine's assembly")
@pytest.mark.parametrize(("q", "storage"), [(1.5, torch.float32), (1.7, torch.float32), (1.0, torch.bfloat16)])
def test_depth_vectorised(q, storage):
    x = [torch.ones(64, dtype=storage) for _ in range(4)]
    factor_step(x[:1], x[1:2], [x[2:3], x[3:]], 2, q)
    factor_step(x[:1], x[1:2], [x[2:3], x[3:]], 3, q)
    mirror_step(x[:1], x[1:2], 3, q)
    numba_product.factor_product(x[:1], x[1])
    numba_product.factor_product_backward(x[0], x[1:2], x[2:3])
    numba_product.factor_product_double_backward(x[0], x[1:2], x[2:3], x[3], [torch.ones_like(x[0])])
    power = numba_step.power_of(q)
    factor = numba_step.Kind(power, storage, torch.float32, None, False)
    kind = numba_factors.Kind(storage, storage, factor)
    products = numba_product.product_kernel, numba_product.backward_kernel, numba_product.double_backward_kernel
    kernels = [of_storage(storage) for of_storage in products]
    kernels += [numba_factors.full_kernel(kind), numba_factors.tied_kernel(kind)]
    kernels.append(numba_mirror.step_kernel(numba_mirror.Kind(power, storage, storage)))
    for kernel in kernels:
        (assembly,) = kernel.inspect_asm().values()
        assert re.search(VECTOR[platform.machine().lower()], assembly)


def test_without_fused_multiply_add():
    program = """
import torch
from pysteep.kernels.numba.steepest_step import steepest_step
g = torch.cat([torch.randn(1000), torch.randn(100) * 1e-40, torch.randn(100) * 1e30])
w = torch.zeros_like(g)
steepest_step([w], [g], None, lr=-1.0, q=1.7, betas=(0.0, 0.0), weight_decay=0.0, coupled_weight_decay=0.0, maximize=False,
              step_scale=1.0, grad_scale=1.0, found_inf=0.0)
u = g.double().abs().pow(0.7).copysign(g.double())
assert ((w - u).abs() <= 4 * 2.0**-23 * u.abs()).all()
"""
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic"}
    subprocess.run([sys.executable, "-P", "-c", program], env=environment, check=True, timeout=120)
