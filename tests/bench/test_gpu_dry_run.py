"""`make gpu-check` from end to end on a machine with a pretended GPU: each piece succeeds, fails and takes too long."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bench.gpu import gpu_check
from pysteep import backends

ROOT = gpu_check.ROOT
MACHINE = ROOT / "tests" / "support" / "pretended_machine"
PIECES = [*gpu_check.LIMITS, "memcheck", "racecheck"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not backends()["cpp"].available, reason="the extension is not built"),
]


def check(
    folder: Path, pieces: list[str], *options: str, path: Path | None = None, trouble: str = ""
) -> tuple[int, dict[str, str]]:
    """The exit code and each piece's outcome; what the archive holds is put into `folder`/results."""
    environment = {
        "PATH": str(path) if path else os.pathsep.join([str(MACHINE / "bin"), os.environ["PATH"]]),
        "HOME": str(folder),
        "PYTHONPATH": str(MACHINE),
        "PYTEST_PLUGINS": "pretended_tests",
        "PRETENDED_TROUBLE": trouble,
        "OMP_WAIT_POLICY": "passive",
    }
    archive = folder / "archive.tar.gz"
    where = ["--output", str(folder / "made" / "results"), "--archive", str(archive), "--build", str(folder / "build")]
    command = [sys.executable, str(ROOT / "bench" / "gpu" / "gpu_check.py"), "--pieces", ",".join(pieces), "--scale", "2e-5"]
    done = subprocess.run(
        [*command, *where, *options], env=environment, capture_output=True, text=True, check=False, cwd=folder
    )
    print(done.stdout, done.stderr)  # shown where an assertion fails
    with tarfile.open(archive) as file:
        for member in file:
            if member.isfile():
                path = folder / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.extractfile(member).read())
    lines = (folder / "results" / "outcomes.txt").read_text().splitlines()
    outcomes = dict(line.split(maxsplit=1) for line in lines)  # those of an earlier run too
    return done.returncode, {piece: outcomes[piece] for piece in outcomes if piece in pieces}


@pytest.mark.parametrize(
    ("piece", "fewest", "most"), [("cuda", 300, 1000), ("triton", 300, 1000), ("memcheck", 20, 40), ("racecheck", 8, 16)]
)
def test_pieces_choose_their_tests(piece, fewest, most, tmp_path):
    command = gpu_check.command(piece, gpu_check.Places(tmp_path, tmp_path))
    command = [*command[command.index(sys.executable) :], "--collect-only", "-p", "no:xdist"]
    command = [word for word in command if word not in ("-n", str(gpu_check.WORKERS), "--dist", "loadgroup")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    chosen = [line for line in done.stdout.splitlines() if "::" in line]
    assert done.returncode == 0, done.stdout
    assert fewest <= len(chosen) <= most
    assert {"triton" in name for name in chosen} == {piece == "triton"}


def test_every_piece_succeeds(tmp_path):
    code, outcomes = check(tmp_path, PIECES)
    assert list(outcomes) == PIECES
    assert {name: outcome for name, outcome in outcomes.items() if not outcome.startswith("ok, ")} == {}
    assert code == 0
    results = tmp_path / "results"
    assert {path.name for path in results.iterdir()} >= {"bars.json", "bars.md", "times.json", "counters.md", "versions.txt"}
    for piece in ("cuda", "triton", "memcheck", "racecheck"):
        assert " passed" in (results / f"{piece}.log").read_text(), piece
    for home in ("cuda", "triton"):
        assert f"one tensor, float32, q = 1, {home}: share of the copy" in (results / "bars.md").read_text()
        assert f"| {home} | 1.000 | 2.00 |" in (results / "counters.md").read_text()
    assert not list((tmp_path / "made" / "results").glob("*/")), "what is built lies elsewhere"


def test_every_piece_fails(tmp_path):
    assert check(tmp_path, ["build"])[0] == 0
    for pieces in (PIECES[1:], PIECES[:1]):  # without what a build leaves no other piece runs
        code, outcomes = check(tmp_path, pieces, trouble="wrong")
        assert code == 1
        assert {name: outcome for name, outcome in outcomes.items() if not outcome.startswith("FAILED with exit code")} == {}
        for piece in pieces:
            log = (tmp_path / "results" / f"{piece}.log").read_text()
            assert ("no such option" if piece == "build" else "found garbage") in log, piece


def test_every_piece_takes_too_long(tmp_path):
    assert check(tmp_path, ["build"])[0] == 0
    for pieces in (PIECES[1:], PIECES[:1]):
        code, outcomes = check(tmp_path, pieces, "--at-most", "5", trouble="slow")
        assert code == 1
        assert {name: outcome for name, outcome in outcomes.items() if "FAILED: not done after 5 s" not in outcome} == {}
        for piece in {*pieces} & {"cuda", "triton", "memcheck", "racecheck"}:
            assert "KeyboardInterrupt" in (tmp_path / "results" / f"{piece}.log").read_text(), piece


def test_a_machine_with_nothing_but_python(tmp_path):
    """No git, no compiler, no ncu and no compute-sanitizer."""
    path = tmp_path / "bin"
    path.mkdir()
    (path / "env").symlink_to(shutil.which("env"))
    pieces = ["build", "time-cuda", "counters", "memcheck"]
    code, outcomes = check(tmp_path, pieces, path=path)
    assert code == 0
    assert [outcome.split(",")[0] for outcome in outcomes.values()] == [
        "ok",
        "ok",
        "not run: ncu is not installed",
        "not run: compute-sanitizer is not installed",
    ]
    versions = (tmp_path / "results" / "versions.txt").read_text()
    assert "commit: unknown" in versions
    assert "not found: nvcc, g++, cmake, ninja, ncu, compute-sanitizer, git" in versions
