"""The bars of a GPU, tried on a CPU at a thousandth of their size: the code runs, and every bar has a figure or a reason.

No wrong result is timed: of every op that is timed, one wrong element, one that was not written and one write beside the
operands are each found.
"""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
import torch

from bench.gpu import gpu_bars, gpu_counters, gpu_flow, gpu_memory, gpu_timing
from bench.gpu.gpu_memory import GUARD, GUARDS, Block, WrongResultError
from bench.gpu.gpu_works import LLAMA_8B, FactorProduct, FactorStep, MirrorStep, Steepest, fitting
from bench.measure.reporting import Bar, Suite, read, save
from bench.measure.works import Work
from bench.report import tables
from bench.report.results import read as read_results
from pysteep import backends, flow, functional

pytestmark = pytest.mark.skipif(not backends()["cpp"].available, reason="the extension is not built")


@pytest.mark.slow
def test_every_bar_is_reached_or_says_why_not(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_bars, "HOMES", {"cpu": ("cpp", "cuda")})
    settings = {"--device": "cpu", "--scale": "2e-5", "--rounds": "1", "--output": str(tmp_path)}
    assert gpu_bars.main([word for pair in settings.items() for word in pair]) in (0, 1)
    report = json.loads((tmp_path / "bars.json").read_text())
    assert report["machine_info"]["kind"] == "cpu"
    of_homes = {home: report["suites"][f"gpu {home}"]["bars"] for home in ("cpp", "cuda")}
    assert len(of_homes["cuda"]) == 8 + 4 + 2 + 8 + 4 + 4 + 2
    assert len(of_homes["cpp"]) == len(of_homes["cuda"]) + 1  # one of diagonal_flow
    for bar in of_homes["cpp"]:
        assert math.isfinite(bar["reached"])
        assert bar["reached"] > 0
    expected = [bar["name"] for bar in of_homes["cpp"] if bar["expected"]]
    assert expected == [f"mirror_step, L = 10, q = {q}, cpp: share of the copy" for q in (1, 2)]
    if not torch.cuda.is_available():
        assert all(bar["reached"] is None and bar["reason"] and not bar["met"] for bar in of_homes["cuda"])
    rows = json.loads((tmp_path / "times.json").read_text())
    timed = {(row["work"], row["who"]) for row in rows}
    assert {(case.work, case.home) for case, _ in gpu_counters.cases(64, ("cpp",), "cpu")} <= timed
    assert all(bool(row["share_of_copy"]) == bool(row["moved"]) for row in rows), "a share is of a copy over as many bytes"
    assert len((tmp_path / "bars.md").read_text().splitlines()) > 70


def test_works():
    assert (len(LLAMA_8B.shapes), LLAMA_8B.weights) == (291, 8_030_261_248)
    assert fitting(LLAMA_8B, 2, 3, 1.0, "cpu") is LLAMA_8B
    small = fitting(LLAMA_8B, 2, 3, 1e-3, "cpu")
    assert len(small.shapes) == 291
    assert 7e6 < small.weights < 9e6


# ---- no wrong result is timed ------------------------------------------------------------------------------------------------

ELEMENTS = 2600
LIST = Work("", ((37, 11), (ELEMENTS,), (1,)))


def weights(operands):
    return list(operands[0])


def factors_and_product(operands):
    return [*operands[0], *operands[2][0]]


