"""`make gpu-check` without a GPU: its pieces, their limits, the tests that they choose, and what it reads of ncu."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from bench import gpu_check, gpu_counters
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


def test_all_pieces_together_take_less_than_nine_minutes():
    assert sum(gpu_check.LIMITS.values()) <= 530
    assert {*gpu_check.TOOLS, *gpu_check.CHOSEN, *gpu_check.SUMMARIES, "build"} == set(gpu_check.LIMITS)


@pytest.mark.parametrize(("piece", "fewest", "most"), [("test", 700, 2000), ("memcheck", 20, 40), ("racecheck", 8, 16)])
def test_pieces_choose_their_tests(piece, fewest, most, tmp_path):
    command = gpu_check.command(piece, tmp_path)
    command = [*command[command.index(sys.executable) :], "--collect-only", "-p", "no:xdist"]
    command = [word for word in command if word not in ("-n", str(gpu_check.WORKERS), "--dist", "loadgroup")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    chosen = [line for line in done.stdout.splitlines() if "::" in line]
    assert done.returncode == 0, done.stdout
    assert fewest <= len(chosen) <= most
    assert piece == "test" or not [name for name in chosen if "triton" in name]


def test_a_piece_without_its_tool_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_check.run("memcheck", tmp_path) == "not run: compute-sanitizer is not installed"
    assert gpu_check.run("counters", tmp_path) == "not run: ncu is not installed"


def test_nothing_passes_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {gpu_check.run(piece, tmp_path) for piece in gpu_check.LIMITS if piece != "build"} == {"FAILED: torch sees no GPU"}


def test_a_piece_that_fails_or_takes_too_long_leaves_the_rest(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    survivor = tmp_path / "survivor"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(survivor)!r}).touch()"
    commands = {
        "build": "raise SystemExit(3)",
        "test": f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])",
        "time": "import pathlib; pathlib.Path('bars.md').write_text('the bars')",
    }
    monkeypatch.setattr(gpu_check, "command", lambda piece, _: [sys.executable, "-c", commands[piece]])
    monkeypatch.setattr(gpu_check, "LIMITS", {"build": 60, "test": 1, "time": 60})
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--pieces", "build,test,time", "--output", str(tmp_path)])
    assert gpu_check.main() == 1
    last = capsys.readouterr().out.splitlines()[-3:]
    assert last[0].startswith("build  FAILED with exit code 3")
    assert last[1].startswith("test   FAILED: not done after 1 s")
    assert last[2].startswith("time   ok")
    time.sleep(3)
    assert not survivor.exists(), "what a piece started must end with it"


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
