"""`make gpu-check` without a GPU: its pieces, their limits, the tests that they choose, and what it reads of ncu."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.gpu import gpu_check, gpu_counters
from bench.gpu.gpu_check import Places
from bench.gpu.gpu_counters import Case, Launch, counted, table, timed_in
from bench.gpu.gpu_flow import whole
from bench.measure import machine
from pysteep import backends
from tests.support.suites import TESTS

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
    """With a package that was built."""
    made = Places(tmp_path / "results", tmp_path / "build")
    made.output.mkdir()
    (made.site / "pysteep").mkdir(parents=True)
    return made


def pretend(monkeypatch, commands):
    """A GPU whose pieces are small programs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "versions", lambda: ["GPU: pretended"])
    monkeypatch.setattr(gpu_check, "command", lambda piece, _: [sys.executable, "-c", commands[piece]])
    monkeypatch.setattr(gpu_check, "GRACE", 2)


def check(places, pieces, *options):
    return gpu_check.main(["--pieces", pieces, "--output", str(places.output), "--build", str(places.build), *options])


def test_all_pieces_together_take_less_than_nine_minutes():
    assert sum(gpu_check.LIMITS.values()) < 540
    assert list(gpu_check.LIMITS)[:3] == ["build", "cuda", "time-cuda"], "CUDA alone comes first"
    assert gpu_check.ASKED_FOR["memcheck"] >= 150
    assert not {*gpu_check.TOOLS, *gpu_check.CHOSEN} - {*gpu_check.LIMITS, *gpu_check.ASKED_FOR}


def test_every_test_of_a_gpu_is_in_one_piece():
    """Those that the two pieces choose are all that are marked."""
    assert [gpu_check.CHOSEN[piece][:2] for piece in ("cuda", "triton")] == [["-m", "gpu"]] * 2
    assert [gpu_check.CHOSEN[piece][2:] for piece in ("cuda", "triton")] == [["-k", "not triton"], ["-k", "triton"]]
    marked = {path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py") if "mark.gpu" in path.read_text()}
    assert marked - {"bench/test_gpu_check.py"} <= {*gpu_check.TESTS}


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


def test_a_piece_that_fails_or_takes_too_long_leaves_the_rest(monkeypatch, places, tmp_path, capsys):
    survivor = tmp_path / "survivor"
    child = f"import time, pathlib; time.sleep(5); pathlib.Path({str(survivor)!r}).touch()"
    hangs = f"import subprocess, sys; print('so far so good'); subprocess.run([sys.executable, '-c', {child!r}])"
    writes = "import pathlib; pathlib.Path('bars.json').write_text('{\"suites\": {}}')"
    pretend(monkeypatch, {"cuda": "print('no driver'); raise SystemExit(3)", "triton": hangs, "time-cuda": writes})
    archive = tmp_path / "elsewhere" / "all.tar.gz"
    assert check(places, "cuda, triton,time-cuda", "--at-most", "1.5", "--archive", str(archive)) == 1
    printed = capsys.readouterr().out
    outcomes = printed.splitlines()[-4:]
    assert outcomes[0].startswith("cuda       FAILED with exit code 3")
    assert outcomes[1].startswith("triton     FAILED: not done after 1.5 s")
    assert outcomes[2].startswith("time-cuda  ok")
    assert outcomes[3] == f"all of it: {archive}"
    assert printed.index("no driver") < printed.index("triton ...") < printed.index("so far so good")
    with tarfile.open(archive) as file:
        kept = {member.name: member for member in file if member.isfile()}
        names = ("versions.txt", "outcomes.txt", "bars.json", "cuda.log", "triton.log", "time-cuda.log")
        assert {f"results/{name}" for name in names} == {*kept}
        assert file.extractfile(kept["results/cuda.log"]).read() == b"no driver\n"
        assert b"so far so good" in file.extractfile(kept["results/triton.log"]).read()
    time.sleep(5)
    assert not survivor.exists(), "what a piece started must end with it"


def test_a_piece_is_interrupted_before_it_is_killed(monkeypatch, places):
    polite = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('summed up')"
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    pretend(monkeypatch, {"cuda": polite, "triton": deaf})
    assert check(places, "cuda,triton", "--at-most", "1") == 1
    assert (places.output / "cuda.log").read_text() == "summed up\n"
    assert (places.output / "outcomes.txt").read_text().count("FAILED: not done after 1 s") == 2


def test_nothing_runs_without_the_package_that_was_just_built(monkeypatch, places):
    """A build that fails leaves none, of another commit perhaps."""
    pretend(monkeypatch, {"build": "raise SystemExit(1)", "cuda": ""})
    assert check(places, "build,cuda") == 1
    lines = (places.output / "outcomes.txt").read_text().splitlines()
    assert lines[1] == f"cuda   FAILED: no package in {places.site}; the piece build makes it"


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGHUP], [signal.SIGINT, signal.SIGINT]], ids=str)
def test_a_run_that_is_stopped_ends_its_piece_and_leaves_its_archive(signals, places, tmp_path):
    """As `timeout`, a lost connection and an impatient user stop one, in the middle of a piece that does not listen."""
    child = (
        "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(60)"
    )
    script = f"""
import sys, torch
sys.path.insert(0, {str(gpu_check.ROOT)!r})
from bench.gpu import gpu_check
torch.cuda.is_available = lambda: True
gpu_check.command = lambda *_: [sys.executable, "-c", {child!r}]
gpu_check.GRACE, gpu_check.versions = 2, list
sys.exit(gpu_check.main(["--pieces", "cuda,triton", "--output", {str(places.output)!r}, "--build", {str(places.build)!r}]))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    number = next(int(line) for line in process.stdout if line.strip().isdigit())
    for each in signals:
        process.send_signal(each)
        time.sleep(0.5)
    printed = process.communicate(timeout=30)[0]
    assert process.returncode == 1
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)
    assert f"stopped by {signals[0].name}" in printed
    stopped = "cuda    FAILED: stopped before its end\ntriton  FAILED: stopped before its end\n"
    assert printed.endswith(f"{stopped}all of it: {tmp_path / 'results.tar.gz'}\n")
    with tarfile.open(tmp_path / "results.tar.gz") as file:
        assert file.extractfile("results/cuda.log").read() == f"{number}\n".encode()
        assert file.extractfile("results/outcomes.txt").read() == stopped.encode()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
@pytest.mark.parametrize("full", ["stdout", "logs"])
def test_nobody_reads_and_a_full_disk(full, places, tmp_path):
    """The pieces run all the same."""
    script = f"""
