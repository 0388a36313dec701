"""The oldest versions that pyproject.toml takes: numba's kernels and the theory, with them."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH = "torch"  # its oldest version would be a gigabyte
CHECKS = """
import importlib.metadata, sys, torch, pysteep
from pysteep._ops import self_check
print(*(importlib.metadata.version(name) for name in sys.argv[1:]))
found = pysteep.backends()
for family in self_check.CHECKS:
    print(family, self_check.failure(found["numba"], found["reference"], torch.device("cpu"), family))
"""


def oldest():
    """{"numba": "0.62.0"} and the like."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return {name: f"{bound}.0" for name, bound in (entry.split(">=") for entry in wanted) if name != TORCH}


@pytest.mark.slow
def test_the_oldest_versions_serve(tmp_path):
    """Each op and rounding of numba gives the results of the definition; the theory has its digits."""
    versions = oldest()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", tmp_path]
    subprocess.run([*pip, *(f"{name}=={version}" for name, version in versions.items())], check=True, capture_output=True)

    def run(*command):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    found, *checks = run("-c", CHECKS, *versions).splitlines()
    assert found.split() == list(versions.values())
    assert len(checks) == 8
    assert all(len(check.split()) == 1 for check in checks), checks
    run("-m", "pytest", "tests/theory/test_theory.py", "-q", "-p", "no:xdist", "-p", "no:cacheprovider")
