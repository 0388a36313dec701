"""What can be known of the CUDA kernels without a GPU: their machine code, read with the cuobjdump of Triton's package."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from pysteep._dispatch import extension

ARCHITECTURES = [name for name in (extension.cuda_architectures() if extension is not None else []) if name.startswith("sm_")]
STEP = re.compile(r"steepest_step_kernelILNS.*?PowerE(?P<power>\d)E(?P<types>.*)EEvNS")

pytestmark = pytest.mark.skipif(not ARCHITECTURES, reason="the extension was built without CUDA")


def cuobjdump(*arguments: str) -> str:
    spec = importlib.util.find_spec("triton")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("triton, which brings cuobjdump, is not installed")
    tool = Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *arguments, extension.__file__], capture_output=True, text=True, check=True).stdout


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
    assert len(usage) >= 80 * len(ARCHITECTURES)
    assert set(usage) == {("0", "0")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_accesses_of_16_bytes_and_no_contraction(architecture):
    steps = {name: counts for name, counts in instructions(architecture).items() if "steepest_step_kernel" in name}
    assert len(steps) == 64  # 4 powers, 16 combinations of dtypes
    for name, counts in steps.items():
        found = STEP.search(name)
        assert found, name
        has_momentum = "4None" not in found["types"]
        vectors = 2 if has_momentum else 4  # in flight for each operand
        wide = {kind: sum(n for op, n in counts.items() if op.startswith(kind) and ".128" in op) for kind in ("LDG", "STG")}
        assert wide["LDG"] >= vectors * (3 if has_momentum else 2), (name, wide)
        assert wide["STG"] >= vectors * (2 if has_momentum else 1), (name, wide)
        assert not any(op.startswith(("LDL", "STL")) for op in counts), name
        if found["power"] in "02":  # at q = 1.5 and at general q the root and the power are made of fused operations
            assert not any(op.startswith("FFMA") for op in counts), name
