"""The Triton kernels without a GPU: compiled for several, and run by Triton's interpreter. With a GPU they run there too."""

import os
import re
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from bench.gpu.gpu_code import LLAMA_8B, MANY_TINY, triton_launches  # noqa: E402
from bench.gpu.gpu_machine_code import MACHINES  # noqa: E402
from bench.gpu.gpu_triton_code import TARGETS, compiled_step, machine_code_of  # noqa: E402
from bench.measure.works import RESNET50  # noqa: E402
from pysteep.kernels.reference import rounding as reference_rounding  # noqa: E402
from pysteep.kernels.reference import steepest_step as reference  # noqa: E402
from pysteep.kernels.rounding import NEAREST  # noqa: E402
from pysteep.kernels.triton import rounding as roundings  # noqa: E402
from pysteep.kernels.triton import steepest_step  # noqa: E402
from pysteep.kernels.triton.rounding import Draws, noise  # noqa: E402
from tests.support.cases import DTYPES  # noqa: E402
from tests.support.suites import file_of  # noqa: E402
from tests.support.tolerances import SUM_RTOL  # noqa: E402
from tests.support.triton_cases import (  # noqa: E402
    CHUNK,
    DEVICE,
    INTERPRETED,
    OPTIONS,
    assert_same_bits,
    assert_surroundings_kept,
    compiles,
    copies,
    local_memory,
    needs_gpu,
    runs,
    tensors,
)

# ---- compiled, for machines that are not here --------------------------------------------------------------------------------


@compiles
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("q", [1, 1.7])
@pytest.mark.parametrize(
    ("arch", "storage"), [(90, tl.float32), (90, tl.bfloat16), (80, tl.bfloat16), (100, tl.bfloat16)], ids=str
)
def test_step_compiles_for_nvidia(arch, storage, q, momentum, tmp_path):
    asm = compiled_step(steepest_step.step_kernel, TARGETS[arch], storage=storage, q=q, momentum=momentum)
    ptx = asm["ptx"]
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= 2 + momentum
    assert len(re.findall(r"st\.global\S*\.v4\.b32", ptx)) >= 1 + momentum
    assert ".ftz" not in ptx
    assert not re.search(r"(mul|add|sub)\.f(32|64)", ptx), "without .rn the assembler may fuse"
    assert bool(re.search(r"\bfma\.", ptx)) == (q == 1.7)
    kernel = machine_code_of(asm, tmp_path)
    assert (kernel.stack, kernel.local, kernel.count("LDL", "STL")) == (0, 0, 0)
    threads = 32 * MACHINES[arch].resident_warps(kernel, steepest_step.THREADS)
    assert threads * kernel.bytes_in_flight() >= 15 << 10, "an H100's memory would wait for the kernel"


@compiles
@pytest.mark.parametrize("q", [1, 1.5, 2, 1.7])
@pytest.mark.parametrize("storage", [tl.float16, tl.float64], ids=str)
@pytest.mark.parametrize("kernel", ["step_kernel", "power_sum_kernel"])
def test_every_kernel_compiles(kernel, storage, q, tmp_path):
    kernel = getattr(steepest_step, kernel)
    asm = compiled_step(kernel, TARGETS[90], storage=storage, q=q, momentum=True, aligned=False, numbers_on_device=True)
    ptx = asm["ptx"]
    assert ".ftz" not in ptx
    assert not re.search(r"(sqrt|div)\.(approx|full)", ptx)
    assert bool(re.search(r"\bfma\.", ptx)) == (q == 1.7)
    assert local_memory(asm, tmp_path) == {"STACK": 0, "LOCAL": 0}


