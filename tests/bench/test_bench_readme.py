"""README's section on speed is what the committed results say."""

from __future__ import annotations

import json
import re

import pytest

from bench.report import readme
from tests.support.benchmark_results import COMPILED, MACHINE, OURS, PEER, RESNET, TINY, bars, benchmarks, rows


def test_readme_is_what_the_committed_results_say():
    assert readme.main(["--check"]) == 0, "python -m bench readme"


def test_files_that_readme_leads_to_are_there():
    links = re.findall(r"\]\(((?!http)[^)#]+)", (readme.ROOT / "README.md").read_text())
    assert "bench/NOTES.md" in links
    assert not [link for link in links if not (readme.ROOT / link).exists()]


@pytest.fixture
def repository(tmp_path):
    """A README.md and the results of one CPU."""
    folder = tmp_path / "bench" / "results" / MACHINE["folder"]
    folder.mkdir(parents=True)
    (folder / "benchmarks.json").write_text(json.dumps(benchmarks()))
    (folder / "bars.json").write_text(json.dumps(bars()))
    (tmp_path / "README.md").write_text(f"before\n{readme.BEGIN}\n{readme.END}\nafter\n")
    return tmp_path


def test_readme_section(repository):
    assert readme.main([], repository) == 0
    text = (repository / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    shown = rows(text)
    assert ["a step", "q", RESNET, TINY] in shown
    assert [OURS, "1", "5.11 ms (100 %)", "–"] in shown
    assert [OURS, "1.7", "8.12 ms (63 %)", "61.4 µs"] in shown
    assert [PEER, "2", "6.24 ms (82 %)", "127 µs"] in shown
    assert [COMPILED, "1", "absent: takes minutes", "493 µs"] in shown
    assert ["other Lion", "", "absent: needs a GPU", ""] in shown
    assert not [row for row in shown if row[:2] == [OURS, "1.5"]]
    assert ['pysteep cpp, `storage="full"`', "5.25 ms (91 %)", "–", "18.4 ms (26 %)"] in shown
    assert ["torch chain", "51.4 ms (9 %)", "–", "–"] in shown
    assert "pysteep cpp 0.35 µs; JAX scan 1.05 µs (3.00 times as long)" in text
    assert "1 of 3 bars are met, 1 missed, 1 not measured: [every figure](bench/results/cpu-some/report.md)" in text
    assert "(bench/results/cpu-some/steepest_step.png)" in text
    assert "23.5 GiB; python 3.11.7, torch 2.13.0+cpu; commit 0123456; 2026-11-21" in text
    assert "No GPU has been measured" in text


def test_check_notices_one_changed_figure(repository, capsys):
    assert readme.main(["--check"], repository) == 1, "the section is empty"
    assert readme.main([], repository) == 0
    assert readme.main(["--check"], repository) == 0
    path = repository / "README.md"
    before = path.read_text()
    path.write_text(before.replace("8.12 ms", "8.02 ms"))
    capsys.readouterr()
    assert readme.main(["--check"], repository) == 1
    assert "README.md" in capsys.readouterr().err
    assert "8.02 ms" in path.read_text(), "--check writes nothing"
    assert readme.main([], repository) == 0
    assert path.read_text() == before


def test_readme_shows_the_bars_of_a_gpu_once_there_are_some(repository):
    folder = repository / "bench" / "results" / "some-gpu"
    folder.mkdir()
    content = bars()
    content["machine_info"] = {**MACHINE, "device": "Some GPU", "kind": "cuda", "folder": "some-gpu"}
    (folder / "bars.json").write_text(json.dumps(content))
    text = readme.section(repository)
    assert "No GPU has been measured" not in text
    assert "Measured on Some GPU" in text
    assert ["tied: time / triad", "<= 1.25", "not measured: no compiler"] in rows(text)


def test_results_stand_in_the_folder_of_their_machine(repository, capsys):
    folder = repository / "bench" / "results" / MACHINE["folder"]
    folder.rename(folder.with_name("elsewhere"))
    assert readme.main([], repository) == 2
    assert "folder must be its own, 'elsewhere', got 'cpu-some'" in capsys.readouterr().err


def test_readme_without_results_claims_nothing(tmp_path):
    text = readme.section(tmp_path)
    assert not re.search(r"\d [mµ]?s\b", text)
    assert ["pysteep numba", "1.7", *["not measured"] * 5] in rows(text)
    assert text.count("not measured") == 6 * 5 + 3 * 3 + 1 + len(readme.GPU_BARS)


@pytest.mark.parametrize("marks", ["", readme.BEGIN, readme.END + readme.BEGIN, 2 * (readme.BEGIN + readme.END)])
def test_readme_without_its_two_comments_is_left_alone(repository, capsys, marks):
    (repository / "README.md").write_text(marks)
    assert readme.main([], repository) == 2
    assert "once each" in capsys.readouterr().err
    assert (repository / "README.md").read_text() == marks
