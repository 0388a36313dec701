"""What can be known of the CUDA kernels without a GPU: their machine code, read with the cuobjdump of Triton's package."""

from __future__ import annotations

import json
import re

import pytest

from bench.gpu import gpu_code
from bench.gpu.gpu_code import LLAMA_8B, MANY_TINY, cuda_launches, of_extension, readable
from bench.gpu.gpu_machine_code import MACHINES, Kernel, cuobjdump
from bench.measure.works import RESNET50
from pysteep._ops.dispatch import extension

ARCHITECTURES = [name for name in (extension.cuda_architectures() if extension is not None else []) if name.startswith("sm_")]
STEP = re.compile(r"steepest_step_kernelILNS.*?PowerE(?P<power>\d)E(?P<types>.*)EEvNS")
PRODUCT = re.compile(r"factor_product_kernelI.*?\d(?P<op>Forward|Backward|DoubleBackward)I\w+?(?:Li(?P<factors>\d+)E)?EEEv")
FACTOR_STEP = re.compile(r"factor_step_kernelI(?P<types>.*?)Li(?P<factors>\d+)ELb(?P<rounds>[01])EEEv")
H100_BYTES = 15 << 10  # that a multiprocessor must have asked for, so that memory is busy: bench/gpu/gpu_code.py

pytestmark = [
    pytest.mark.skipif(not ARCHITECTURES, reason="the extension was built without CUDA"),
    pytest.mark.skipif(cuobjdump() is None, reason="triton, which brings cuobjdump, is not installed"),
]


def chosen(architecture: str, pattern: str) -> dict[str, Kernel]:
    return {name: kernel for name, kernel in of_extension(architecture).items() if re.search(pattern, name)}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills(architecture):
    found = of_extension(architecture)
    # steepest_step and its power sum; factor_product; factor_step; mirror_step; diagonal_flow; sign_vote. The second of each
    # pair are those that round.
    assert len(found) == 80 + 24 + 20 + 24 + 8 + 2 + 1 + 2 + 8
    for name, kernel in found.items():
        assert (kernel.stack, kernel.local, kernel.count("LDL", "STL")) == (0, 0, 0), name


@pytest.mark.parametrize("architecture", sorted({f"sm_{number}" for number in MACHINES} & set(ARCHITECTURES)))
def test_a_multiprocessor_asks_for_enough_bytes_at_a_time(architecture):
    """So many that an H100's memory is busy. Left out: what rounding or float64 arithmetic takes longer for than memory."""
    for name, kernel in chosen(architecture, "step_kernel|factor_product").items():
        if "float64" not in readable(name) and "Lb1E" not in name:
            warps = MACHINES[int(architecture[3:])].resident_warps(kernel, 256)
            assert warps * 32 * kernel.bytes_in_flight() >= H100_BYTES, readable(name)


def test_launches_of_a_step():
    assert [cuda_launches(work, 2) for work in (LLAMA_8B, RESNET50, MANY_TINY)] == [1, 1, 6]
    assert cuda_launches(LLAMA_8B, 3) <= 4


def test_the_table_has_every_kernel(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_code, "triton_rows", lambda _: [])  # test_triton.py compiles those
    architecture = ARCHITECTURES[-1][3:] if ARCHITECTURES[-1][3:] in map(str, MACHINES) else "90"
    assert gpu_code.main(["--output", str(tmp_path / "code.md"), "--architectures", architecture]) == 0
    report = json.loads((tmp_path / "code.json").read_text())
    rows = report["kernels"][f"CUDA, sm_{architecture}"]
    assert len({row["kernel"] for row in rows}) == len(rows) == len(of_extension(f"sm_{architecture}"))
    assert len(report["launches"]) == 6
    for row in rows:
        assert f"| {row['kernel']} | {row['registers']} |" in (tmp_path / "code.md").read_text()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_accesses_of_16_bytes_and_no_contraction(architecture):
    steps = chosen(architecture, "steepest_step_kernel")
    assert len(steps) == 64  # 4 powers, 16 combinations of dtypes
    for name, kernel in steps.items():
        found = STEP.search(name)
        assert found, name
        has_momentum = "4None" not in found["types"]
        vectors = 2 if has_momentum else 4  # in flight for each operand
        assert kernel.wide("LDG") >= vectors * (3 if has_momentum else 2), name
        assert kernel.wide("STG") >= vectors * (2 if has_momentum else 1), name
        if found["power"] in "02":  # at q = 1.5 and at general q the root and the power are made of fused operations
            assert not kernel.count("FFMA"), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rounded_step(architecture):
    steps = chosen(architecture, "rounded_step_kernel")
    assert len(steps) == 12  # combinations of dtypes with weights of 16 bits
    for name, kernel in steps.items():
        has_momentum = "4None" not in name
        vectors = 2 if has_momentum else 4
        assert kernel.wide("LDG") >= vectors * (4 if has_momentum else 3), name
        assert kernel.wide("STG") >= vectors * (3 if has_momentum else 2), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_factor_product(architecture):
    products = chosen(architecture, "factor_product_kernel")
    assert len(products) == 20  # 4 dtypes; forward, and both derivatives for few factors and for many
    for name, kernel in products.items():
        found = PRODUCT.search(name)
        assert found, name
        factors = int(found["factors"] or 4)  # in flight
        loads, stores = {
            "Forward": (factors, 1),
            "Backward": (factors + 1, factors),
            "DoubleBackward": (2 * factors + 1, factors + 1),
        }[found["op"]]
        assert kernel.wide("LDG") >= loads, name
        assert kernel.wide("STG") >= stores, name
        assert not kernel.count("FFMA", "DFMA"), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_factor_step(architecture):
    fused_operations: dict[str, set[int]] = {}
    steps = chosen(architecture, "factor_step_kernel")
    # 4 dtypes of the factors, with momentum and without, 3 numbers of factors in flight; of those that round 2, 2 and 2.
    assert len(steps) == 24 + 8
    for name, kernel in steps.items():
        found = FACTOR_STEP.search(name)
        assert found, name
        without = "4None" in found["types"]
        operands = int(found["factors"]) * ((1 if without else 2) + int(found["rounds"]))
        assert kernel.wide("LDG") >= operands, name
        assert kernel.wide("STG") >= operands, name
        dtype = re.search("bfloat16|float16|^[fd]", found["types"])
        assert dtype, name
        fused_operations.setdefault(dtype[0] + found["factors"] + found["rounds"], set()).add(kernel.count("FFMA"))
    # Every kernel has the power for any q, which is made of fused operations. Momentum, products and sums, adds none.
    assert len(fused_operations) == 12 + 4
    assert all(len(counts) == 1 for counts in fused_operations.values()), fused_operations


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mirror_step(architecture):
    steps = chosen(architecture, "mirror_step_kernel")
    assert len(steps) == 3  # one for each compute type, and one that rounds
    for name, kernel in steps.items():
        rounds = "Lb1E" in name
        assert kernel.wide("LDG") >= 2 + rounds, name
        assert kernel.wide("STG") >= 1 + rounds, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sign_vote(architecture):
    kernels = chosen(architecture, "pack_signs|count_votes")
    assert len(kernels) == 8  # 4 dtypes
    for name, kernel in kernels.items():
        vectors = {"f": 2, "d": 4}.get(name.split("kernelI")[1][0], 1)  # that 8 elements fill
        assert kernel.wide("LDG" if "pack_signs" in name else "STG") == vectors, name
