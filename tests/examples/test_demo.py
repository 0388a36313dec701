"""The demo as a user runs it: a subprocess, its exit code, its table and its file."""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pysteep._demo import depth as _demo_depth
from pysteep._demo import geometry
from pysteep._ops import dispatch

pytest.importorskip("sklearn")
image = pytest.importorskip("matplotlib.image")

COMMAND = [sys.executable, "-m", "pysteep", "demo"]
METHODS = ("SGD", "SGD, tuned", "Adam", "sign descent (q=1)", "steepest, q=1.25", "steepest, q=1.5")


def demo(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, encoding="utf-8", timeout=300)


def accuracies(output: str) -> dict[str, float]:
    """Method name -> test accuracy in percent, read from the printed table."""
    return {name.strip(): float(value) for name, value in re.findall(r"^(\S.*?)  +[\d.]+ +([\d.]+) %", output, re.MULTILINE)}


def block(output: str, heading: str) -> list[tuple[str, list[float]]]:
    """Names and numbers of the printed table whose first row starts with `heading`."""
    _, after = output.split(f"\n{heading}", maxsplit=1)
    rows = after.split("\n\n")[0].splitlines()[2:]
    return [(name, [float(cell) for cell in cells]) for name, *cells in (re.split(" {2,}", row) for row in rows)]


def test_quick_run_prints_the_tables_and_writes_the_figure(tmp_path):
    finished = demo("--quick", "--output", tmp_path / "new" / "folder")
    assert finished.returncode == 0, finished.stderr
    measured = accuracies(finished.stdout)
    assert tuple(measured) == METHODS
    assert measured["sign descent (q=1)"] > measured["SGD"]
    assert measured["SGD, tuned"] > measured["SGD"]
    losses = block(finished.stdout, "training loss")
    assert [name for name, _ in losses] == ["gradient descent (q=2)", "gradient descent (q=2)", "sign descent (q=1)"]
    small, large, sign = (numbers[1] for _, numbers in losses)
    assert small > 2.3
    assert large > 2.3, "gradient descent does not leave the saddle in 200 steps"
    assert sign < 2.25
    pruned = block(finished.stdout, "weights removed (%)")
    assert [name for name, _ in pruned] == ["depth 1", 'depth 3, init="identity"', 'depth 3, init="balanced"']
    for _, (lr, decay, *accuracy) in pruned:
        assert (lr, decay) in _demo_depth.SWEEP
        assert len(accuracy) == len(_demo_depth.REMOVED)
        assert accuracy[0] > 70
        assert accuracy[-1] < 30
    assert "Backend that served SteepestDescent on cpu: " in finished.stdout
    (figure,) = (tmp_path / "new" / "folder").iterdir()
    assert figure.name == "demo.png"
    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    height, width, _ = image.imread(figure).shape
    assert (height, width) == (1720, 1800)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for a single child process")
def test_interrupt_leaves_no_file(tmp_path):
    # A child inherits an ignored SIGINT (a shell's background job), but not a handler.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        arguments = ["--quick", "--seeds", "99", "--output", str(tmp_path)]
        child = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, previous)
    seen = b""
    # Past pretraining the lazy imports are over: CPython reports death by SIGINT, even of a caught one, if it fell into exec().
    while b"SGD" not in seen:
        chunk = child.stderr.read1()
        assert chunk, seen.decode()
        seen += chunk
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=120)
    assert child.returncode == 130
    assert error.decode().splitlines()[-1] == "pysteep demo: interrupted, no half-written file left behind"
    assert b"Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_write_cut_short_keeps_the_old_file(tmp_path):
    path = tmp_path / "demo.png"
    path.write_bytes(b"old")

    def cut_short(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        geometry.write_atomically(path, cut_short)
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("demo.png", b"old")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            ([f"--seeds={value}"], f"argument --seeds: {value!r} is not allowed, give a whole number from 1 up")
            for value in ("0", "-1", "2.5", "many")
        ),
        (["--device", "abacus"], "argument --device: 'abacus' is not allowed, this machine has cpu"),
        (["--output", __file__], f"argument --output: {__file__!r} is not allowed, give a folder to write to (File exists)"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    parser = argparse.ArgumentParser()
    geometry.add_arguments(parser)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("module", ["sklearn", "matplotlib"])
def test_a_missing_package_is_named(module, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    assert geometry.main(["--quick", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"pysteep demo: {module} is not installed; pip install pysteep[demo]\n"


def test_a_backend_that_does_not_exist_is_named(monkeypatch, capsys, tmp_path):
    dispatch.forget_choices()
    monkeypatch.setenv("PYSTEEP_BACKEND", "fast")
    try:
        assert geometry.main(["--quick", "--output", str(tmp_path)]) == 2
    finally:
        dispatch.forget_choices()
    assert capsys.readouterr().err.startswith("pysteep demo: PYSTEEP_BACKEND must be one of cuda, triton, cpp, numba")
    assert not list(tmp_path.iterdir())


def test_interval_is_students():
    mean, half = geometry.mean_and_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(2.7764451 * (2.5 / 5) ** 0.5)
    assert geometry.mean_and_interval([7.0]) == (7.0, None)


@pytest.mark.parametrize("removed", [0.0, 50.0, 99.9, 100.0])
def test_pruning_removes_the_smallest_of_all_matrices_together(removed):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 50), nn.ReLU(), nn.Linear(50, 10))
    with torch.no_grad():
        model[2].weight.mul_(10)
        model[0].weight[:, :3] = 0.01  # equal ones, too, are removed one by one
    sizes = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).abs()
    biases = [model[0].bias.clone(), model[2].bias.clone()]
    _demo_depth.prune(model, removed)
    left = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).abs()
    count = round(removed / 100 * 2000)
    assert left.count_nonzero() == 2000 - count
    assert torch.equal(left.sort().values[count:], sizes.sort().values[count:])
    assert all(torch.equal(layer.bias, bias) for layer, bias in zip((model[0], model[2]), biases, strict=True))


def test_the_sweep_prefers_sparsity_only_among_the_well_trained():
    curves = {(1e-3, 0.1): [96.0, 50.0], (1e-3, 0.3): [95.5, 60.0], (3e-3, 1.0): [90.0, 80.0]}
    assert _demo_depth.chosen(curves) == (1e-3, 0.3)


def test_the_saddle_is_one_of_depth():
    """At x = 0 the loss is log 10 at any depth; one small step then goes far at depth 1 only."""
    data = _demo_depth.load(torch.device("cpu"))
    descent = _demo_depth.DESCENTS[1]
    deep, flat = (_demo_depth.leave_saddle(descent, depth, data, 1, lambda: None) for depth in (3, 1))
    assert deep[0] == flat[0] == pytest.approx(torch.log(torch.tensor(10.0)).item())
    assert flat[0] - flat[1] > 100 * (deep[0] - deep[1]) > 0