CASES = {
    "steepest_step, float32": (lambda n: Steepest(LIST, torch.float32, n).step("cpp", 1.7), "steepest_step", weights),
    "steepest_step, bfloat16": (lambda n: Steepest(LIST, torch.bfloat16, n).step("cpp", 1.0), "steepest_step", weights),
    "factor_step, tied": (lambda n: FactorStep(ELEMENTS, 2, 5, n).step("cpp", 2.0), "factor_step", factors_and_product),
    "factor_step, full": (lambda n: FactorStep(ELEMENTS, 3, 3, n).step("cpp", 1.0), "factor_step", factors_and_product),
    "factor_product": (lambda n: FactorProduct(ELEMENTS, 3, n).forward("cpp"), "factor_product", None),
    "factor_product's gradient": (lambda n: FactorProduct(ELEMENTS, 3, n).backward("cpp"), "grad", None),
    "mirror_step, L = 2": (lambda n: MirrorStep(ELEMENTS, n).step("cpp", 2, 1.0), "mirror_step", weights),
    "mirror_step, L = 10": (lambda n: MirrorStep(ELEMENTS, n).step("cpp", 10, 2.0), "mirror_step", weights),
    "mirror_step, the balance": (lambda n: MirrorStep(ELEMENTS, n).step("cpp", 3, 2.0), "mirror_step", lambda all_: [*all_[2]]),
}
OUTPUTS = {"steepest_step": 3, "factor_step, tied": 3, "factor_step, full": 4, "factor_product's gradient": 3}


def write_beside(tensor, distance):
    """To the element so far from the tensor's first in its block; not where a tensor has memory of its own."""
    if tensor.storage_offset() > 0:
        torch.as_strided(tensor.detach(), (1,), (1,), tensor.storage_offset() + distance).fill_(7.0)


def wrong_value(tensor, _, at):
    tensor.detach().view(-1)[at] += 0.01 * float(tensor.detach().abs().max())


def unwritten(tensor, before, at):
    while tensor.view(-1)[at] == before.view(-1)[at]:  # an element that the step leaves as it is
        at = (at + 1) % tensor.numel()
    tensor.detach().view(-1)[at] = before.view(-1)[at]


def written_before(tensor, *_):
    write_beside(tensor, -1)


def written_behind(tensor, *_):
    write_beside(tensor, tensor.numel())


def left_alone(*_):
    pass


@pytest.fixture
def spoiled(monkeypatch):
    """spoiled(op, outputs, change): the op does its work, then `change(its outputs, what they held before)` happens."""
    monkeypatch.setattr(gpu_memory, "PIECE", 1000)

    def patch(op, outputs, change):
        where = torch.autograd if op == "grad" else functional
        right = getattr(where, op)
        poison = torch.full((ELEMENTS,), torch.nan)

        def run(*operands, **options):
            before = [] if outputs is None else [tensor.detach().clone() for tensor in outputs(operands)]
            result = right(*operands, **options)
            if outputs is None:
                results = [result] if isinstance(result, torch.Tensor) else list(result)
                change(results, [poison] * len(results))
            else:
                change(outputs(operands), before)
            return result

        monkeypatch.setattr(where, op, run)

    return patch


@pytest.mark.parametrize("case", CASES)
def test_a_right_step_passes(spoiled, case):
    make, op, outputs = CASES[case]
    spoiled(op, outputs, left_alone)
    make(torch.Generator().manual_seed(0))()


