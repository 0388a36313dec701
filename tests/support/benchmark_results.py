"""Results of the benchmarks of a machine that never was, as `bench` writes them, for tests of what is made of them."""

from __future__ import annotations

import re

MACHINE = {
    "device": "Some CPU, 2 cores",
    "kind": "cpu",
    "folder": "cpu-some",
    "threads": 2,
    "memory_gib": 23.5,
    "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "numba": None},
}
COMMIT = {"id": "0123456789abcdef", "dirty": False, "time": "2026-11-21T10:00:00"}
PICTURES = ["roofline", "steepest_step", "steepest_step_bfloat16", "depth", "diagonal_flow", "scaling"]
RESNET, TINY, WEIGHTS = "ResNet-50, 161 tensors", "161 tensors of 8", "12 M weights"
OURS, PEER, COMPILED = "pysteep cpp", "torch SGD fused", "torch.compile"


def timing(suite, work, contender, microseconds, **info):
    moved = info.get("bytes")
    triad = moved and moved / 60e3
    known = {
        "dtype": "float32",
        "q": None,
        "depth": None,
        "storage": None,
        "launches": None,
        "operations": None,
        "triad_microseconds": triad,
        "share_of_triad": triad and round(triad / microseconds, 3),
        "share_of_copy": moved and round(moved / 40e3 / microseconds, 3),
    }
    info = {"suite": suite, "work": work, "contender": contender, "microseconds": microseconds, "bytes": moved, **known, **info}
    stats = {"median": microseconds / 1e6, "iqr": 0.02 * microseconds / 1e6}
    return {"name": f"bench_{suite}", "params": {}, "extra_info": info, "stats": stats}


def steps():
    million = 1_000_000
    for q, time in ((1.0, 5110), (1.7, 8120), (2.0, 5130)):
        yield timing("steepest_step", RESNET, OURS, time, bytes=307 * million, q=q, operations=100 * million, launches=1)
        yield timing("steepest_step", TINY, OURS, 61.4, bytes=15456, q=q, operations=5000)
    yield timing("steepest_step", RESNET, PEER, 6240, bytes=307 * million, q=2.0, operations=100 * million)
    yield timing("steepest_step", TINY, PEER, 127, bytes=15456, q=2.0)
    yield timing("steepest_step", TINY, COMPILED, 493, bytes=15456, q=1.0)
    yield timing("steepest_step", RESNET, OURS, 4020, bytes=153 * million, q=1.0, dtype="bfloat16")
    for suite, storage, depth, time in (
        ("factor_step", "full", 2, 5250),
        ("factor_step", "full", 10, 18350),
        ("factor_step", "tied", 10, 4260),
        ("mirror_step", "implicit", 2, 2270),
        ("factor_product", None, 3, 24870),
    ):
        q = None if suite == "factor_product" else 2.0
        yield timing(
            suite, WEIGHTS, OURS, time, bytes=288 * million, q=q, depth=depth, storage=storage, operations=90 * million
        )
    yield timing("factor_step", WEIGHTS, "torch chain", 51350, bytes=288 * million, q=2.0, depth=2, storage="full")
    for contender, time in ((OURS, 0.35), ("JAX scan", 1.05)):
        yield timing("diagonal_flow", "64 problems", contender, time * 320_000, q=1.0, depth=2, steps=320_000)
    for contender, overhead in ((OURS, 8), (PEER, 12)):
        for size in (1000, 100_000, 10_000_000):
            grown = {"bytes": 12 * size, "q": 2.0, "over": "size", "at": size}
            yield timing("scaling", f"one tensor of {size}", contender, overhead + size / 5000, **grown)


def benchmarks():
    return {
        "machine_info": MACHINE,
        "commit_info": COMMIT,
        "datetime": "2026-11-21T18:00:00+00:00",
        "absent": [
            {"contender": "other Lion", "reason": "needs a GPU", "suite": "steepest_step"},
            {"contender": "slow SGD", "reason": "takes days", "suite": "steepest_step", "work": TINY},
            {"contender": COMPILED, "reason": "takes minutes", "suite": "steepest_step", "work": RESNET},
            {"contender": COMPILED, "reason": "takes hours", "suite": "scaling", "work": "one tensor of 10000000"},
        ],
        "ceilings": {"copy_gigabytes_per_second": 40.1, "triad_gigabytes_per_second": 60.2, "gigaflops": 183.0},
        "benchmarks": list(steps()),
    }


def times():
    """Of contenders that took turns."""
    of_triad = {RESNET: 5116.0, TINY: 0.26}
    for work, contender, q, time in (
        (RESNET, OURS, 1.0, 5110),
        (RESNET, OURS, 1.7, 8120),
        (RESNET, OURS, 1.5, 5130),
        (RESNET, PEER, 2.0, 6240),
        (TINY, OURS, 1.7, 61.4),
        (TINY, PEER, 2.0, 127),
        (TINY, COMPILED, 1.0, 493),
    ):
        known = {"work": work, "contender": contender, "q": q}
        yield {**known, "microseconds": time, "triad_microseconds": of_triad[work], "reason": ""}
    for work, contender, reason in (
        (RESNET, COMPILED, "takes minutes"),
        (RESNET, "other Lion", "needs a GPU"),
        (TINY, "other Lion", "needs a GPU"),
    ):
        yield {
            "work": work,
            "contender": contender,
            "q": None,
            "microseconds": None,
            "triad_microseconds": None,
            "reason": reason,
        }


def bars():
    first = {"name": "ResNet-50, q = 1: time / triad", "reached": 0.99, "sign": "<=", "bar": 1.15, "met": True}
    second = {"name": "ResNet-50, q = 1: torch fused SGD / time", "reached": 1.14, "sign": ">=", "bar": 1.2, "met": False}
    third = {"name": "tied: time / triad", "reached": None, "sign": "<=", "bar": 1.25, "reason": "no compiler"}
    suites = {
        "steepest_step": {
            "date": "2026-11-21",
            "conditions": "25 rounds",
            "tables": ["| a |\n|---|\n| 1 |"],
            "bars": [first, second],
            "times": list(times()),
        },
        "depth": {
            "date": "2026-11-21",
            "conditions": "9 rounds",
            "tables": ["| long |\n|---|\n" + "| 2 |\n" * 30],
            "bars": [third],
            "times": [],
        },
    }
    return {"machine_info": MACHINE, "commit_info": COMMIT, "suites": suites}


def rows(text):
    """The cells of each row of each table."""
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if line.startswith("|")]
