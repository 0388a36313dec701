"""`make gpu-check` without a GPU: its pieces, their limits, the tests that they choose, and what it reads of ncu."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_check, gpu_counters, machine
from bench.gpu_check import Places
from bench.gpu_counters import Case, Launch, counted, table, timed_in
from pysteep import backends

HEAD = '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC"'
STEP = "void steepest_step_kernel<(pysteep::Power)0, float, float, None>(Table<int, 440, 1320>)"
# As ncu writes it with --print-units base; the program's own words and ncu's come before it where there is no log file.
TABLE = f"""==PROF== Connected to process 4711 (/usr/bin/python3.12)
a line of the program
{HEAD},"dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum"
"","","","","","","","","","","","byte","byte","ns"
"0","47","python","127.0.0.1","{STEP}","1","7","(256, 1, 1)","(9, 1, 1)","0","9.0","2,147,745,792","1,073,900,032","1,087,456"
"1","47","python","127.0.0.1","step_kernel","1","7","(128, 1, 1)","(9, 1, 1)","0","9.0","2147745792","1073741824","1100000"
"""


@pytest.fixture
def places(tmp_path):
    made = Places(tmp_path / "results", tmp_path / "build")
    made.output.mkdir()
    return made


def pretend(monkeypatch, commands, limit=60):
    """A GPU whose pieces are small programs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "versions", lambda: ["GPU: pretended"])
    monkeypatch.setattr(gpu_check, "command", lambda piece, _: [sys.executable, "-c", commands[piece]])
    monkeypatch.setattr(gpu_check, "LIMITS", dict.fromkeys(commands, limit))
    monkeypatch.setattr(gpu_check, "GRACE", 2)


def test_all_pieces_together_take_less_than_nine_minutes():
    assert sum(gpu_check.LIMITS.values()) <= 530
    assert list(gpu_check.LIMITS)[:3] == ["build", "cuda", "time-cuda"], "CUDA alone comes first"
    assert gpu_check.ASKED_FOR["memcheck"] >= 150
    assert not {*gpu_check.TOOLS, *gpu_check.CHOSEN} - {*gpu_check.LIMITS, *gpu_check.ASKED_FOR}


def test_every_test_of_a_gpu_is_in_one_piece():
    """Those that the two pieces choose are all that are marked."""
    assert [gpu_check.CHOSEN[piece][:2] for piece in ("cuda", "triton")] == [["-m", "gpu"]] * 2
    assert [gpu_check.CHOSEN[piece][2:] for piece in ("cuda", "triton")] == [["-k", "not triton"], ["-k", "triton"]]
    marked = [path.name for path in sorted(Path(__file__).parent.glob("test_*.py")) if "mark.gpu" in path.read_text()]
    assert {*marked} - {Path(__file__).name} <= {*gpu_check.TESTS}