import pathlib, sys, torch
sys.path.insert(0, {str(gpu_check.ROOT)!r})
from bench.gpu import gpu_check
torch.cuda.is_available = lambda: True
runs = "import pathlib; print('é' * 100_000); pathlib.Path({str(tmp_path)!r}, "
gpu_check.command = lambda piece, _: [sys.executable, "-c", f"{{runs}}{{piece!r}}).touch()"]
gpu_check.versions = list
if {full == "logs"}:
    gpu_check.Places.log = lambda *_: pathlib.Path("/dev/full")
    pathlib.Path.write_text = lambda *_: 0
    gpu_check.last_words = lambda *_: []
gpu_check.main(["--pieces", "cuda,triton", "--output", {str(places.output)!r}, "--build", {str(places.build)!r}])
"""
    with Path("/dev/full" if full == "stdout" else os.devnull).open("w") as nowhere:
        subprocess.run([sys.executable, "-c", script], stdout=nowhere, check=False, timeout=60)
    assert (tmp_path / "cuda").exists()
    assert (tmp_path / "triton").exists()


def test_one_run_at_a_time(monkeypatch, places, capsys):
    pretend(monkeypatch, {"cuda": ""})
    with (places.build / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert check(places, "cuda") == 2
    assert "another run uses" in capsys.readouterr().out
    assert check(places, "cuda") == 0


def test_nothing_of_an_earlier_run_passes_for_a_result(monkeypatch, places):
    build = f"import pathlib; pathlib.Path({str(places.site / 'pysteep')!r}).mkdir(parents=True)"
    pretend(monkeypatch, {"build": build, "cuda": ""})
    for name in ("versions.txt", "bars.json", "times.json", "triton.log", "mine.log"):
        (places.output / name).write_text("")
    assert check(places, "cuda") == 0
    assert (places.output / "triton.log").exists()
    assert check(places, "build,cuda") == 0
    left = {path.name for path in places.output.iterdir()}
    assert left == {"mine.log", "versions.txt", "outcomes.txt", "build.log", "cuda.log"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pieces", "build,tests"], "--pieces must be among build, cuda, .*; got tests"),
        (["--pieces", " ,"], "--pieces must be among .*; got none"),
        (["--archive", "here/below/all.tar.gz", "--output", "here"], "--archive and --build must lie outside"),
        (["--build", "here/site", "--output", "here"], "--archive and --build must lie outside"),
        (["--archive", "/"], "--archive must be a file; got the folder /"),
        (["--output", __file__], "--output must be a folder; got the file"),
        (["--output", "/"], "--output must be new, empty or a folder of an earlier run"),
        (["--output", str(gpu_check.ROOT)], "--output must be new, empty or a folder of an earlier run"),
        *((["--at-most", value], "argument --at-most: must be > 0; got") for value in ("0", "-1", "nan")),
        *((["--scale", value], "argument --scale: must be > 0; got") for value in ("0", "nan")),
        (["--scale", "2"], "argument --scale: must be at most 1; got 2"),
    ],
)
def test_wrong_options_are_named(options, message, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(options)
    assert re.search(message, capsys.readouterr().err)


def test_missed_bars_are_told_with_their_reasons(tmp_path):
    bar = {"name": "a", "reached": 0.5, "sign": ">=", "bar": 0.9, "met": False}
    bars = [bar, bar | {"name": "b", "expected": "400 instructions"}, bar | {"reached": None}, bar | {"met": True}]
    (tmp_path / "bars.json").write_text(json.dumps({"suites": {"gpu cuda": {"bars": bars}, "gpu triton": {"bars": [bar]}}}))
    assert gpu_check.missed(tmp_path, ["build", "cuda", "time-cuda", "triton"]) == [
        "missed: a: 0.50, must be >= 0.9",
        "missed: b: 0.50, must be >= 0.9 (expected: 400 instructions)",
    ]
    assert gpu_check.missed(tmp_path, ["cuda"]) == []
    assert gpu_check.missed(tmp_path / "nowhere", ["time-cuda"]) == []
    for broken in ('{"suites": {"gpu cu', "[]", '{"suites": {"gpu cuda": {}}}'):
        (tmp_path / "bars.json").write_text(broken)
        assert gpu_check.missed(tmp_path, ["time-cuda"]) == ["bars.json is not whole"]


def test_failures_are_told_as_they_come(tmp_path):
    (tmp_path / "test_two.py").write_text(
        "import time\ndef test_wrong():\n    assert 1 == 2\ndef test_slow():\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "bench.gpu.failures", "-p", "no:cacheprovider", "."]
    environment = {**os.environ, "PYTHONPATH": str(gpu_check.ROOT), "PYTHONUNBUFFERED": "1"}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what runs in the background
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
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


def test_interrupted_runs_are_no_wrong_numbers():
    assert whole(SimpleNamespace(interrupted=False)).interrupted is False
    with pytest.raises(KeyboardInterrupt):
        whole(SimpleNamespace(interrupted=True))


def test_an_archive_that_cannot_be_written_fails_the_run(places, capsys):
    assert check(places, "report", "--archive", "/proc/nowhere/archive.tar.gz") == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"all of it: {places.output}"


def test_a_folder_that_cannot_be_made_is_named(places, capsys):
    assert gpu_check.main(["--pieces", "report", "--output", "/proc/nowhere/results", "--build", str(places.build)]) == 2
    assert capsys.readouterr().out.startswith("/proc/nowhere/results cannot be made: ")


def test_a_report_of_nothing_is_not_run(places):
    (places.site / "pysteep").mkdir(parents=True, exist_ok=True)
    assert gpu_check.run("report", places) == "not run: the piece bench has left no benchmarks.json"


def test_a_piece_that_the_system_ends_says_so(places, monkeypatch):
    (places.site / "pysteep").mkdir(parents=True, exist_ok=True)
    (places.output / "benchmarks.json").write_text("{}")
    ends = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(gpu_check, "command", lambda *_: [sys.executable, "-c", ends])
    assert gpu_check.run("report", places).startswith("FAILED: ended by SIGKILL from elsewhere, ")


def test_a_later_run_keeps_the_outcomes_and_versions_of_the_earlier_one(places, monkeypatch):
    monkeypatch.setattr(gpu_check, "run", lambda piece, *_: f"ok, of {piece}")
    monkeypatch.setattr(gpu_check, "versions", lambda: ["the first machine"])
    check(places, "build,report")
    monkeypatch.setattr(gpu_check, "versions", lambda: ["the second machine"])
    check(places, "bench")
    lines = (places.output / "outcomes.txt").read_text().splitlines()
    assert [line.split() for line in lines] == [[piece, "ok,", "of", piece] for piece in ("build", "report", "bench")]
    assert (places.output / "versions.txt").read_text() == "the first machine\nthe second machine\n"
    check(places, "build")
    assert (places.output / "outcomes.txt").read_text() == "build  ok, of build\n"
    assert (places.output / "versions.txt").read_text() == "the second machine\n"


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


def test_a_step_that_is_wrong_leaves_the_others_to_be_counted(tmp_path, monkeypatch):
    def wrong():
        raise AssertionError("element 7 is wrong")

    taken = []
    cases = [(Case("first", "cuda", 8), wrong), (Case("second", "triton", 8), lambda: lambda: taken.append("second"))]
    monkeypatch.setattr(gpu_counters, "cases", lambda *_: cases)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "profiler", SimpleNamespace(start=lambda: None, stop=lambda: None))
    gpu_counters.take_steps(tmp_path / "counters.json", 1.0)
    assert taken == ["second"]
    found = json.loads((tmp_path / "counters.json").read_text())
    assert found == {"done": [["second", "triton", 8]], "failed": ["first, cuda: AssertionError: element 7 is wrong"]}


def test_make_finds_the_packages_that_pythonpath_names(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('the torch of PYTHONPATH')")
    for target in ("gpu-check", "gpu-memcheck", "bench-gpu"):
        done = subprocess.run(
            ["make", target, f"PYTHON={sys.executable}"],
            cwd=gpu_check.ROOT,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert "the torch of PYTHONPATH" in done.stderr, target


@pytest.mark.skipif(not backends()["cpp"].available, reason="the extension is not built")
def test_every_case_of_the_counters_is_a_right_step():
    """Tried on a CPU. Each is named as bench.gpu.gpu_bars names it, so that both figures meet."""
    cases = [(case, make()) for case, make in gpu_counters.cases(5000, ("cpp",), "cpu")]
    assert len(cases) == len({case for case, _ in cases}) == 8 + 4 + 4 + 4
    for case, step in cases:
        assert case.moved > 0
        step()
