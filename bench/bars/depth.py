"""What the depth ops must reach on a CPU: `python -m bench bars depth`."""

from __future__ import annotations

import gc
from dataclasses import replace

import torch

import pysteep

from ..measure.reporting import Bar, Suite
from ..measure.timing import medians, triad_of
from ..peers import depth as works
from ..peers.depth import Contender
from ..peers.depth_cases import one

ROUNDS = 15
ONE = one("cpu")
Times = dict[str, float]  # with the triad


def times_of(title: str, contenders: list[Contender], rounds: int) -> tuple[Times, str]:
    """Median seconds by contender and of the triad over the same bytes, and a table of them."""
    present = [contender for contender in contenders if not contender.missing]
    steps = {"triad": triad_of(ONE.bytes(torch.float32, present[0].words))}
    for contender in present:
        steps[contender.name] = works.check(contender, ONE.parameters())
    times = medians(steps, rounds)
    lines = [f"| {title} | ms | against the triad |", "|---|---|---|"]
    lines += [f"| {name} | {seconds * 1e3:.1f} | {seconds / times['triad']:.2f} |" for name, seconds in times.items()]
    lines += [f"| {contender.name} | absent: {contender.missing} | |" for contender in contenders if contender.missing]
    del steps
    gc.collect()
    return times, "\n".join(lines)


def tied_depths(rounds: int) -> tuple[Times, str]:
    """Tied steps at depths 2, 3 and 10 in one run."""
    found = [works.factor_step_contenders(depth, 2.0, "tied")[0] for depth in (2, 3, 10)]
    named = [replace(contender, name=f"depth {contender.depth}") for contender in found]
    return times_of("factor_step tied, q = 2, pysteep cpp", named, rounds)


def state_bytes(storage: str) -> float:
    """Bytes of optimiser state for each float32 weight at depth 10."""
    p = torch.nn.Parameter(torch.randn(1000, 1000))
    optimizer = pysteep.SteepestDescent([p], depth=10, storage=storage, init="balanced")
    p.grad = torch.randn(1000, 1000)
    optimizer.step()
    return sum(t.numel() * t.element_size() for t in optimizer.state[p].values() if t.ndim) / p.numel()


def measure(rounds: int) -> Suite:
    torch._dynamo.config.recompile_limit = 100

    rows: list[Bar] = []
    tables: list[str] = []
    cpp = "pysteep cpp"
    for depth, bar in ((2, 4.0), (10, 12.0)):
        for q in (1.0, 1.5, 2.0):
            times, table = times_of(
                f"factor_step full, depth {depth}, q = {q:g}", works.factor_step_contenders(depth, q, "full"), rounds
            )
            tables.append(table)
            if q == 2:
                ratio = times["torch chain + SGD"] / times[cpp]
                rows.append(Bar(f"factor_step full, depth {depth}: torch product + backward + SGD / time", ratio, ">=", bar))
            rows.append(
                Bar(f"factor_step full, depth {depth}, q = {q:g}: time / triad", times[cpp] / times["triad"], "<=", 1.25)
            )
    for q in (1.0, 1.5, 2.0):
        times, table = times_of(f"factor_step tied, depth 10, q = {q:g}", works.factor_step_contenders(10, q, "tied"), rounds)
        tables.append(table)
        rows.append(Bar(f"factor_step tied, depth 10, q = {q:g}: time / triad", times[cpp] / times["triad"], "<=", 1.25))
    times, table = tied_depths(rounds)
    tables.append(table)
    rows.append(Bar("factor_step tied: depth 10 / depth 2", times["depth 10"] / times["depth 2"], "<=", 1.15))
    for depth, bar in ((3, 2.0), (10, 4.0)):
        times, table = times_of(
            f"factor_product forward + backward, depth {depth}", works.factor_product_contenders(depth), rounds
        )
        tables.append(table)
        rows.append(Bar(f"factor_product, depth {depth}: torch chain / time", times["torch chain"] / times[cpp], ">=", bar))
    for depth, q, bar in (
        (2, 1.0, 1.5),
        (2, 2.0, 1.5),
        (2, 1.7, 4.0),
        (3, 1.0, 4.0),
        (10, 1.0, 4.0),
        (10, 2.0, 4.0),
        (10, 1.7, 4.0),
    ):
        times, table = times_of(
            f"mirror_step, depth {depth}, q = {q:g}", works.factor_step_contenders(depth, q, "implicit"), rounds
        )
        tables.append(table)
        rows.append(Bar(f"mirror_step, depth {depth}, q = {q:g}: time / triad", times[cpp] / times["triad"], "<=", bar))
    for storage, bar in (("tied", 8.0), ("implicit", 0.0)):
        rows.append(Bar(f"state at depth 10, {storage}: bytes a weight", state_bytes(storage), "<=", bar))

    return Suite(rows, tables, f"{ONE.weights / 1e6:g} M float32 weights, medians of {rounds} rounds taken in turn")