def test_a_piece_without_its_tool_says_so(monkeypatch, places, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_check.run("memcheck", places) == "not run: compute-sanitizer is not installed"
    assert gpu_check.run("counters", places) == "not run: ncu is not installed"


def test_nothing_passes_without_a_gpu(monkeypatch, places):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pieces = [*gpu_check.LIMITS, *gpu_check.ASKED_FOR]
    need_one = [piece for piece in pieces if piece not in gpu_check.WITHOUT_GPU]
    assert {gpu_check.run(piece, places) for piece in need_one} == {"FAILED: torch sees no GPU"}


def test_what_was_found_is_named(monkeypatch, tmp_path):
    """Also on a machine without git, a compiler or a GPU."""
    text = "\n".join(gpu_check.versions())
    assert f"torch {torch.__version__.split('+')[0]}" in text
    assert "commit: " in text
    monkeypatch.setenv("PATH", str(tmp_path))
    last = gpu_check.versions()[-1]
    assert last.startswith("not found: ")
    assert {*gpu_check.PROGRAMS} <= {*last.removeprefix("not found: ").split(", ")}
    assert "commit: unknown" in gpu_check.versions()


def test_results_say_where_they_are_from_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.commit.__wrapped__() == {"id": "unknown", "time": "", "dirty": False}


def test_a_piece_that_fails_or_takes_too_long_leaves_the_rest(monkeypatch, tmp_path, capsys):
    survivor = tmp_path / "survivor"
    child = f"import time, pathlib; time.sleep(5); pathlib.Path({str(survivor)!r}).touch()"
    hangs = f"import subprocess, sys; print('so far so good'); subprocess.run([sys.executable, '-c', {child!r}])"
    writes = "import pathlib; pathlib.Path('bars.json').write_text('{\"suites\": {}}')"
    pretend(monkeypatch, {"build": "print('no compiler'); raise SystemExit(3)", "cuda": hangs, "time-cuda": writes})
    output, archive = tmp_path / "results", tmp_path / "elsewhere" / "all.tar.gz"
    options = ["--pieces", "build,cuda,time-cuda", "--at-most", "1.5", "--output", str(output), "--archive", str(archive)]
    assert gpu_check.main(options) == 1
    printed = capsys.readouterr().out
    outcomes = printed.splitlines()[-4:]
    assert outcomes[0].startswith("build      FAILED with exit code 3")
    assert outcomes[1].startswith("cuda       FAILED: not done after 1.5 s")
    assert outcomes[2].startswith("time-cuda  ok")
    assert outcomes[3] == f"all of it: {archive}"
    assert printed.index("no compiler") < printed.index("cuda ...") < printed.index("so far so good")
    with tarfile.open(archive) as file:
        kept = {member.name: member for member in file if member.isfile()}
        names = ("versions.txt", "outcomes.txt", "bars.json", "build.log", "cuda.log", "time-cuda.log")
        assert {f"results/{name}" for name in names} == {*kept}
        assert file.extractfile(kept["results/build.log"]).read() == b"no compiler\n"
        assert b"so far so good" in file.extractfile(kept["results/cuda.log"]).read()
    time.sleep(5)
    assert not survivor.exists(), "what a piece started must end with it"


def test_a_piece_is_interrupted_before_it_is_killed(monkeypatch, tmp_path):
    polite = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('summed up')"
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    pretend(monkeypatch, {"cuda": polite, "triton": deaf})
    output = tmp_path / "results"
    options = ["--pieces", "cuda,triton", "--at-most", "1", "--output", str(output)]
    assert gpu_check.main(options) == 1
    assert (output / "cuda.log").read_text() == "summed up\n"
    assert (output / "outcomes.txt").read_text().count("FAILED: not done after 1 s") == 2


def test_a_run_that_is_stopped_leaves_its_archive(tmp_path):
    """As `timeout` stops one, in the middle of a piece."""
    script = f"""
import sys, torch
sys.path.insert(0, {str(gpu_check.ROOT)!r})
from bench import gpu_check
torch.cuda.is_available = lambda: True
gpu_check.command = lambda *_: [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
gpu_check.GRACE, gpu_check.versions = 2, list
gpu_check.main(["--pieces", "cuda,triton", "--output", {str(tmp_path / "results")!r}])
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert any(line == "begun\n" for line in process.stdout)
    process.terminate()
    assert process.wait(30) == 1
    process.stdout.close()
    with tarfile.open(tmp_path / "results.tar.gz") as file:
        assert file.extractfile("results/cuda.log").read().startswith(b"begun\n")
        assert file.extractfile("results/outcomes.txt").read() == b"cuda  FAILED: stopped before its end\n"


def test_nothing_of_an_earlier_run_passes_for_a_result(monkeypatch, tmp_path):
    pretend(monkeypatch, {"build": "pass", "cuda": "pass"})
    output = tmp_path / "results"
    output.mkdir()
    for name in ("bars.json", "times.json", "triton.log", "mine.txt"):
        (output / name).write_text("")
    assert gpu_check.main(["--pieces", "cuda", "--output", str(output)]) == 0
    assert (output / "triton.log").exists()
    assert gpu_check.main(["--pieces", "build,cuda", "--output", str(output)]) == 0
    assert {path.name for path in output.iterdir()} == {"mine.txt", "versions.txt", "outcomes.txt", "build.log", "cuda.log"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pieces", "build,tests"], "--pieces must be among build, cuda, .*; got tests"),
        (["--archive", "build/gpu-check/all.tar.gz", "--output", "build/gpu-check"], "--archive and --build must lie outside"),
        (["--build", "here/site", "--output", "here"], "--archive and --build must lie outside"),
    ],
)
def test_wrong_options_are_named(options, message, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(options)
    assert re.search(message, capsys.readouterr().err)


def test_missed_bars_are_told_with_their_reasons(tmp_path):
    bar = {"name": "a", "reached": 0.5, "sign": ">=", "bar": 0.9, "met": False}
    bars = [bar, bar | {"name": "b", "expected": "400 instructions"}, bar | {"reached": None}, bar | {"met": True}]
    (tmp_path / "bars.json").write_text(json.dumps({"suites": {"gpu cuda": {"bars": bars}}}))
    assert gpu_check.missed(tmp_path) == [
        "missed: a: 0.50, must be >= 0.9",
        "missed: b: 0.50, must be >= 0.9 (expected: 400 instructions)",
    ]
    assert gpu_check.missed(tmp_path / "nowhere") == []
    (tmp_path / "bars.json").write_text('{"suites": {"gpu cu')
    assert gpu_check.missed(tmp_path) == ["bars.json is not whole"]


def test_failures_are_told_as_they_come(tmp_path):
    (tmp_path / "test_two.py").write_text(
        "import time\ndef test_wrong():\n    assert 1 == 2\ndef test_slow():\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "bench.failures", "-p", "no:cacheprovider", "."]
    environment = {**os.environ, "PYTHONPATH": str(gpu_check.ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "assert 1 == 2" in line:
            break
    assert any(line.startswith("FAILED test_two.py::test_wrong, call") for line in said)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=30)[0]
    assert "1 failed" in rest, "interrupted, pytest sums up what it has"


def test_counters_are_read():
    first, second = counted(TABLE)
    assert first.kernel.startswith("void steepest_step_kernel<")
    assert first[1:] == (2147745792.0, 1073900032.0, pytest.approx(1.087456e-3))
    assert second == Launch("step_kernel", 2147745792.0, 1073741824.0, pytest.approx(1.1e-3))


def test_counters_in_larger_units_are_read():
    text = TABLE.replace('"byte","byte","ns"', '"Gbyte","Mbyte","us"').replace("1,087,456", "1,087.46")
    text = text.replace("2,147,745,792", "2.15").replace("1,073,900,032", "1,073.90")
    assert counted(text)[0][1:] == pytest.approx((2.15e9, 1.0739e9, 1.08746e-3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM: no permission", "wrote no table; its last words: .*ERR_NVGPUCTRPERM"),
        (TABLE.replace("dram__bytes_write.sum", "dram__sectors"), "lacks dram__bytes_write.sum"),
    ],
)
def test_a_log_without_counters_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        counted(text)


def test_the_table_stands_beside_the_times(tmp_path):
    work = "steepest_step, one tensor, float32, q = 1"
    cases = [Case(work, home, 3 << 30) for home in ("cuda", "triton")]
    times = [{"work": work, "who": "cuda", "seconds": 1e-3, "moved": 3 << 30, "size": "", "share_of_copy": 0.9}]
    (tmp_path / "times.json").write_text(json.dumps(times))
    lines = table(cases, counted(TABLE), timed_in(tmp_path)).splitlines()
    assert lines[2] == f"| {work} | cuda | 1.000 | 2.00 | 2963 | 3221 |"
    assert lines[3].endswith("| 2929 | not timed |")
    with pytest.raises(ValueError, match="there must be 1 launches, one for each case; ncu counted 2"):
        table(cases[:1], counted(TABLE), {})
    assert timed_in(tmp_path / "nowhere") == {}


@pytest.mark.skipif(not backends()["cpp"].available, reason="the extension is not built")
def test_every_case_of_the_counters_is_a_right_step():
    """Tried on a CPU. Each is named as bench.gpu_bars names it, so that both figures meet."""
    cases = [(case, make()) for case, make in gpu_counters.cases(5000, ("cpp",), "cpu")]
    assert len(cases) == len({case for case, _ in cases}) == 8 + 4 + 4 + 4
    for case, step in cases:
        assert case.moved > 0
        step()
