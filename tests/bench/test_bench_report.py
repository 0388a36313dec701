"""The report of the benchmarks, from results made up here: every figure is in it, nothing is left out, bad files are named."""

from __future__ import annotations

import copy
import json
import re
from itertools import combinations, count
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from bench import report
from bench.report import bar_charts, figures, labels, results, style, tables, words
from tests.support.benchmark_results import (
    COMPILED,
    MACHINE,
    OURS,
    PEER,
    PICTURES,
    RESNET,
    TINY,
    WEIGHTS,
    bars,
    benchmarks,
    rows,
    timing,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def write(tmp_path):
    number = count()

    def to_file(content):
        path = tmp_path / f"{next(number)}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return to_file


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    files = [folder / "benchmarks.json", folder / "bars.json"]
    for file, content in zip(files, (benchmarks(), bars()), strict=True):
        file.write_text(json.dumps(content))
    return results.read(files)


@pytest.fixture(scope="module")
def drawn(read):
    return figures.figures(read)


def test_report_holds_every_timing_bar_and_absence(write, tmp_path):
    content = benchmarks()
    assert report.main([str(write(content)), str(write(bars())), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    shown = rows(text)
    for one in content["benchmarks"]:
        info = one["extra_info"]
        time = words.duration(info["microseconds"])
        if info["suite"] == "scaling":
            assert any(row[:2] == ["up to one tensor of 10000000", info["contender"]] and time in row for row in shown), info
        else:
            q = "" if info["q"] is None else f"{info['q']:g}"
            assert any(row[0] == info["contender"] and time in row and (not q or q in row) for row in shown), info
    assert ["steepest_step", "ResNet-50, q = 1: time / triad", "0.99", "<= 1.15", "met"] in shown
    missed = next(row for row in shown if row[1] == "ResNet-50, q = 1: torch fused SGD / time")
    assert missed[2:] == ["1.14", ">= 1.2", "MISSED, [why](../../NOTES.md#steepest_step)"]
    assert ["depth", "tied: time / triad", "not measured: no compiler", "<= 1.25", ""] in shown
    assert "1 of 3 bars are met, 1 missed, 1 not measured." in text
    absent = [row for row in shown if row[0] == "other Lion"]
    assert len(absent) == 3, "in the table of each work and dtype"
    assert all("absent: needs a GPU" in row for row in absent)
    assert sum(row[0] == "slow SGD" for row in shown) == 1, "in the table of its work alone"
    compiled = [row for row in shown if row[0] == COMPILED]
    assert [row for row in compiled if "absent: takes hours" in row] == [
        [COMPILED, "one tensor of 10000000", "absent: takes hours"]
    ]
    assert sum("absent: takes minutes" in row for row in compiled) == 2, "where it was timed it is not absent"
    assert "2026-11-21" in text
    assert "torch 2.13.0+cpu" in text
    assert "183 GFLOP/s" in text
    assert text.count("<details>") == text.count("</details>") == 1, "only the long table is folded"
    for name in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.md",
        *(f"{name}.png" for name in PICTURES),
    }


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda top: top.pop("ceilings"), "ceilings must be an object, got nothing"),
        (
            lambda top: top["benchmarks"][3]["extra_info"].pop("work"),
            "benchmarks[3].extra_info.work must be a text, got nothing",
        ),
        (
            lambda top: top["benchmarks"][0]["extra_info"].update(microseconds=0),
            "extra_info.microseconds must be a finite number",
        ),
        (lambda top: top["benchmarks"][0]["extra_info"].update(microseconds="5 ms"), 'above 0, got "5 ms"'),
        (lambda top: top["benchmarks"][0]["extra_info"].update(share_of_triad=float("nan")), "finite number, got NaN"),
        (lambda top: top["benchmarks"][-1]["extra_info"].update(over="time"), "over must be one of 'size', 'tensors'"),
        (lambda top: top["machine_info"].update(kind="tpu"), "machine_info.kind must be one of 'cpu', 'cuda', got \"tpu\""),
        (lambda top: top["benchmarks"].append(top["benchmarks"][0]), "is there twice"),
        (lambda top: top.update(benchmarks=[1]), "benchmarks[0] must be an object, got 1"),
        (lambda top: top["absent"][0].pop("reason"), "absent[0].reason must be a text"),
        (lambda top: top.pop("benchmarks"), "must have a field benchmarks or suites"),
    ],
)
def test_malformed_benchmarks_name_file_and_field(write, capsys, change, named):
    content = copy.deepcopy(benchmarks())
    change(content)
    path = write(content)
    assert report.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert named in error
    assert not (path.parent / "report.md").exists()


