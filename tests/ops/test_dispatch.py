"""Which backend serves, and that it says why."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import pysteep
from pysteep import SteepestDescent
from tests.support.cases import BACKENDS, cpu_homes


def test_backends_by_name():
    step = pysteep.functional.steepest_step
    found = pysteep.backends()
    assert list(found) == ["cuda", "triton", "cpp", "numba", "reference"]
    assert all(backend.reason for backend in found.values())
    assert pysteep.serving("cpu") == next(n for n in ("cpp", "numba", "reference") if found[n].available)
    unavailable = [name for name, backend in found.items() if not backend.available]
    for name in unavailable:
        with pytest.raises(RuntimeError, match=f"backend {name!r} cannot serve here: "):
            SteepestDescent([nn.Parameter(torch.ones(1))], backend=name)
    if "cpp" in BACKENDS:
        with pytest.raises(RuntimeError, match="backend 'cpp' serves cpu tensors, not meta ones"):
            step([torch.ones(2, device="meta")], [torch.ones(2, device="meta")], lr=0.1, backend="cpp")


@pytest.mark.parametrize(("name", "expected"), [("numba", "numba"), ("reference", "reference"), ("fast", "ValueError")])
def test_the_environment_chooses_a_backend(name, expected):
    script = "import pysteep; print(pysteep.serving('cpu'))"
    environment = {**os.environ, "PYSTEEP_BACKEND": name}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert expected in (result.stdout + result.stderr)


@pytest.mark.parametrize(("device", "error"), [("abacus", ValueError), (0, TypeError), (None, TypeError)])
def test_a_device_that_does_not_exist_is_named(device, error):
    with pytest.raises(error, match=f"device must be a torch.device or its name.* not {device!r}"):
        pysteep.serving(device)


def test_the_choice_is_logged_once(caplog):
    from pysteep._ops import dispatch

    dispatch.forget_choices()
    with caplog.at_level("INFO", logger="pysteep"):
        for _ in range(3):
            pysteep.functional.steepest_step([torch.ones(2)], [torch.ones(2)], lr=0.1)
    assert [record.message.split(" are served by ")[0] for record in caplog.records] == ["cpu tensors"]


def test_info_names_every_backend():
    result = subprocess.run([sys.executable, "-m", "pysteep", "info"], capture_output=True, text=True, check=True)
    assert all(f"backend {name}" in result.stdout for name in pysteep.backends())
    assert "PYSTEEP_BACKEND" not in result.stdout or "PYSTEEP_BACKEND" in os.environ
    assert "instruction set" in result.stdout or not any(home.startswith("cpp") for home in cpu_homes())


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("fast", "wrong: PYSTEEP_BACKEND must be one of cuda, triton, cpp, numba, reference, or None; got 'fast'"),
        ("cuda", "wrong: PYSTEEP_BACKEND 'cuda' cannot serve here: "),
        ("reference", "reference"),
    ],
)
def test_info_says_what_is_wrong_with_the_environment(name, row):
    if name in pysteep.backends() and name != "reference" and pysteep.backends()[name].available:
        pytest.skip(f"{name} is available")
    environment = {**os.environ, "PYSTEEP_BACKEND": name}
    command = [sys.executable, "-m", "pysteep", "info"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    (found,) = [line.split(maxsplit=1)[1] for line in result.stdout.splitlines() if line.startswith("PYSTEEP_BACKEND ")]
    assert found.startswith(row)
    assert all(f"backend {backend}" in result.stdout for backend in pysteep.backends())
    assert (result.returncode, result.stderr) == (0 if name == "reference" else 1, "")
