"""What can be known of the CUDA kernels without a GPU: their machine code, read with the cuobjdump of Triton's package."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from pysteep._dispatch import extension

ARCHITECTURES = [name for name in (extension.cuda_architectures() if extension is not None else []) if name.startswith("sm_")]
STEP = re.compile(r"steepest_step_kernelILNS.*?PowerE(?P<power>\d)E(?P<types>.*)EEvNS")
PRODUCT = re.compile(r"factor_product_kernelI.*?\d(?P<op>Forward|Backward|DoubleBackward)I\w+?(?:Li(?P<factors>\d+)E)?EEEv")
FACTOR_STEP = re.compile(r"factor_step_kernelI(?P<types>.*?)Li(?P<factors>\d+)ELb(?P<rounds>[01])EEEv")

pytestmark = pytest.mark.skipif(not ARCHITECTURES, reason="the extension was built without CUDA")


def cuobjdump(*arguments: str) -> str:
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("triton, which brings cuobjdump, is not installed")
    tool = Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *arguments, extension.__file__], capture_output=True, text=True, check=True).stdout


@functools.cache
def instructions(architecture: str) -> dict[str, Counter[str]]:
    """Instruction counts by mangled kernel name."""
    kernels: dict[str, Counter[str]] = {}
    counts: Counter[str] = Counter()
    for line in cuobjdump("-sass", "-arch", architecture).splitlines():
        if "Function : " in line:
            counts = kernels.setdefault(line.split("Function : ")[1].strip(), Counter())
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
            counts[found[1]] += 1
    return kernels


def test_no_kernel_spills():
    report = cuobjdump("--dump-resource-usage")
    usage = re.findall(r"STACK:(\d+) .*?LOCAL:(\d+)", report)
    # steepest_step and its power sum; factor_product; factor_step; mirror_step; diagonal_flow; sign_vote. The second of each
    # pair are those that round.
    assert len(usage) == (80 + 24 + 20 + 24 + 8 + 2 + 1 + 2 + 8) * len(ARCHITECTURES)
    assert set(usage) == {("0", "0")}


def wide(counts: Counter[str], kind: str) -> int:
    """How many accesses of 16 bytes there are: LDG, loads, or STG, stores."""
    return sum(n for op, n in counts.items() if op.startswith(kind) and ".128" in op)


def fused(counts: Counter[str], kind: str) -> int:
    return sum(n for op, n in counts.items() if op.startswith(kind))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_accesses_of_16_bytes_and_no_contraction(architecture):
    steps = {name: counts for name, counts in instructions(architecture).items() if "steepest_step_kernel" in name}
    assert len(steps) == 64  # 4 powers, 16 combinations of dtypes
    for name, counts in steps.items():
        found = STEP.search(name)
        assert found, name
        has_momentum = "4None" not in found["types"]
        vectors = 2 if has_momentum else 4  # in flight for each operand
        assert wide(counts, "LDG") >= vectors * (3 if has_momentum else 2), name
        assert wide(counts, "STG") >= vectors * (2 if has_momentum else 1), name
        assert not any(op.startswith(("LDL", "STL")) for op in counts), name
        if found["power"] in "02":  # at q = 1.5 and at general q the root and the power are made of fused operations
            assert not fused(counts, "FFMA"), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rounded_step(architecture):
    steps = {name: counts for name, counts in instructions(architecture).items() if "rounded_step_kernel" in name}
    assert len(steps) == 12  # combinations of dtypes with weights of 16 bits
    for name, counts in steps.items():
        has_momentum = "4None" not in name
        vectors = 2 if has_momentum else 4
        assert wide(counts, "LDG") >= vectors * (4 if has_momentum else 3), name
        assert wide(counts, "STG") >= vectors * (3 if has_momentum else 2), name
        assert not any(op.startswith(("LDL", "STL")) for op in counts), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_factor_product(architecture):
    products = {name: counts for name, counts in instructions(architecture).items() if "factor_product_kernel" in name}
    assert len(products) == 20  # 4 dtypes; forward, and both derivatives for few factors and for many
    for name, counts in products.items():
        found = PRODUCT.search(name)
        assert found, name
        factors = int(found["factors"] or 4)  # in flight
        loads, stores = {
            "Forward": (factors, 1),
            "Backward": (factors + 1, factors),
            "DoubleBackward": (2 * factors + 1, factors + 1),
        }[found["op"]]
        assert wide(counts, "LDG") >= loads, name
        assert wide(counts, "STG") >= stores, name
        assert not any(op.startswith(("LDL", "STL", "FFMA", "DFMA")) for op in counts), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_factor_step(architecture):
    fused_operations: dict[str, set[int]] = {}
    steps = {name: counts for name, counts in instructions(architecture).items() if "factor_step_kernel" in name}
    # 4 dtypes of the factors, with momentum and without, 3 numbers of factors in flight; of those that round 2, 2 and 2.
    assert len(steps) == 24 + 8
    for name, counts in steps.items():
        found = FACTOR_STEP.search(name)
        assert found, name
        without = "4None" in found["types"]
        operands = int(found["factors"]) * ((1 if without else 2) + int(found["rounds"]))
        assert wide(counts, "LDG") >= operands, name
        assert wide(counts, "STG") >= operands, name
        assert not any(op.startswith(("LDL", "STL")) for op in counts), name
        dtype = re.search("bfloat16|float16|^[fd]", found["types"])
        assert dtype, name
        fused_operations.setdefault(dtype[0] + found["factors"] + found["rounds"], set()).add(fused(counts, "FFMA"))
    # Every kernel has the power for any q, which is made of fused operations. Momentum, products and sums, adds none.
    assert len(fused_operations) == 12 + 4
    assert all(len(counts) == 1 for counts in fused_operations.values()), fused_operations


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mirror_step(architecture):
    steps = {name: counts for name, counts in instructions(architecture).items() if "mirror_step_kernel" in name}
    assert len(steps) == 3  # one for each compute type, and one that rounds
    for name, counts in steps.items():
        rounds = "Lb1E" in name
        assert wide(counts, "LDG") >= 2 + rounds, name
        assert wide(counts, "STG") >= 1 + rounds, name
        assert not any(op.startswith(("LDL", "STL")) for op in counts), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sign_vote(architecture):
    kernels = {name: counts for name, counts in instructions(architecture).items() if re.search("pack_signs|count_votes", name)}
    assert len(kernels) == 8  # 4 dtypes
    for name, counts in kernels.items():
        vectors = {"f": 2, "d": 4}.get(name.split("kernelI")[1][0], 1)  # that 8 elements fill
        assert wide(counts, "LDG" if "pack_signs" in name else "STG") == vectors, name
        assert not any(op.startswith(("LDL", "STL")) for op in counts), name