def test_malformed_bars_and_files_that_are_no_json(write, tmp_path, capsys):
    content = bars()
    content["suites"]["depth"]["bars"][0]["sign"] = "<"
    for path, named in (
        (write(content), "suites.depth.bars[0].sign must be one of '<=', '>=', got \"<\""),
        (write("{"), "is not JSON"),
        (write([]), "must hold a JSON object, got []"),
        (tmp_path / "none.json", "No such file"),
    ):
        assert report.main([str(path)]) == 2
        error = capsys.readouterr().err
        assert str(path) in error
        assert named in error


def test_a_report_is_of_one_machine(write, capsys):
    other = {**bars(), "machine_info": {**MACHINE, "folder": "cpu-other"}}
    assert report.main([str(write(benchmarks())), str(write(other))]) == 2
    assert "machine_info.folder must be 'cpu-some' as in the files beside it, got 'cpu-other'" in capsys.readouterr().err


def test_every_missed_bar_leads_to_a_heading_of_the_notes():
    headings = re.findall(r"^#+ (.*)$", (ROOT / "bench" / "NOTES.md").read_text(), re.MULTILINE)
    assert set(tables.NOTES_HEADINGS.values()) <= set(headings)
    assert tables.notes_anchor("Bars, `make bars`") == "bars-make-bars"
    assert tables.notes_anchor("factor_step, factor_product, mirror_step") == "factor_step-factor_product-mirror_step"
    assert tables.notes_anchor("pysteep.diagnostics") == "pysteepdiagnostics"


# ---- figures -----------------------------------------------------------------------------------------------------------------


def test_figures_name_their_axes_units_machine_and_date(drawn):
    assert list(drawn) == PICTURES
    for name, figure in drawn.items():
        assert "Some CPU, 2 cores, 2 threads, torch 2.13.0+cpu, 2026-11-21" in figure.get_suptitle(), name
        assert all(axes.get_ylabel() for axes in figure.axes), name
    (roofline,) = drawn["roofline"].axes
    assert (roofline.get_xlabel(), roofline.get_ylabel()) == ("floating-point operations per byte that must move", "GFLOP/s")
    assert (roofline.get_xscale(), roofline.get_yscale()) == ("log", "log")
    (scaling,) = drawn["scaling"].axes
    assert sorted(len(line.get_xdata()) for line in scaling.lines) == [3, 3, 3], "a line for each contender, and the triad"
    assert (scaling.get_xlabel(), scaling.get_xscale(), scaling.get_yscale()) == ("weights in a tensor", "log", "log")
    assert {axes.get_title(loc="left"): axes.get_ylabel() for axes in drawn["steepest_step"].axes} == {
        f"{RESNET}, float32": "triad / time",
        f"{TINY}, float32": "µs a call",
    }
    assert drawn["diagonal_flow"].axes[0].get_ylabel() == "µs a step and run"


