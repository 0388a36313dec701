"""The bars of a GPU, tried on a CPU at a thousandth of their size: the code runs, and every bar has a figure or a reason."""

from __future__ import annotations

import json
import math

import pytest
import torch

from bench import gpu_bars, gpu_counters
from bench.gpu_works import LLAMA_8B, FactorStep, Slices, Steepest, WrongResultError, check_written, fitting
from bench.works import Work
from pysteep import backends, functional

pytestmark = pytest.mark.skipif(not backends()["cpp"].available, reason="the extension is not built")


@pytest.mark.slow
def test_every_bar_is_reached_or_says_why_not(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_bars, "HOMES", {"cpu": ("cpp", "cuda")})
    settings = {"--device": "cpu", "--scale": "2e-5", "--rounds": "1", "--output": str(tmp_path)}
    assert gpu_bars.main([word for pair in settings.items() for word in pair]) in (0, 1)
    report = json.loads((tmp_path / "bars.json").read_text())
    assert report["machine_info"]["kind"] == "cpu"
    suite = report["suites"]["gpu"]
    by_home = {home: [bar for bar in suite["bars"] if f", {home}:" in bar["name"]] for home in ("cpp", "cuda")}
    assert len(by_home["cpp"]) == len(by_home["cuda"]) == 8 + 4 + 2 + 8 + 4 + 4 + 1
    assert len(suite["bars"]) == 2 * 31 + 1  # and one of diagonal_flow
    for bar in by_home["cpp"]:
        assert math.isfinite(bar["reached"])
        assert bar["reached"] > 0
    if not torch.cuda.is_available():
        assert all(bar["reached"] is None and bar["reason"] and not bar["met"] for bar in by_home["cuda"])
    timed = {(row["work"], row["who"]) for row in json.loads((tmp_path / "times.json").read_text())}
    assert {(case.work, case.home) for case, _ in gpu_counters.cases(64, ("cpp",), "cpu")} <= timed
    assert len((tmp_path / "bars.md").read_text().splitlines()) > 70


def test_works():
    assert (len(LLAMA_8B.shapes), LLAMA_8B.weights) == (291, 8_030_261_248)
    assert fitting(LLAMA_8B, 2, 3, 1.0, "cpu") is LLAMA_8B
    small = fitting(LLAMA_8B, 2, 3, 1e-3, "cpu")
    assert len(small.shapes) == 291
    assert 7e6 < small.weights < 9e6


def wrong(monkeypatch, op, spoil):
    right = getattr(functional, op)

    def run(*operands, **options):
        right(*operands, **options)
        spoil(operands)

    monkeypatch.setattr(functional, op, run)


@pytest.mark.parametrize("at", [0, 99_999])
def test_a_wrong_result_is_not_timed(monkeypatch, at):
    wrong(monkeypatch, "steepest_step", lambda operands: operands[0][0].view(-1)[at].mul_(1.001))
    numbers = torch.Generator().manual_seed(0)
    with pytest.raises(WrongResultError, match="steepest_step by cpp is wrong"):
        Steepest(Work("", ((100_000,),)), torch.float32, numbers).step("cpp", 1.7)


def test_an_element_that_is_not_written_is_found(monkeypatch):
    wrong(monkeypatch, "factor_step", lambda operands: operands[0][0][50_001].fill_(torch.nan))
    numbers = torch.Generator().manual_seed(0)
    with pytest.raises(WrongResultError, match="left elements unwritten"):
        FactorStep(100_000, 2, 3, numbers).step("cpp", 1.0)
    check_written("", torch.ones(3))


def test_slices_hold_the_head_and_the_tail():
    tensors = [torch.arange(50_000.0), torch.arange(7.0)]
    parts = Slices(tensors, torch.Generator().manual_seed(0)).of(tensors)
    assert parts[0][0] == 0
    assert max(part[-1].item() for part in parts) == 49_999
    assert torch.equal(parts[-1], torch.arange(7.0, dtype=torch.float64))
