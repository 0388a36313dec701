"""What a GPU is predicted to reach, on code made up here; the committed prediction has a row for every share that is timed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.gpu import gpu_counters, gpu_predicted
from bench.gpu.gpu_machine_code import INSTRUCTION
from bench.gpu.gpu_paths import PATHS, shortest
from bench.gpu.gpu_paths import Path as Way
from bench.gpu.gpu_predicted import GPUS, Count, expected, words_of

COMMITTED = Path(__file__).resolve().parents[2] / "bench" / "results" / "gpu_predicted.md"
H100, H200 = GPUS


def counted(**changes):
    plain = {"work": "", "home": "cuda", "instructions": 10, "integer": 0, "special": 0, "half": 0, "moved": 12, "read": 8}
    return Count(**{**plain, "in_flight": 1e5, "warps": 32, **changes})


def test_the_least_of_the_limits_binds():
    slots = 132 * 4 * 1.755e9 * 32 / 3.0e12 * 12  # of an element in the time of its bytes
    assert counted().at_most(H100) == 1
    assert counted().binds(H100) == "memory"
    for kind, rate in (("instructions", 1), ("integer", 2), ("half", 2), ("special", 8)):
        slow = counted(**{kind: 2 * slots / rate})
        assert slow.at_most(H100) == pytest.approx(0.5), kind
        assert slow.without_overlap(H100) == pytest.approx(1 / 3), kind
        names = {"instructions": "issue", "half": "float64", "special": "special functions"}
        assert slow.binds(H100) == names.get(kind, kind)
        assert slow.at_most(H200) == pytest.approx(0.5 * 3.0 / 4.3), kind
    few = counted(in_flight=0.5 * 3.0e12 * 8 / 12 * gpu_predicted.LATENCY / 132)
    assert few.at_most(H100) == pytest.approx(0.5)
    assert few.binds(H100) == "bytes in flight"


def lines(*instructions):
    """Instructions as (operation, operands)."""
    return [(one.split(" ", 1)[0], one.partition(" ")[2]) for one in instructions]


def test_the_shortest_way_makes_every_access_and_takes_no_call():
    code = lines(
        "MOV R1",
        "LDG.E.128 R4",  # 1
        "BRA @P0 0x50",  # 2: to 5
        "CALL 0x90",  # 3: of what is seldom needed
        "BRA 0x60",  # 4: to 6
        "FMUL R4",  # 5
        "STG.E.128 R4",  # 6
        "BRA @!P1 0x00",  # 7: the next chunk
        "EXIT ",
    )
    assert shortest(code, {"LDG.E.128": 1, "STG.E.128": 1}) == ["LDG.E.128", "BRA", "FMUL", "STG.E.128", "BRA", "MOV"]
    assert shortest(code, {"LDG.E.128": 2, "STG.E.128": 1}).count("STG.E.128") == 2
    with pytest.raises(ValueError, match="no way round"):
        shortest(code, {"MUFU.RSQ": 1})


def test_a_kernel_of_another_length_must_be_read_anew():
    class Kernel:
        name, code = "kernel", lines("A", "B", "C")

    assert Way(3, 1, [(2, 0, 1), (1, 1, 3)]).of(Kernel) == ["A", "A", "B", "C"]
    with pytest.raises(ValueError, match="a kernel of 4 instructions was read, this one has 3"):
        Way(4, 1, []).of(Kernel)


def test_predicates_are_kept_with_operands():
    found = INSTRUCTION.match("        /*0160*/              @!P0 BRA 0x1b0 ;")
    assert found.groups() == ("@!P0 ", "BRA", " 0x1b0 ")


def test_spans_are_within_their_kernels():
    for work, (_, way) in PATHS.items():
        assert all(0 <= first < stop <= way.length and times > 0 for times, first, stop in way.spans), work


@pytest.mark.parametrize(
    ("work", "words"),
    [
        ("steepest_step, one tensor, float32, q = 1", (2, 1)),
        ("factor_step, tied, L = 10, q = 2", (3, 3)),
        ("factor_step, full, L = 3, q = 1", (4, 4)),
        ("factor_product, forward, L = 10", (10, 1)),
        ("factor_product, backward, L = 3", (4, 3)),
        ("mirror_step, L = 2, q = 1", (2, 1)),
    ],
)
def test_bytes_are_the_fewest(work, words):
    assert words_of(work) == words


def test_the_committed_prediction_has_every_case_that_is_timed():
    text = COMMITTED.read_text()
    assert "nothing here was measured" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")][2:]
    predicted = {(row[0], row[1]): row for row in rows}
    cases = [case for case, _ in gpu_counters.cases(64, ("cuda", "triton"), "cpu")]
    assert {(case.work, case.home) for case in cases} <= set(predicted)
    for (work, _), row in predicted.items():
        low, high = (float(number) for number in re.findall(r"[\d.]+", expected(work)))
        most, floor = float(row[9]), float(row[11])
        assert 0 < floor <= most <= 1
        assert low <= max(most * 1.98 / 1.755, most) + 0.005, f"{work}: less than expected is possible at most"
        assert float(row[6]) == sum(words_of(work)) * (2 if "bfloat16" in work else 4)
        assert high <= 1
