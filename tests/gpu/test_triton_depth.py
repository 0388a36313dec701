"""The Triton kernels of the ops on depth, as in test_triton.py: compiled for several GPUs, and run against the reference."""

import itertools
import re

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from bench.gpu.gpu_triton_code import STORED, TARGETS, compiled_factor_step, compiled_mirror_step, compiled_product  # noqa: E402
from pysteep.kernels.reference import factor_product as reference_product  # noqa: E402
from pysteep.kernels.reference import factor_step as reference_factor  # noqa: E402
from pysteep.kernels.reference import mirror_step as reference_mirror  # noqa: E402
from pysteep.kernels.triton import factor_product, factor_step, mirror_step  # noqa: E402
from tests.support.cases import DTYPES  # noqa: E402
from tests.support.tolerances import EPS, MIRROR_ROUNDINGS  # noqa: E402
from tests.support.triton_cases import (  # noqa: E402
    CHUNK,
    DEVICE,
    OPTIONS,
    assert_same_bits,
    assert_surroundings_kept,
    compiles,
    copies,
    local_memory,
    runs,
    tensors,
)

SHAPES = ((3, 3), (2, 3), (10, 10), (2, 10))
"""Factors that are stored, and depth: full and tied."""

# ---- compiled, for machines that are not here --------------------------------------------------------------------------------

FEW_BYTES = 32
"""What the assembler may put aside, to its mind, for one more block on a multiprocessor; Triton 3.6 lets it."""


def check_arithmetic(asm, folder, *, fuses, stack=0):
    """Each operation is rounded on its own, subnormals are kept, and registers suffice."""
    ptx = asm["ptx"]
    assert ".ftz" not in ptx
    assert not re.search(r"(mul|add|sub)\.f(32|64)", ptx), "without .rn the assembler may fuse"
    assert not re.search(r"(sqrt|div)\.(approx|full)", ptx)
    assert bool(re.search(r"\bfma\.", ptx)) == fuses
    memory = local_memory(asm, folder)
    assert memory["LOCAL"] == 0
    assert memory["STACK"] <= stack


def loads_and_stores(asm, *, bits=128):
    """How many of that width."""
    if "ptx" in asm:
        width = {128: r"v(4\.b32|2\.b64)", 64: r"(v2\.b32|b64)"}[bits]
        return tuple(len(re.findall(rf"{way}\.global\S*\.{width}", asm["ptx"])) for way in ("ld", "st"))
    width = {128: "dwordx4", 64: "dwordx2"}[bits]
    return tuple(len(re.findall(rf"(?:global|buffer|flat)_{way}_{width}", asm["amdgcn"])) for way in ("load", "store"))


def group_of(stored, momentum, dtype=torch.float32, mode="nearest"):
    """The factors of a group."""
    return factor_step.step_grouping(stored, momentum, dtype, mode)["GROUP"]


@compiles
@pytest.mark.parametrize(("momentum", "q"), [(False, 1), (True, 1.7)])
@pytest.mark.parametrize(
    ("arch", "stored", "depth"), [*((90, *shape) for shape in SHAPES), (80, *SHAPES[0]), (100, *SHAPES[0])]
)
def test_factor_step_compiles_for_nvidia(arch, stored, depth, momentum, q, tmp_path):
    asm = compiled_factor_step(stored, depth, TARGETS[arch], storage=tl.float32, q=q, momentum=momentum)
    loads, stores = loads_and_stores(asm)
    assert min(loads, stores) >= 1 + group_of(stored, momentum) * (1 + momentum)
    check_arithmetic(asm, tmp_path, fuses=q == 1.7)


@compiles
@pytest.mark.parametrize("storage", [tl.float16, tl.bfloat16, tl.float64], ids=str)
@pytest.mark.parametrize(("stored", "depth", "q"), [(3, 3, 1.7), (2, 10, 1.7), (10, 10, 1.5), (20, 20, 1)])
def test_factor_step_compiles_for_any_storage(storage, stored, depth, q, tmp_path):
    options = {"momentum": True, "aligned": False, "numbers_on_device": True}
    asm = compiled_factor_step(stored, depth, TARGETS[90], storage=storage, q=q, **options)
    check_arithmetic(asm, tmp_path, fuses=q == 1.7)


