"""What no caller should pass raises or works, in a process of its own: a crash would end it and name the case."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.support.cases import BACKENDS

# numba compiles each op for minutes; what comes before its kernels is the same.
RUNS = [pytest.param(name, marks=pytest.mark.slow) if name == "numba" else name for name in BACKENDS]


@pytest.mark.parametrize("backend", [*RUNS, *(["csrc"] if "cpp" in BACKENDS else [])])
def test_hostile_arguments(backend):
    command = [sys.executable, "-m", "tests.support.hostile_cases", backend]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = process.stdout.splitlines()
    if process.returncode < 0:
        pytest.fail(f"{lines[-1]} ended the process by {signal.Signals(-process.returncode).name}\n{process.stderr}")
    assert process.returncode == 0, process.stdout + process.stderr
    assert len(lines) >= 3
