"""The oldest versions that pyproject.toml takes: numba's kernels and the theory, with them."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCH = "torch"  # its oldest version would be a gigabyte
SEEN = ["tests/test_self_check.py", "tests/test_theory.py", "tests/test_steepest_step.py"]


def oldest():
    """numba==0.62.0 and the like."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return [f"{name}=={bound}.0" for name, bound in (entry.split(">=") for entry in wanted) if name != TORCH]


@pytest.mark.slow
def test_the_oldest_versions_serve(tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path), *oldest()]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    names = [entry.split("==")[0] for entry in oldest()]
    script = f"import importlib.metadata as m; print(*(m.version(name) for name in {names}))"
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=environment)
    assert found.stdout.split() == [entry.split("==")[1] for entry in oldest()]
    chosen = [*SEEN, "-k", "numba or theory", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *chosen], cwd=ROOT, capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:]
