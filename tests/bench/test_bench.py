"""The benchmarks themselves: works are those of real models, wrong answers are not timed, files say what was measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

import pysteep
from bench import bars
from bench.measure import machine, models, operations, works
from bench.measure.launches import launches
from bench.measure.reporting import Bar, Suite, save
from bench.measure.timing import medians
from bench.peers import contenders, depth

ROOT = Path(__file__).resolve().parents[2]
SMALL = works.Work("small", ((3, 7), (4096,), (129,), ()))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As from a shell: pytest-benchmark measures nothing within a worker of pytest-xdist."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


def shapes_of(net: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(param.shape) for param in net.parameters()]


@pytest.mark.parametrize("name", ["vit_large", "bert_base", "llama_8b"])
def test_shapes_are_those_of_the_models(name: str) -> None:
    with torch.device("meta"):
        if name == "vit_large":
            size = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
            net: nn.Module = ViTForImageClassification(ViTConfig(**size, num_labels=1000))
        elif name == "bert_base":
            net = BertModel(BertConfig())
        else:
            size = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
            net = LlamaForCausalLM(LlamaConfig(vocab_size=128256, intermediate_size=14336, **size))
    assert sorted(getattr(models, name)()) == sorted(shapes_of(net))


def test_resnet50_has_the_weights_it_is_known_for() -> None:
    assert len(models.resnet50()) == 161
    assert works.RESNET50.weights == 25_557_032


def test_a_part_of_a_work() -> None:
    assert SMALL.at_most(10**9) == SMALL
    part = SMALL.at_most(100)
    assert part.shapes == ((3, 7), (79,))
    assert part.bytes(torch.bfloat16) == 600
    assert SMALL.at_most(21).shapes == ((3, 7),)


def test_parameters_of_a_work_are_random_and_apart() -> None:
    parameters = works.Work("", ((works.PERIOD + 77,), (50,))).parameters(torch.bfloat16)
    for p in parameters:
        assert p.grad is not None
        assert bool((p != 0).all())
        assert bool((p.grad != 0).all())
        assert not torch.equal(p, p.grad)
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == 1
    assert parameters[0].data_ptr() + parameters[0].nbytes <= parameters[1].data_ptr()


def test_a_sample_sees_the_end() -> None:
    t = torch.zeros(1_000_003)
    t[-1] = 1
    (found,) = works.sample([t], 1000)
    assert found[-1] == 1
    assert 1000 <= len(found) <= 1100


PRESENT = [c for c in contenders.contenders() if not c.missing and "compile" not in c.name]


@pytest.mark.parametrize("contender", PRESENT, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_contender_descends(contender: contenders.Contender, dtype: torch.dtype) -> None:
    for q in contender.qs:
        parameters = SMALL.parameters(dtype)
        if contender.name == "torch SGD fused" and dtype == torch.bfloat16:  # pytorch#191763
            with pytest.raises(AssertionError, match="torch SGD fused is wrong"):
                contenders.check(contender, parameters, q)
        else:
            contenders.check(contender, parameters, q)


def nothing(_: list[nn.Parameter], __: float) -> contenders.Step:
    return lambda: None


def without_decay(parameters: list[nn.Parameter], q: float) -> contenders.Step:
    return pysteep.SteepestDescent(parameters, lr=contenders.LR, q=q).step


def but_the_last(parameters: list[nn.Parameter], q: float) -> contenders.Step:
    return pysteep.SteepestDescent(parameters[:-1], lr=contenders.LR, q=q, weight_decay=contenders.DECAY).step


@pytest.mark.parametrize("make", [nothing, without_decay, but_the_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("q", contenders.EVERY)
def test_a_wrong_contender_is_found(make: contenders.Make, dtype: torch.dtype, q: float) -> None:
    with pytest.raises(AssertionError, match=f"broken is wrong at q = {q}"):
        contenders.check(contenders.Contender("broken", make, (q,)), SMALL.parameters(dtype), q)


def test_a_wrong_contender_at_depth_is_found() -> None:
    right = depth.factor_step_contenders(3, 2.0, "full")[0]

    def half_the_lr(parameters: list[nn.Parameter], lr: float):
        step, _ = right.make(parameters, lr / 2)
        return step, right.make(parameters, lr)[1]

    depth.check(right, SMALL.parameters())
    with pytest.raises(AssertionError, match="broken is wrong"):
        depth.check(depth.Contender("broken", 8, half_the_lr, 3), SMALL.parameters())


def test_launches() -> None:
    def of(name: str, q: float) -> int:
        (found,) = [c for c in contenders.contenders() if c.name == name]
        return launches(found.make(SMALL.parameters(), q))

    assert of("pysteep numba", 1.0) == 1
    assert of("torch eager", 1.0) == 3 * len(SMALL.shapes)  # sign, mul_, sub_
    assert of("torch SGD fused", 2.0) == 1


def test_operations_of_the_power_are_those_of_its_polynomials() -> None:
    header = (ROOT / "csrc/math/power_coefficients.h").read_text()
    logarithm, exponential = (
        int(count) - 1 for count in re.findall(r"struct \w+<float> \{\s+static constexpr int count = (\d+)", header)
    )
    assert operations.power(1.7) == (2 * logarithm + 3) + (2 * exponential + 12)
    assert operations.factor_step(1, 1.7, "full") - operations.factor_step(1, 2.0, "full") == operations.power(1.7)
    assert [operations.integer_power(n) for n in (0, 1, 2, 3, 8)] == [0, 0, 1, 2, 3]


FIELDS = {"suite", "work", "contender", "dtype", "q", "microseconds", "launches", "versions", "device", "commit"}


@pytest.mark.slow
def test_results_say_what_was_measured_and_who_was_absent(tmp_path: Path) -> None:
    selected = (
        "steepest and ResNet and float32 and (q1-bits or q2-pysteep or q2-torch) and not compile",
        "steepest and ResNet and bfloat16-q2-torch and fused",
        "12 and tied-depth3-q1-",
        "diagonal_flow and one and cpp",
        "scaling and 1000-float32 and cpp",
    )
    selection = " or ".join(f"({each})" for each in selected)
    file = tmp_path / "benchmarks.json"
    options = ["--benchmark-only", f"--benchmark-json={file}", "--at-most", "2000", "-q", "-p", "no:cacheprovider"]
    done = run("pytest", "bench", *options, "-k", selection)
    assert done.returncode == 0, done.stdout[-2000:]
    found = json.loads(file.read_text())
    assert found["machine_info"]["folder"] == machine.folder("cpu")
    assert found["commit_info"]["id"] == machine.commit()["id"]
    assert set(found["ceilings"]) == {"copy_gigabytes_per_second", "triad_gigabytes_per_second", "gigaflops"}
    assert {"contender": "bitsandbytes Lion", "reason": "needs a GPU", "suite": None, "work": None} in [
        {**entry, "suite": None, "work": None} for entry in found["absent"]
    ]
    suites = {benchmark["extra_info"]["suite"] for benchmark in found["benchmarks"]}
    assert suites == {"steepest_step", "factor_step", "diagonal_flow", "scaling"}
    for benchmark in found["benchmarks"]:
        info = benchmark["extra_info"]
        assert set(info) >= FIELDS, benchmark["name"]
        assert info["microseconds"] == pytest.approx(benchmark["stats"]["median"] * 1e6, abs=0.01)
        if info["bytes"]:
            assert info["gigabytes_per_second"] == pytest.approx(info["bytes"] / info["microseconds"] / 1e3, rel=0.1, abs=0.01)
            assert info["share_of_triad"] == pytest.approx(info["triad_microseconds"] / info["microseconds"], rel=0.1, abs=0.01)
            assert {"copy_microseconds", "share_of_copy"} <= set(info)
    report = run("bench", "report", str(file))
    assert report.returncode == 0, report.stderr
    text = (tmp_path / "report.md").read_text()
    assert "bitsandbytes Lion" in text
    assert "its first 2000 weights" in text


@pytest.mark.slow
def test_every_benchmark_of_pysteep_runs() -> None:
    done = run(
        "pytest", "bench", "--benchmark-disable", "--at-most", "2000", "-q", "-p", "no:cacheprovider", "-k", "cpp and not 161"
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 100


def test_medians_take_turns() -> None:
    turns: list[str] = []
    medians({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, 3)
    changes = sum(one != other for one, other in pairwise(turns))
    assert changes == 2 * (3 + 1) - 1


def test_bars_are_met_missed_or_not_measured(tmp_path: Path) -> None:
    assert Bar("", 1.0, "<=", 1.0).met
    assert not Bar("", 1.0, ">=", 1.1).met
    unmeasured = Bar("x", None, ">=", 1.0, "no GPU")
    assert not unmeasured.met
    assert unmeasured.row() == "| x | not measured | >= 1 | no GPU |"
    file = tmp_path / "bars.json"
    save(Suite([Bar("a", 2.0, "<=", 1.0)], ["table"], "by hand"), "depth", file)
    save(Suite([unmeasured], [], "by hand"), "flow", file)
    kept = json.loads(file.read_text())["suites"]
    assert list(kept) == ["depth", "flow"]
    bar = {"name": "a", "reached": 2.0, "sign": "<=", "bar": 1.0, "reason": "", "expected": "", "met": False}
    assert kept["depth"]["bars"] == [bar]
    assert kept["flow"]["bars"][0]["reached"] is None


def test_an_unknown_suite_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bars.main(["flow", "foo"])
    assert "SUITE must be among steepest_step, depth, flow" in capsys.readouterr().err