@compiles
@pytest.mark.parametrize("mode", ["stochastic", "compensated"])
@pytest.mark.parametrize(("stored", "depth"), [(3, 3), (2, 10)])
def test_rounded_factors_compile(stored, depth, mode, tmp_path):
    asm = compiled_factor_step(stored, depth, TARGETS[90], storage=tl.bfloat16, q=1.5, momentum=True, mode=mode)
    loads, stores = loads_and_stores(asm)
    assert min(loads, stores) >= 1 + stored * (2 + (mode == "compensated"))
    assert ".shared" not in asm["ptx"], "random numbers come to the thread that needs them"
    check_arithmetic(asm, tmp_path, fuses=False)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("storage", [tl.float16, tl.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["nearest", "stochastic", "compensated"])
@pytest.mark.parametrize("depth", [1, 7, 10, 64])
def test_little_to_compile_at_any_depth(depth, mode, storage, aligned, tmp_path):
    """What seconds of compilation grow with: lines of Triton's IR, of which a pass takes the square and more, and of PTX."""
    options = {"storage": storage, "q": 1.7, "momentum": True, "mode": mode, "aligned": aligned}
    asm = compiled_factor_step(depth, depth, TARGETS[90], **options)
    ttir = asm["ttir"]
    assert ttir.count("\n") < 2200
    assert asm["ptx"].count("\n") < 7000
    calls = group_of(depth, True, torch.float16, mode) + 1
    assert ttir.count("tt.mulhiui") == (2 * calls if mode == "stochastic" else 0), "random numbers one way"
    memory = local_memory(asm, tmp_path)
    assert memory["LOCAL"] == 0
    assert memory["STACK"] <= FEW_BYTES


@compiles
@pytest.mark.parametrize("storage", [tl.float32, tl.bfloat16, tl.float64], ids=str)
@pytest.mark.parametrize("depth", [3, 10, 20])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_factor_product_compiles(order, depth, storage, tmp_path):
    asm = compiled_product(order, depth, TARGETS[90], storage=storage, aligned=depth == 3)
    check_arithmetic(asm, tmp_path, fuses=False, stack=FEW_BYTES)
    if depth == 3:
        loads, stores = loads_and_stores(asm)
        assert loads >= (depth, depth + 1, 2 * depth + 1)[order]
        assert stores >= (1, depth, depth + 1)[order]


@compiles
@pytest.mark.parametrize(
    ("storage", "q"),
    [*itertools.product([tl.float32, tl.bfloat16], [1, 1.5, 2, 1.7]), (tl.float64, 1), (tl.float64, 1.7)],
    ids=str,
)
@pytest.mark.parametrize("depth", [2, 3, 10])
def test_mirror_step_compiles(depth, storage, q, tmp_path):
    asm = compiled_mirror_step(depth, TARGETS[90], storage=storage, q=q)
    check_arithmetic(asm, tmp_path, fuses=depth > 2 or q == 1.7, stack=FEW_BYTES)
    loads, stores = loads_and_stores(asm, bits=64 if storage == tl.bfloat16 else 128)
    assert loads >= 2
    assert stores >= 1


@compiles
@pytest.mark.parametrize("storage", [tl.float32, tl.float64], ids=str)
def test_compiles_for_amd(storage):
    target, everything = TARGETS["gfx942"], []
    for stored, depth in SHAPES:
        asm = compiled_factor_step(stored, depth, target, storage=storage, q=1, momentum=storage == tl.float32)
        group = group_of(stored, storage == tl.float32, STORED[storage])
        assert min(loads_and_stores(asm)) >= 1 + group * (1 + (storage == tl.float32))
        assert not re.search(r"v_(pk_)?(fma|fmac|mad)_f32", asm["amdgcn"])
        everything.append(asm)
    everything += [compiled_product(order, 3, target, storage=storage) for order in (0, 1, 2)]
    everything.append(compiled_mirror_step(3, target, storage=storage, q=1.5))
    for asm in everything:
        assert min(loads_and_stores(asm)) >= 1
        assert re.search(r"\.amdhsa_float_denorm_mode_32 3", asm["amdgcn"]), "subnormals are kept"
        assert re.search(r"ScratchSize: 0\b", asm["amdgcn"])


# ---- run ---------------------------------------------------------------------------------------------------------------------


def factors(dtype, sizes, seed, count, skip=0):
    """factors[k][i] of weight i, near 1 but for special values, so that deep products stay in range."""
    roles = [tensors(dtype, sizes, seed + 100 * k, skip=skip) for k in range(count)]
    for tensor in itertools.chain(*roles):
        ordinary = tensor.isfinite() & (tensor.abs() > torch.finfo(dtype).tiny)
        tensor.copy_(torch.where(ordinary, tensor.sign() * tensor.abs().pow(0.05), tensor))
    return roles


def assert_all_as(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert_same_bits(a, b)
        assert_surroundings_kept(a)


@runs
@pytest.mark.parametrize(
    ("dtype", "depth", "numel"),
    [(dtype, depth, numel) for dtype in DTYPES for depth, numel in ((1, 7), (2, 1), (3, 300), (10, 300), (17, 70))]
    + [(torch.float32, 3, 2 * CHUNK + 3), (torch.float32, 16, 5), (torch.float32, 64, 300), (torch.bfloat16, 33, 5)],
)
def test_factor_product(dtype, depth, numel):
    for skip in (0, 1):
        w, v, dw = (tensors(dtype, [numel] * depth, seed, skip=skip) for seed in (0, 100, 200))
        g, x = tensors(dtype, [numel, numel], 300, skip=skip)
        expected_x, expected_dw = x.cpu().clone(), copies(dw)
        inputs = copies([g, *w, *v])

        factor_product.factor_product(w, x)
        reference_product.factor_product(copies(w), expected_x)
        factor_product.factor_product_backward(g, w, dw)
        reference_product.factor_product_backward(g.cpu(), copies(w), expected_dw)
        assert_all_as([x, *dw], [expected_x, *expected_dw])

        factor_product.factor_product_double_backward(g, w, v, x, dw)
        reference_product.factor_product_double_backward(g.cpu(), copies(w), copies(v), expected_x, expected_dw)
        assert_all_as([x, *dw], [expected_x, *expected_dw])
        assert_all_as([g, *w, *v], inputs)


FACTOR_OPTIONS = {name: number for name, number in OPTIONS.items() if name != "step_scale"}


def compare_factor_step(sizes, dtypes, stored, depth, **changes):
    """`dtypes` of weights, gradients, factors and momenta."""
    options = FACTOR_OPTIONS | {"depth": depth} | changes
    weights, gradients = tensors(dtypes[0], sizes, 0, skip=1), tensors(dtypes[1], sizes, 10, skip=1)
    roles = factors(dtypes[2], sizes, 1000, stored, skip=1)
    momenta = None if dtypes[3] is None else [tensors(dtypes[3], sizes, 2000 + 100 * k, skip=1) for k in range(stored)]
    expected, expected_roles = copies(weights), [copies(role) for role in roles]
    expected_momenta = None if momenta is None else [copies(role) for role in momenta]
    unchanged = copies(gradients)
    on_cpu = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    reference_factor.factor_step(expected, copies(gradients), expected_roles, expected_momenta, **on_cpu)
    factor_step.factor_step(weights, gradients, roles, momenta, **options)
    assert_all_as(weights + gradients, expected + unchanged)
    assert_all_as(itertools.chain(*roles, *(momenta or [])), itertools.chain(*expected_roles, *(expected_momenta or [])))


def mixtures():
    for dtype in DTYPES:
        real = torch.float64 if dtype == torch.float64 else torch.float32
        own = dict.fromkeys((dtype, real))  # a set would have another order in each process
        yield from itertools.product([dtype], own, own, (None, *own))


@runs
@pytest.mark.parametrize(("stored", "depth"), [(1, 1), (3, 3), (2, 3), (2, 5), (2, 10)])
@pytest.mark.parametrize("dtypes", list(mixtures()), ids=str)
def test_factor_step_in_any_mixture_of_dtypes(dtypes, stored, depth):
    q = (1, 1.5, 2)[(stored + depth) % 3]
    compare_factor_step([7, 1, 300], dtypes, stored, depth, q=q, coupled_weight_decay=0.003 * (depth != 5))


@runs
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize(("stored", "depth"), [(2, 2), (10, 10), (16, 16), (17, 17), (64, 64), (2, 4), (2, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factor_step_at_any_depth(dtype, stored, depth, momentum):
    compare_factor_step([5, 150], [dtype, dtype, dtype, dtype if momentum else None], stored, depth, maximize=momentum)


@runs
@pytest.mark.parametrize(("stored", "depth"), [(3, 3), (2, 4)])
def test_factor_step_over_several_chunks(stored, depth):
    compare_factor_step([CHUNK, 2 * CHUNK + 3, 5, CHUNK - 1], [torch.float32] * 4, stored, depth)


@runs
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
@pytest.mark.parametrize(("stored", "depth"), [(3, 3), (2, 4)])
def test_factor_step_reads_numbers_on_the_device(stored, depth, found_inf):
    numbers = {
        "lr": torch.tensor(0.1, dtype=torch.float64),
        "grad_scale": torch.tensor([3.0]),
        "found_inf": torch.tensor(found_inf),
    }
    compare_factor_step([70], [torch.float32] * 4, stored, depth, **{name: x.to(DEVICE) for name, x in numbers.items()})


MIRROR_OPTIONS = {name: OPTIONS[name] for name in ("lr", "q", "weight_decay", "maximize", "grad_scale", "found_inf")}


def ordinary(dtype, sizes, seed, skip=0):
    """As `tensors`, without infinities and NaN, and so large and so small that nothing overflows or underflows."""
    group = tensors(dtype, sizes, seed, skip=skip)
    for tensor in group:
        tensor.copy_(tensor.nan_to_num_(0.5, 0.5, 0.5).sign() * tensor.abs().clamp(1e-3, 50))
    return group


def increments(x, g, balance, options):
    """The terms of which the change of x is the sum, each in absolute value, summed up."""
    depth, lr, q = options["depth"], options["lr"], options["q"]
    first, rest = reference_mirror.balanced_factors(x.double().cpu(), q, depth, balance)
    first, g = first.abs(), g.double().cpu().abs() / options["grad_scale"]
    kept = lr * options["weight_decay"]
    of_first = kept * first + lr * (g * rest ** (depth - 1)) ** (q - 1)
    of_rest = kept * rest + lr * (g * first * rest ** (depth - 2)) ** (q - 1)
    grown = (rest + of_rest) ** (depth - 1)
    return of_first * grown + first * (grown - rest ** (depth - 1))


@runs
@pytest.mark.parametrize("q", [1, 1.5, 2, 1.3])
@pytest.mark.parametrize("depth", [2, 3, 4, 10, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_mirror_step(dtype, depth, q):
    options = MIRROR_OPTIONS | {"depth": depth, "q": q, "lr": 0.01}
    balances = [0.0, 1e-12, 1e-3, 0.2, 1.1]
    sizes = [7, 300, 129, 300, 301]
    weights, gradients = ordinary(dtype, sizes, 0, skip=1), ordinary(dtype, sizes, 10, skip=1)
    on_cpu = torch.tensor(balances, dtype=torch.float64).unbind()
    before, untouched = copies(weights), copies(gradients)
    exact = [w.double().clone() for w in before]
    reference_mirror.mirror_step(exact, [g.double() for g in untouched], on_cpu, **options)
    mirror_step.mirror_step(weights, gradients, torch.tensor(balances, dtype=torch.float64, device=DEVICE).unbind(), **options)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    for w, x, g, balance, wanted in zip(weights, before, untouched, balances, exact, strict=True):
        # The definition subtracts two products of the size of x.
        own = 4 * depth * EPS[torch.float64] * x.double().abs() + torch.finfo(dtype).tiny
        rounding = 1.01 * EPS[dtype] * torch.maximum(wanted.abs(), w.double().cpu().abs())
        bound = rounding + own + EPS[real] * MIRROR_ROUNDINGS * depth * increments(x, g, balance, options)
        assert bool(((w.double().cpu() - wanted).abs() <= bound).all())
        assert_surroundings_kept(w)
    assert_all_as(gradients, untouched)
