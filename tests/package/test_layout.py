"""Every op has all its homes under one name, importing the package is cheap, and generated files are up to date."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPS = re.search(r"set\(PYSTEEP_OPS ([\w ]+)\)", (ROOT / "CMakeLists.txt").read_text())[1].split()
HOMES = (
    "kernels/reference/{op}.py",
    "kernels/numba/{op}.py",
    "kernels/triton/{op}.py",
    "csrc/include/pysteep/{op}.h",
    "csrc/math/{op}.h",
    "csrc/cpu/{op}.cpp",
    "csrc/cuda/{op}.cu",
    "csrc/python/{op}.cpp",
    "tests/ops/test_{op}.py",
)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("home", HOMES)
def test_every_op_has_every_home(op, home):
    assert (ROOT / home.format(op=op)).is_file()


@pytest.mark.parametrize("home", ["csrc/cuda/{op}.cu", "csrc/include/pysteep/{op}.h"])
def test_every_home_belongs_to_an_op(home):
    shared = {"tensors", "rounding"}
    names = {path.stem for path in ROOT.glob(home.format(op="*"))}
    assert names - shared == set(OPS)


def test_importing_compiles_nothing():
    script = "import pysteep, sys; print([name for name in ('numba', 'triton', 'llvmlite') if name in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert finished.stdout == "[]\n"


def test_generated_coefficients_are_up_to_date():
    subprocess.run([sys.executable, ROOT / "tools" / "power_coefficients.py", "--check"], check=True)