def test_bars_are_the_shares_and_the_absent_are_in_the_legend(read, drawn):
    figure = drawn["steepest_step"]
    resnet = figure.axes[0]
    expected = [one.share_of_triad for one in read.of_suite("steepest_step") if (one.work, one.dtype) == (RESNET, "float32")]
    assert sorted(bar.get_height() for bar in resnet.patches) == pytest.approx(sorted(expected))
    assert [label.get_text() for label in resnet.get_xticklabels()] == ["q = 1", "q = 1.7", "q = 2"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [OURS, PEER, COMPILED, "other Lion: absent", "slow SGD: absent"]


def test_who_moves_more_bytes_for_the_same_result_is_not_as_fast(write):
    content = benchmarks()
    content["benchmarks"] = [
        timing("steepest_step", RESNET, OURS, 5000, bytes=300_000_000, q=1.0),
        timing("steepest_step", RESNET, "lion", 10000, bytes=500_000_000, q=1.0),
        timing("steepest_step", WEIGHTS, "lion", 10000, bytes=500_000_000, q=1.0),
    ]
    found = results.read([write(content)])
    ours, peer, alone = found.timings
    assert peer.share_of_triad == 0.833
    assert found.share(ours) / found.share(peer) == pytest.approx(2, rel=1e-3), "twice the time"
    assert found.share(alone) == 0.833


def test_a_gpu_is_measured_beside_a_copy(write):
    content = benchmarks()
    content["machine_info"] = {**MACHINE, "kind": "cuda", "threads": None}
    found = results.read([write(content)])
    figure = bar_charts.chart(found, "", found.of_suite("steepest_step"), (), style.looks([OURS, PEER, COMPILED]))
    assert figure.axes[0].get_ylabel() == "copy / time"
    shares = [one.share_of_copy for one in found.of_suite("steepest_step")]
    assert max(bar.get_height() for bar in figure.axes[0].patches) == max(shares)


def test_points_lie_under_their_roofs_and_labels_do_not_overlap(read, drawn):
    (axes,) = drawn["roofline"].axes
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() != "None"}
    resnet = next(one for one in read.timings if one.work == RESNET and one.q == 2 and one.ours)
    assert any(point == pytest.approx((100 / 307, 100e6 / resnet.microseconds / 1e3)) for point in points)
    names = [text for text in axes.texts if "=" in text.get_text()]
    assert {text.get_text() for text in names} >= {"q = 1, 2", "q = 1.7", "L = 10; q = 2"}
    boxes = [text.get_window_extent() for text in names]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_labels_of_a_crowd_do_not_overlap():
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    crowd = [(0.5 + 0.01 * k, 0.5) for k in range(12)]
    placed = labels.place(axes, [(point, f"point {k}") for k, point in enumerate(crowd)], crowd, [])
    boxes = [note.get_window_extent() for note in placed]
    assert sorted(note.get_text() for note in placed) == sorted(f"point {k}" for k in range(12))
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert not any(box.contains(*axes.transData.transform(point)) for box in boxes for point in crowd)
    assert all(axes.bbox.contains(*corner) for box in boxes for corner in box.corners())


def test_a_contender_looks_alike_in_every_figure(read):
    every = style.looks(one.contender for one in read.timings)
    assert len({(look.colour, look.hatch) for look in every.values()}) == len(every)
    many = style.looks([OURS, "pysteep numba", *(f"peer {k}" for k in range(20))])
    assert len({(look.colour, look.hatch) for look in many.values()}) == len(many)


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [(0.347, "0.35 µs"), (60.46, "60.5 µs"), (999.4, "999 µs"), (999.9, "1.00 ms"), (9996, "10.0 ms"), (1.5e6, "1.50 s")],
)
def test_three_digits(microseconds, text):
    assert words.duration(microseconds) == text


def test_roofs_are_the_fastest_that_memory_was(tmp_path):
    content = benchmarks()
    first = next(one for one in content["benchmarks"] if one["extra_info"]["bytes"] == 307_000_000)
    first["extra_info"].update(microseconds=3070, share_of_triad=0.8, share_of_copy=1.25)
    path = tmp_path / "benchmarks.json"
    path.write_text(json.dumps(content))
    roofs = results.read([path]).roofs
    assert (roofs.triad, roofs.copy, roofs.gigaflops) == (125, 80, 183)


def test_every_commit_that_was_measured_is_named(tmp_path):
    content = bars()
    content["commit_info"] = {"id": "fedcba9876543210", "dirty": True}
    for name, part in (("bars.json", content), ("benchmarks.json", benchmarks())):
        (tmp_path / name).write_text(json.dumps(part))
    assert results.read([tmp_path / "bars.json", tmp_path / "benchmarks.json"]).commit == "0123456, fedcba9 with changes"