@compiles
@pytest.mark.parametrize("storage", [tl.float16, tl.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["stochastic", "compensated"])
def test_rounding_compiles(mode, storage, tmp_path):
    asm = compiled_step(steepest_step.step_kernel, TARGETS[90], storage=storage, q=1.5, momentum=True, mode=mode)
    ptx, compensated = asm["ptx"], mode == "compensated"
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= 3 + compensated
    assert len(re.findall(r"st\.global\S*\.v4\.b32", ptx)) >= 2 + compensated
    assert ".shared" not in ptx, "random numbers come to the thread that needs them"
    assert not re.search(r"(mul|add|sub)\.f(32|64)|\bfma\.|\.ftz", ptx)
    assert local_memory(asm, tmp_path) == {"STACK": 0, "LOCAL": 0}


@compiles
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("q", [1, 1.7])
@pytest.mark.parametrize("storage", [tl.float32, tl.bfloat16], ids=str)
def test_step_compiles_for_amd(storage, q, momentum):
    asm = compiled_step(steepest_step.step_kernel, TARGETS["gfx942"], storage=storage, q=q, momentum=momentum)["amdgcn"]
    assert len(re.findall(r"(global|buffer|flat)_load_dwordx4", asm)) >= 2 + momentum
    assert len(re.findall(r"(global|buffer|flat)_store_dwordx4", asm)) >= 1 + momentum
    assert re.search(r"\.amdhsa_float_denorm_mode_32 3", asm), "subnormals are kept"
    assert bool(re.search(r"v_(pk_)?(fma|fmac|mad)_f32", asm)) == (q == 1.7)


@pytest.mark.parametrize("work", [LLAMA_8B, RESNET50, MANY_TINY], ids=lambda work: work.name)
def test_one_launch_for_all_tensors(work):
    assert triton_launches(work, 2) == triton_launches(work, 3) == 1


# ---- run ---------------------------------------------------------------------------------------------------------------------

EVERYTHING = "triton and not thousand"  # a thousand tensors take the interpreter minutes
LONG = "against_float64 or general_power or (same_bits and not float32) or test_normalize"
TWO_DTYPES = f"{EVERYTHING} and not float64 and (bfloat16 or not float16)"  # the others differ in what is loaded and stored
SOME_ROUNDING = "triton and (shards or (steepest_step and bfloat16 and 1.5) or (factor_step and bfloat16 and 2-10))"
QUICK = {
    "quick": (["steepest_step", "triton"], f"{EVERYTHING} and not ({LONG})"),
    "quick tensor_betas": (["tensor_betas"], "triton and 1.7 and not full"),
    "quick rounding": (["rounding"], SOME_ROUNDING),
}
OTHERS = {
    "steepest_step": (["steepest_step"], f"triton and ({LONG} or thousands)"),
    **{name: ([name], EVERYTHING) for name in ("triton_depth", "triton_flow", "triton_vote", "rounding", "tensor_betas")},
    **{name: ([name], TWO_DTYPES) for name in ("factor_step", "mirror_step", "diagonal_flow")},
    # 64 factors and 65535 voters, one by one, take minutes as well; ten factors are two groups, 300 voters beyond a byte.
    "factor_product": (["factor_product"], f"{TWO_DTYPES} and not float32 and not 64"),
    "sign_vote": (["sign_vote"], f"{TWO_DTYPES} and not float32 and not as_many_voters"),
}
RUNS = [pytest.param(*run, id=name) for name, run in QUICK.items()]
RUNS += [pytest.param(*run, id=name, marks=pytest.mark.slow) for name, run in OTHERS.items()]


@pytest.mark.parametrize(("suites", "chosen"), RUNS)
def test_conformance_in_the_interpreter(suites, chosen, tmp_path):
    """The whole suite of an op for this home, and what follows here; the depth ops' own suites take minutes."""
    if INTERPRETED:
        pytest.skip("this is the interpreter")
    files = [str(file_of(name)) for name in suites]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", chosen, "-rs", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 0, result.stdout
    reasons = set(re.findall(r"^SKIPPED \[\d+\] \S+ (.*)", result.stdout, re.MULTILINE))
    assert reasons <= {"the interpreter compiles nothing", "this is the interpreter", "needs a GPU", "no GPU"}, result.stdout


def compare(weights, gradients, momenta, options):
    expected_weights, expected_momenta = copies(weights), copies(momenta)
    on_cpu = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    reference.steepest_step(expected_weights, copies(gradients), expected_momenta, **on_cpu)
    unchanged = copies(gradients)
    steepest_step.steepest_step(weights, gradients, momenta, **options)
    for actual, expected in zip(weights + gradients, expected_weights + unchanged, strict=True):
        assert_same_bits(actual, expected)
        assert_surroundings_kept(actual)
    for actual, expected in zip(momenta or [], expected_momenta or [], strict=True):
        assert_same_bits(actual, expected)
        assert_surroundings_kept(actual)


@runs
def test_step_over_several_chunks():
    sizes = [CHUNK, 2 * CHUNK + 3, 5, CHUNK - 1]
    compare(*(tensors(torch.float32, sizes, 10 * i, skip=1) for i in range(3)), OPTIONS)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q", [1, 1.7])
def test_power_sum(dtype, q):
    groups = [tensors(dtype, [0, CHUNK + 9, 300], 10 * i, skip=1) for i in range(3)]
    for group in groups:
        for tensor in group:
            tensor.nan_to_num_(0.5, 0.5, 0.5)
    options = {name: OPTIONS[name] for name in ("betas", "coupled_weight_decay", "maximize")} | {"q": q}
    scale = torch.tensor(3.0, device=DEVICE)
    total = steepest_step.steepest_power_sum(*groups, **options, grad_scale=scale)
    assert (total.shape, total.dtype, total.device.type) == ((), torch.float64, DEVICE)
    expected = reference.steepest_power_sum(*map(copies, groups), **options, grad_scale=3.0)
    torch.testing.assert_close(total.cpu(), expected, rtol=SUM_RTOL, atol=0)


@runs
def test_nothing_to_do():
    empty = [torch.empty(0, device=DEVICE)]
    steepest_step.steepest_step(empty, empty, None, **OPTIONS)
    options = {name: OPTIONS[name] for name in ("q", "betas", "coupled_weight_decay", "maximize", "grad_scale")}
    assert steepest_step.steepest_power_sum(empty, empty, None, **options) == 0


@runs
def test_offsets_above_32_bits():
    """The last chunk of a tensor of 2^33 elements, of which no more than that chunk exists."""
    first, numel = 2**33, 100
    weight, gradient = tensors(torch.float32, [numel, numel], 0)
    expected = [weight.cpu().clone()]
    reference.steepest_step(expected, [gradient.cpu()], None, **OPTIONS | {"q": 1})
    rows = [first + numel, -first // CHUNK, weight.data_ptr() - 4 * first, gradient.data_ptr() - 4 * first, 0]
    compiled_for = steepest_step.specialisation([weight], [gradient], None, 1, 0.003, False) | steepest_step.LAUNCH
    values = (0.1, 0.7, 3.0, 0.01, 0.003, 0.9, 0.99, 0.0)
    steepest_step.step_kernel[(1,)](
        torch.tensor(rows, device=DEVICE),
        1,
        *[None] * 6,
        *values,
        **roundings.arguments(NEAREST, "nearest"),
        ALIGNED=True,
        **compiled_for,
    )
    assert_same_bits(weight, expected[0])


@triton.jit(do_not_specialize=["seed", "step", "stream", "first"])
def noise_kernel(result, seed, step, stream, first, role, SIZE: tl.constexpr, ALIGNED: tl.constexpr):
    draws = Draws(seed.to(tl.uint64), step.to(tl.uint32), stream.to(tl.uint32), first.to(tl.int64))
    tl.store(result + tl.arange(0, SIZE), noise(draws, role, SIZE, ALIGNED).to(tl.int64))


@runs
@pytest.mark.parametrize("first", [0, 2**38 + 8, 2**40 + 5])
@pytest.mark.parametrize("size", [64, 256, 512, 1024, 4096])
def test_random_numbers_of_blocks_of_any_size(size, first):
    result = torch.empty(size, dtype=torch.int64, device=DEVICE)
    draws = {"seed": 2**63 + 5, "step": 2**31 + 1, "stream": 2**32 - 2}
    noise_kernel[(1,)](result, *draws.values(), first, 3, SIZE=size, ALIGNED=first % 8 == 0)
    assert torch.equal(result.cpu(), reference_rounding.noise(first, size, **draws, role=3))


@pytest.mark.gpu
@needs_gpu
@runs
def test_a_captured_step_reads_numbers_when_replayed():
    groups = [tensors(torch.float32, [3000, 77], 10 * i, skip=1) for i in range(3)]
    lr = torch.tensor(0.0, dtype=torch.float64, device=DEVICE)
    steepest_step.steepest_step(*groups, **OPTIONS | {"lr": lr})  # compiles, which a capture cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradients = [gradient * 2 for gradient in groups[1]]
        steepest_step.steepest_step(groups[0], gradients, groups[2], **OPTIONS | {"lr": lr})
    lr.fill_(0.1)
    expected, momenta = copies(groups[0]), copies(groups[2])
    for _ in range(2):
        graph.replay()
        reference.steepest_step(expected, copies(gradients), momenta, **OPTIONS)
    for actual, wanted in zip(groups[0] + groups[2], expected + momenta, strict=True):
        assert_same_bits(actual, wanted)
