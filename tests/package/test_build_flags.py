"""CXXFLAGS and LDFLAGS of the environment against the project's rounding: its own flags win, and the process keeps its mode."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROBE = """
#include "math/portable.h"
extern "C" __attribute__((visibility("default"))) float sum_less_first(float a, float b) { return (a + b) - a; }
extern "C" __attribute__((visibility("default"))) int is_itself(float a) { return a == a; }
extern "C" __attribute__((visibility("default"))) double tenth() { return 0.1; }
extern "C" __attribute__((visibility("default"))) float product_less(float a, float b, float c) { return a * b - c; }
"""

CHECK = """
import ctypes, sys
import torch
subnormal = torch.full((8,), 1e-39)
probe = ctypes.CDLL(sys.argv[1])
assert (subnormal * 1.0 != 0).all(), "loading it makes this process flush subnormal numbers"
probe.sum_less_first.restype = probe.product_less.restype = ctypes.c_float
probe.tenth.restype = ctypes.c_double
real = ctypes.c_float
assert probe.sum_less_first(real(1e8), real(1.0)) == 0.0, "sums in another order"
assert probe.is_itself(real(float("nan"))) == 0, "no NaN expected"
assert probe.tenth() == 0.1, "constants in single precision"
assert probe.product_less(real(1 + 2**-12), real(1 + 2**-12), real(1 + 2**-11)) == 0.0, "a product fused into a sum"
"""

PARTS = "-funsafe-math-optimizations -fassociative-math -freciprocal-math -ffinite-math-only -fno-signed-zeros"


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("ninja")), reason="no cmake and ninja")
@pytest.mark.parametrize("flags", ["-ffast-math -march=native", "-Ofast -flto", PARTS])
@pytest.mark.parametrize("build_type", ["Release", "None"])
def test_flags_of_the_environment_do_not_change_rounding(tmp_path, flags, build_type):
    """A probe that is compiled and linked with the commands that the project's CMake makes for the extension."""
    pybind11 = pytest.importorskip("pybind11")
    environment = {**os.environ, "CXXFLAGS": flags, "LDFLAGS": flags}
    defined = [f"-DCMAKE_BUILD_TYPE={build_type}", f"-DPython_EXECUTABLE={sys.executable}", "-DPYSTEEP_CUDA=OFF"]
    defined.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    run(["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", *defined], environment)
    commands = run(["ninja", "-C", str(tmp_path), "-t", "commands", "_csrc"], environment).splitlines()
    (compiled,) = (line for line in commands if line.endswith("csrc/cpu/isa.cpp"))
    (linked,) = (line for line in commands if " -shared " in line or " -bundle " in line)
    (tmp_path / "probe.cpp").write_text(PROBE)
    words = compiled.split()
    words[words.index("-o") + 1], words[-1] = "probe.o", "probe.cpp"
    subprocess.run(words, cwd=tmp_path, check=True)
    linked = linked.split(" && ")[1]
    words = [word for word in linked.split() if not word.endswith(".o")]
    words[words.index("-o") + 1] = "probe.so"
    subprocess.run([*words, "probe.o"], cwd=tmp_path, check=True)
    run([sys.executable, "-c", CHECK, str(tmp_path / "probe.so")], dict(os.environ))


def run(command, environment):
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    assert finished.returncode == 0, finished.stdout
    return finished.stdout