FAULTS = {
    wrong_value: r"is wrong: .* times what is allowed",
    unwritten: r"left elements unwritten|is wrong",
    written_before: "wrote outside its operands",
    written_behind: "wrote outside its operands",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("case", CASES)
def test_a_wrong_result_is_not_timed(monkeypatch, spoiled, case, fault):
    """In every tensor that the op writes: at its ends, on both sides of where pieces meet, and somewhere."""
    make, op, outputs = CASES[case]
    count = OUTPUTS.get(case, OUTPUTS.get(case.split(",")[0], 1))
    for i in range(count):
        places = (0,) if "written_" in fault.__name__ else (0, 999, 1000, 1717, ELEMENTS - 1)
        for at in places:

            def change(own, before, i=i, at=at):
                fault(own[i], before[i], min(at, own[i].numel() - 1))

            with monkeypatch.context():
                spoiled(op, outputs, change)
                with pytest.raises(WrongResultError, match=FAULTS[fault]):
                    make(torch.Generator().manual_seed(at))
            monkeypatch.undo()
            monkeypatch.setattr(gpu_memory, "PIECE", 1000)


@pytest.mark.parametrize("case", CASES)
def test_a_write_to_an_operand_that_is_only_read_is_found(monkeypatch, case):
    make, op, _ = CASES[case]
    where = torch.autograd if op == "grad" else functional
    right = getattr(where, op)

    def run(*operands, **options):
        result = right(*operands, **options)
        read_only = {"grad": lambda: operands[2], "factor_product": lambda: operands[0][1]}.get(op, lambda: operands[1][0])()
        read_only.data.view(-1)[17] = 0.125
        return result

    monkeypatch.setattr(where, op, run)
    with pytest.raises(WrongResultError, match=r"only read|is wrong"):
        make(torch.Generator().manual_seed(0))


def test_results_that_are_not_looked_at_are_refused(monkeypatch):
    right = functional.factor_product
    monkeypatch.setattr(functional, "factor_product", lambda *operands, **options: right(*operands, **options).clone())
    with pytest.raises(WrongResultError, match="wrote its results elsewhere"):
        FactorProduct(100, 3, torch.Generator().manual_seed(0)).forward("cpp")


@pytest.mark.parametrize("part", [0, 1], ids=["first", "rest"])
@pytest.mark.parametrize("fault", [left_alone, *FAULTS], ids=lambda fault: fault.__name__)
def test_a_wrong_run_of_a_network_is_not_timed(monkeypatch, fault, part):
    home = backends()["cpp"].home("diagonal_flow")
    right = home.diagonal_flow
    problem = flow.regression(5, 7, 2, seed=np.arange(2)[:, None])
    options = {"depth": 2, "scale": gpu_flow.SCALE, "record": 1, "progress": False}
    for at in (0, 17, 2 * 3 * 7 - 1):

        def run(*operands, at=at, **settings):
            before = [tensor.clone() for tensor in operands[:2]]
            right(*operands, **settings)
            if operands[0].dtype == torch.float32:
                fault(operands[part], before[part], at)

        monkeypatch.setattr(home, "diagonal_flow", run)
        if fault is left_alone:
            gpu_flow.check_runs(problem, (2, 3), "cpu", "cpp", options)
        else:
            with pytest.raises(WrongResultError, match=FAULTS[fault].replace(": .* times what is allowed", " by .* at q = ")):
                gpu_flow.check_runs(problem, (2, 3), "cpu", "cpp", options)


def test_the_step_of_an_optimizer_is_checked_before_its_time_on_the_host(monkeypatch):
    run = gpu_bars.Run("cpu", ("cpp",), 1.0, 1, None)
    monkeypatch.setattr(gpu_bars, "FRESH_SETS", 2)
    step = torch.optim.SGD.step

    def wrong(self, *arguments):
        step(self, *arguments)
        self.param_groups[0]["params"][160].data[7] += 1e-3

    monkeypatch.setattr(torch.optim.SGD, "step", wrong)
    gpu_bars.many_tiny(run)
    assert [bar.reached for bar in run.bars["cpp"]] == [None, None]
    assert all("WrongResultError: torch SGD fused's step is wrong" in bar.reason for bar in run.bars["cpp"])


def test_blocks_have_guards_and_numbers_that_can_be_drawn_again(monkeypatch):
    monkeypatch.setattr(gpu_memory, "PIECE", 100)
    block = Block([(250,), (), (3, 128)], torch.float32, torch.device("cpu"))
    block.fill(torch.Generator().manual_seed(0))
    assert [len(piece) for piece in block.pieces] == [100, 100, 50, 1, 100, 100, 100, 84]
    assert all(torch.equal(piece, block.drawn(k)) for k, piece in enumerate(block.pieces))
    assert all(len(guard) >= GUARDS and bool((guard == GUARD).all()) for guard in block.guards)
    covered = sum(t.numel() for t in (*block.tensors, *block.guards))
    assert covered == block.memory.numel(), "every element is a tensor's or a guard's"
    first = block.tensors[0].clone()
    block.fill(torch.Generator().manual_seed(1))
    assert not torch.equal(first, block.tensors[0])


# ---- caches ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [100, 5000, 10**6])
def test_small_operands_take_turns(monkeypatch, elements):
    """Together they and the copies are larger than the cache."""
    run = gpu_bars.Run("cpu", ("cpp",), 1.0, 1, None)
    sets = run.sets(lambda: Steepest(Work("", ((elements,),)), torch.float32, run.numbers))
    assert sum(own.held for own in sets) >= gpu_timing.CACHES * gpu_timing.CPU_CACHE
    assert len(sets) == 1 or sum(own.held for own in sets[1:]) < gpu_timing.CACHES * gpu_timing.CPU_CACHE
    assert len({own.weights.memory.data_ptr() for own in sets}) == len(sets)
    sizes = []
    monkeypatch.setattr(gpu_timing, "copy_of", lambda moved, _: sizes.append(moved))
    gpu_timing.copies_of(sets[0].moved, "cpu")
    assert sum(sizes) >= gpu_timing.CACHES * gpu_timing.CPU_CACHE


def test_turns_go_round_and_keep_what_they_return():
    taken = []
    made = [lambda i=i: (taken.append(i), torch.full((4,), float(i)))[1] for i in range(3)]
    step = gpu_timing.in_turn(made)
    for _ in range(7):
        step()
    assert taken == [0, 1, 2, 0, 1, 2, 0]
    assert gpu_timing.in_turn(made[:1]) is made[0]


def test_every_share_is_of_a_copy_in_turn_with_it(monkeypatch):
    called = []

    def medians(steps, *_):
        called.append(list(steps))
        return {name: 2e-3 if name == "copy" else 4e-3 for name in steps}

    monkeypatch.setattr(gpu_bars, "medians", medians)
    run = gpu_bars.Run("cpu", ("cpp", "numba"), 1.0, 3, None)
    run.share("work", "1 M", 1000, {name: lambda: [int] for name in ("cpp", "numba", "a peer")}, 0.9)
    assert called == [["copy", "cpp", "numba", "a peer"]]
    assert [time.share_of_copy for time in run.times] == [0.5] * 3


# ---- fresh gradients ---------------------------------------------------------------------------------------------------------


def test_fresh_gradients_are_more_than_a_home_keeps_tables_of():
    assert gpu_bars.FRESH_SETS > pytest.importorskip("pysteep.kernels.triton.tensor_table").KEPT_TABLES


def test_every_step_sees_fresh_gradients_outside_of_its_time(monkeypatch):
    seen = {}

    def host_medians(steps, *_, before=None):
        for name, step in steps.items():
            addresses = []
            for _ in range(gpu_bars.FRESH_SETS if before else 2):
                if before:
                    before()
                addresses.append(tuple(p.grad.data_ptr() for p in step.__self__.param_groups[0]["params"]))
                step()
            seen.setdefault(name, []).append(len(set(addresses)))
        return dict.fromkeys(steps, 1.0)

    monkeypatch.setattr(gpu_bars, "host_medians", host_medians)
    run = gpu_bars.Run("cpu", ("cpp",), 1.0, 1, None)
    gpu_bars.many_tiny(run)
    assert seen == {"torch SGD fused": [1, gpu_bars.FRESH_SETS], "cpp": [1, gpu_bars.FRESH_SETS]}
    assert [(bar.bar, bar.reached, "fresh" in bar.name) for bar in run.bars["cpp"]] == [(0.5, 1.0, False), (1.0, 1.0, True)]


def test_what_comes_before_a_call_is_not_in_its_time():
    slow = {"": lambda: None}
    assert gpu_timing.host_medians(slow, 2, "cpu", calls=3, before=lambda: time.sleep(0.02))[""] < 0.01


# ---- misses that are expected ------------------------------------------------------------------------------------------------

MISSED = Bar("slow", 0.3, ">=", 0.8, expected="arithmetic")
THOUGH_MET = Bar("fast", 0.9, ">=", 0.8, expected="arithmetic")


def test_an_expected_miss_fails_nothing_and_is_kept(tmp_path):
    assert MISSED.row() == "| slow | 0.30 | >= 0.8 | missed as expected: arithmetic |"
    assert THOUGH_MET.row().endswith("| met, though a miss was expected |")
    assert Suite([MISSED, THOUGH_MET], [], "9 rounds").met
    assert not Suite([MISSED, Bar("", 0.3, ">=", 0.8)], [], "").met
    assert not Suite([Bar("", None, ">=", 0.8, "no GPU", "arithmetic")], [], "").met, "what was not measured was not met"
    path = tmp_path / "bars.json"
    save(Suite([MISSED, THOUGH_MET], [], "9 rounds"), "gpu cuda", path)
    assert [bar["met"] for bar in json.loads(path.read_text())["suites"]["gpu cuda"]["bars"]] == [False, True]
    assert read(path)["gpu cuda"].bars == [MISSED, THOUGH_MET]
    bars = read_results([path]).bars
    assert tables.bars_met(bars) == "1 of 2 bars are met, 1 missed (1 as expected)"
    assert "missed as expected: arithmetic" in tables.bars_table(bars)


def test_files_without_expected_misses_are_read(tmp_path):
    path = tmp_path / "bars.json"
    save(Suite([Bar("slow", 0.3, ">=", 0.8)], [], "9 rounds"), "gpu cuda", path)
    content = json.loads(path.read_text())
    del content["suites"]["gpu cuda"]["bars"][0]["expected"]
    path.write_text(json.dumps(content))
    assert read(path)["gpu cuda"].bars == [Bar("slow", 0.3, ">=", 0.8)]
    assert tables.bars_met(read_results([path]).bars) == "0 of 1 bars are met, 1 missed"


# ---- one home after the other ------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """measured(homes, seconds): a run of one part, whose steps take so long."""

    def run(homes, seconds):
        def medians(steps, *_):
            return {name: 1e-3 if name == "copy" else seconds for name in steps}

        def part(run):
            makers = {name: lambda: [int] for name in (*run.homes, "a peer")}
            run.share("work", "1 M", 1000, makers, 0.9)

        monkeypatch.setattr(gpu_bars, "medians", medians)
        monkeypatch.setattr(gpu_bars, "PARTS", (part,))
        settings = ["--device", "cpu", "--output", str(tmp_path), *(["--homes", homes] if homes else [])]
        return gpu_bars.main(settings)

    return run


def test_runs_of_one_home_after_the_other_are_merged(measured, tmp_path):
    assert measured("cpp", 1e-3) == 0
    assert measured("numba", 4e-3) == 1
    suites = read(tmp_path / "bars.json")
    assert {name: [bar.reached for bar in suite.bars] for name, suite in suites.items()} == {
        "gpu cpp": [1.0],
        "gpu numba": [0.25],
    }
    rows = {(row["who"], row["seconds"]) for row in json.loads((tmp_path / "times.json").read_text())}
    assert rows == {("cpp", 1e-3), ("numba", 4e-3), ("a peer", 4e-3)}, "of the same work the later time is kept"
    assert gpu_counters.timed_in(tmp_path)["work", "cpp"] == pytest.approx(1e-3)
    text = (tmp_path / "bars.md").read_text()
    assert "| work, cpp: share of the copy | 1.00 | >= 0.9 | met |" in text
    assert "| work, numba: share of the copy | 0.25 | >= 0.9 | MISSED |" in text
    assert measured("", 1e-3) == 0
    assert [suite.bars[0].reached for suite in read(tmp_path / "bars.json").values()] == [1.0, 1.0]


def test_homes_and_folders_that_do_not_fit_are_refused(measured, tmp_path, capsys):
    with pytest.raises(SystemExit):
        measured("cuda", 1e-3)
    assert "--homes must be among cpp, numba; got cuda" in capsys.readouterr().err
    save(Suite([], [], ""), "gpu cpp", tmp_path / "bars.json")
    content = json.loads((tmp_path / "bars.json").read_text())
    content["machine_info"]["device"] = "Another"
    (tmp_path / "bars.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        measured("cpp", 1e-3)
    assert "has results of Another" in capsys.readouterr().err
