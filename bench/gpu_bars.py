"""What every op must reach on a GPU: `python -m bench.gpu_bars --output DIR` writes bars.json and bars.md there.

Timed between device events, turn by turn with a device-to-device copy of as many bytes; a result is timed only after slices
of it were found to be those of the definition in float64. Sizes are cut to the memory that is free. torch.compile's steps,
which take half a minute each to compile, are left out. `--device cpu --scale 1e-4` tries the code without a GPU: the CPU's
homes stand for the GPU's, and the figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import pysteep
from pysteep import SteepestDescent

from . import machine
from .contenders import contenders
from .gpu_flow import flow_seconds
from .gpu_timing import host_medians, medians
from .gpu_works import (
    DECAY,
    LLAMA_8B,
    LR,
    FactorProduct,
    FactorStep,
    MirrorStep,
    Steepest,
    fitting,
)
from .launches import launches as counted_launches
from .reporting import Bar, Suite, save
from .timing import LARGEST_COPY, Step, copy_of
from .works import MANY_TINY, Work

HOMES = {"cuda": ("cuda", "triton"), "cpu": ("cpp", "numba")}
PEERS = ("torch SGD fused", "torch SGD foreach")
QS = (1.0, 1.5, 1.7, 2.0)
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


class Time(NamedTuple):
    """A row of the table: how long one call took beside a copy of as many bytes."""

    work: str
    size: str
    who: str
    seconds: float
    moved: int
    share_of_copy: float

    def cells(self) -> list[str]:
        shown = (f"{self.moved / self.seconds / 1e9:.0f}", f"{self.share_of_copy:.3f}") if self.moved else ("", "")
        return [self.work, self.size, self.who, f"{self.seconds * 1e6:.4g}", *shown]


def attempt(make: Callable[[], Any]) -> tuple[Any, str]:
    """What `make` gives and "", or None and why not: no failure of one contender keeps the others from being measured."""
    try:
        return make(), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".split("\n", 1)[0]


class Run:
    """One run on one device: its settings, and the bars and times so far, which are written after each part."""

    def __init__(self, device: str, scale: float, rounds: int, output: Path) -> None:
        self.device, self.scale, self.rounds, self.output = device, scale, rounds, output
        self.seed = secrets.randbits(32)
        self.numbers = torch.Generator(device).manual_seed(self.seed)
        self.homes = {name: backend.reason if not backend.available else "" for name, backend in pysteep.backends().items()}
        self.bars: list[Bar] = []
        self.times: list[Time] = []

    def fitting(self, work: Work, itemsize: int, copies: int) -> Work:
        return fitting(work, itemsize, copies, self.scale, self.device)

    def elements(self, most: int, copies: int) -> int:
        """Of a float32 tensor, so many that `copies` of it fit."""
        return self.fitting(Work("", ((most,),)), 4, copies).weights

    def share(self, work: str, size: str, moved: int, makers: dict[str, Callable[[], Step]], bar: float) -> dict[str, float]:
        """Time what the makers give, by their names beside a copy; a bar for each of this package's homes among them."""
        steps: dict[str, Step] = {}
        reasons: dict[str, str] = {}
        for name, make in makers.items():
            reasons[name] = self.homes.get(name, "")
            if not reasons[name]:
                step, reasons[name] = attempt(make)
                steps |= {name: step} if step else {}
        times: dict[str, float] = {}
        if steps:
            copied = min(moved, LARGEST_COPY)
            times = medians({"copy": copy_of(copied, self.device), **steps}, self.rounds, self.device)
            limit = times.pop("copy") * moved / copied
            self.times += [Time(work, size, name, seconds, moved, limit / seconds) for name, seconds in times.items()]
        for name in makers:
            if name in HOMES[self.device]:
                reached = limit / times[name] if name in times else None
                self.bars.append(Bar(f"{work}, {name}: share of the copy", reached, ">=", bar, reasons[name]))
        return times

    def suite(self) -> Suite:
        rows = ["| work | size | who | µs | GB/s | share of the copy |", "|---|---|---|---|---|---|"]
        rows += ["| " + " | ".join(time.cells()) + " |" for time in self.times]
        conditions = (
            f"medians of {self.rounds} rounds in turn with a copy, scale {self.scale:g}, random numbers of seed {self.seed}"
        )
        return Suite(self.bars, ["\n".join(rows)], conditions)

    def write(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        suite = self.suite()
        save(suite, "gpu", self.output / "bars.json", self.device)
        (self.output / "times.json").write_text(json.dumps([time._asdict() for time in self.times]) + "\n")
        title = f"{machine.device_name(self.device)}, {suite.conditions}"
        (self.output / "bars.md").write_text("\n\n".join([title, *suite.tables, suite.text()]) + "\n")


# ---- the parts of a run ------------------------------------------------------------------------------------------------------


def one_large(run: Run) -> None:
    for dtype, elements in ((FLOAT32, 1 << 30), (BFLOAT16, 1 << 31)):
        one_large_of(run, dtype, elements)
        release(run)


def one_large_of(run: Run, dtype: torch.dtype, elements: int) -> None:
    work = run.fitting(Work("one tensor", ((elements,),)), dtype.itemsize, 3)
    operands = Steepest(work, dtype, run.numbers)
    for q in QS:
        makers = {home: lambda home=home, q=q: operands.step(home, q) for home in HOMES[run.device]}
        title = f"steepest_step, one tensor, {str(dtype).removeprefix('torch.')}, q = {q:g}"
        run.share(title, f"{work.weights / 1e6:g} M", operands.moved, makers, 0.92)


def llama(run: Run) -> None:
    work = run.fitting(LLAMA_8B, BFLOAT16.itemsize, 3)  # foreach makes a copy
    operands = Steepest(work, BFLOAT16, run.numbers)
    size = f"{work.weights / 1e6:.0f} M"
    parameters = operands.parameters()
    peers = {c.name: c for c in contenders(run.device) if c.name in PEERS and not c.missing}
    for q in QS:
        makers: dict[str, Callable[[], Step]] = {
            home: lambda home=home, q=q: operands.step(home, q) for home in HOMES[run.device]
        }
        makers |= {name: lambda peer=peer: peer.make(parameters, 2.0) for name, peer in peers.items() if q == 2}
        times = run.share(f"steepest_step, {work.name}, bfloat16, q = {q:g}", size, operands.moved, makers, 0.9)
    fastest = min((times[name] for name in peers if name in times), default=None)
    for home in HOMES[run.device]:
        reached = fastest / times[home] if fastest is not None and home in times else None
        name = f"{work.name}, bfloat16, q = 2, {home}: fastest peer's time / time"
        run.bars.append(Bar(name, reached, ">=", 1.0, "" if reached else run.homes[home] or "no peer ran"))
        run.bars.append(launches(run, work, home, parameters))


def launches(run: Run, work: Work, home: str, parameters: list[torch.nn.Parameter]) -> Bar:
    """Of a step as a user takes it."""
    name, reason = f"{work.name}, {home}: launches of a step", run.homes[home]
    if reason:
        return Bar(name, None, "<=", 4, reason)
    step = SteepestDescent(parameters, lr=LR, weight_decay=DECAY, backend=home).step
    found, reason = attempt(lambda: counted_launches(step, run.device))
    return Bar(name, found or None, "<=", 4, reason or ("" if found else "the profiler saw no kernel"))


def many_tiny(run: Run) -> None:
    """How long a step keeps the host."""
    parameters = Steepest(MANY_TINY, FLOAT32, run.numbers).parameters()
    peer = "torch SGD fused"
    steps: dict[str, Step] = {peer: torch.optim.SGD(parameters, lr=LR, weight_decay=DECAY, fused=True).step}
    reasons = {}
    for home in HOMES[run.device]:
        step, reasons[home] = attempt(
            lambda home=home: SteepestDescent(parameters, lr=LR, weight_decay=DECAY, backend=home).step
        )
        if step:
            _, reasons[home] = attempt(step)
        steps |= {} if reasons[home] else {home: step}
    times = host_medians(steps, run.rounds, run.device)
    run.times += [Time(f"{MANY_TINY.name}, host", "1288", name, seconds, 0, 0.0) for name, seconds in times.items()]
    for home in HOMES[run.device]:
        reached = times[home] / times[peer] if home in times else None
        run.bars.append(Bar(f"{MANY_TINY.name}, {home}: host's time / torch fused SGD's", reached, "<=", 0.5, reasons[home]))


def factor_steps(run: Run) -> None:
    for stored, depth in ((2, 2), (2, 3), (2, 10), (3, 3)):
        factor_steps_at(run, stored, depth)
        release(run)


def factor_steps_at(run: Run, stored: int, depth: int) -> None:
    elements = run.elements(400_000_000, stored + 3)
    operands = FactorStep(elements, stored, depth, run.numbers)
    kind = "full" if stored == depth > 2 else "tied"
    for q in (1.0, 2.0):
        makers = {home: lambda home=home, q=q: operands.step(home, q) for home in HOMES[run.device]}
        title = f"factor_step, {kind}, L = {depth}, q = {q:g}"
        run.share(title, f"{elements / 1e6:g} M", operands.moved, makers, 0.9)


def factor_products(run: Run) -> None:
    for depth in (3, 10):
        factor_products_at(run, depth)
        release(run)


def factor_products_at(run: Run, depth: int) -> None:
    elements = run.elements(1_000_000_000 // depth, 2 * depth + 4)
    operands = FactorProduct(elements, depth, run.numbers)
    for way, moved, make in (
        ("forward", operands.moved_forward, operands.forward),
        ("backward", operands.moved_backward, operands.backward),
    ):
        makers = {home: lambda home=home, make=make: make(home) for home in HOMES[run.device]}
        run.share(f"factor_product, {way}, L = {depth}", f"{elements / 1e6:g} M", moved, makers, 0.9)


def mirror_steps(run: Run) -> None:
    elements = run.elements(500_000_000, 3)
    operands = MirrorStep(elements, run.numbers)
    for depth in (2, 10):
        for q in (1.0, 2.0):
            makers = {home: lambda home=home, d=depth, q=q: operands.step(home, d, q) for home in HOMES[run.device]}
            run.share(f"mirror_step, L = {depth}, q = {q:g}", f"{elements / 1e6:g} M", operands.moved, makers, 0.8)


def flows(run: Run) -> None:
    """A bar for the first home alone, on a GPU that of CUDA; Triton's is in the table."""
    of_cpu, absent = attempt(lambda: flow_seconds("cpu", "cpp", 64, run.scale, run.seed))
    times = {"cpp, two cores, 64 runs": of_cpu}
    reasons = {}
    for home in HOMES[run.device]:
        seconds, reasons[home] = attempt(lambda home=home: flow_seconds(run.device, home, 4096, run.scale, run.seed))
        times[home] = seconds
    run.times += [Time("diagonal_flow, a step of a run", "4096 runs", who, t, 0, 0.0) for who, t in times.items() if t]
    first = HOMES[run.device][0]
    reached = of_cpu / times[first] if of_cpu and times[first] else None
    name = "diagonal_flow, 4096 runs at once, a step of a run: two cores' C++ / time"
    run.bars.append(Bar(name, reached, ">=", 50.0, absent or reasons[first]))


PARTS = (one_large, llama, factor_steps, mirror_steps, factor_products, many_tiny, flows)


def release(run: Run) -> None:
    gc.collect()
    if run.device == "cuda":
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_bars", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the code (default cuda)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the sizes (default 1)")
    parser.add_argument("--rounds", type=int, default=10, help="timings of each contender (default 10)")
    parser.add_argument("--output", type=Path, required=True, help="folder for bars.json and bars.md")
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch sees; --device cpu tries the code without one")
    run = Run(asked.device, asked.scale, asked.rounds, asked.output)
    for part in PARTS:
        part(run)
        release(run)
        run.write()
        print(f"done: {part.__name__}", flush=True)
    suite = run.suite()
    print(*suite.tables, suite.text(), sep="\n\n")
    return 0 if suite.met else 1


if __name__ == "__main__":
    sys.exit(main())
