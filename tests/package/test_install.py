"""`pip install .` offline, on a machine without a compiler and on one without nvcc: what is built, and that it takes a step."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILDERS = ("cmake", "ninja")
ASKED_FOR = (sysconfig.get_config_var("CXX") or "c++").split()[0]  # by Python's own build: x86_64-linux-gnu-g++ on Debian
COMPILERS = tuple(dict.fromkeys(("c++", "g++", "clang++", ASKED_FOR)))
BINARY_UTILITIES = ("ar", "as", "ld", "ranlib", "strip")

STEP = """
import sys
from pathlib import Path
import torch
import pysteep
folder, backend = sys.argv[1:]
assert Path(pysteep.__file__).is_relative_to(folder), pysteep.__file__
assert pysteep.serving("cpu") == backend
if backend == "cpp":
    assert pysteep._csrc.cuda_architectures() == []
weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((), (7,), (33, 1001))]
before = [weight.detach().clone() for weight in weights]
for weight in weights:
    weight.grad = torch.randn_like(weight)
pysteep.SteepestDescent(weights, lr=0.125, q=1.0).step()
for weight, old in zip(weights, before, strict=True):
    assert torch.equal(weight, old - 0.125 * weight.grad.sign())
"""


def environment(programs: Path, **variables: str) -> dict[str, str]:
    """Of the caller's environment only what says where things lie; of its programs only those in `programs`."""
    kept = {name: os.environ[name] for name in ("HOME", "LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
    return {**kept, "PATH": str(programs), **variables}


def install(folder: Path, *names: str) -> str:
    """Install the source tree into folder/site where only the programs `names` can be found; returns what pip said."""
    programs = folder / "programs"
    programs.mkdir()
    for name in names:
        if (path := shutil.which(name)) is not None:
            (programs / name).symlink_to(path)
    options = ["--no-index", "--no-build-isolation", "--no-deps", "--verbose", "--target", str(folder / "site")]
    finished = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(ROOT)],
        env=environment(programs),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


def step(folder: Path, backend: str) -> None:
    """Run STEP on the package in folder/site. -S and -P keep an editable install and the source tree out of the way."""
    others = [path for path in sys.path if path and Path(path).resolve() not in (ROOT, ROOT / "tests")]
    finished = subprocess.run(
        [sys.executable, "-P", "-S", "-c", STEP, str(folder / "site"), backend],
        env=environment(folder / "programs", PYTHONPATH=os.pathsep.join([str(folder / "site"), *others])),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    assert finished.returncode == 0, finished.stdout


def extensions(folder: Path) -> list[Path]:
    return [path for path in (folder / "site" / "pysteep").glob("_csrc*") if path.suffix != ".pyi"]


@pytest.mark.slow
def test_without_a_compiler_the_wheel_is_pure_and_numba_steps(tmp_path):
    output = install(tmp_path, *BUILDERS)
    assert "without its C++ extension" in output
    assert extensions(tmp_path) == []
    (wheel,) = (tmp_path / "site").glob("pysteep-*.dist-info/WHEEL")
    assert "Tag: py3-none-any" in wheel.read_text().splitlines()
    step(tmp_path, "numba")


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler")
def test_without_nvcc_the_extension_is_built_for_the_cpu(tmp_path):
    install(tmp_path, *BUILDERS, *COMPILERS, *BINARY_UTILITIES)
    assert len(extensions(tmp_path)) == 1
    assert (tmp_path / "site" / "pysteep" / "py.typed").exists()
    assert (tmp_path / "site" / "pysteep" / "_csrc.pyi").exists()
    step(tmp_path, "cpp")
