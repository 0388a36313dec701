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
import re
import secrets
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

import pysteep
from pysteep import SteepestDescent

from .contenders import contenders
from .gpu_flow import flow_seconds
from .gpu_timing import Copy, Step, host_medians, kernels_of, medians
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
from .works import MANY_TINY, Work

HOMES = {"cuda": ("cuda", "triton"), "cpu": ("cpp", "numba")}
PEERS = ("torch SGD fused", "torch SGD foreach")
QS = (1.0, 1.5, 1.7, 2.0)
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


class Bar(NamedTuple):
    """What was reached, or why nothing was; and what it must be at least (">=") or at most ("<=")."""

    name: str
    reached: float | None
    sign: str
    bar: float
    reason: str = ""

    @property
    def met(self) -> bool:
        return self.reached is not None and (self.reached <= self.bar if self.sign == "<=" else self.reached >= self.bar)


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
            copy = Copy(moved, self.device)
            times = medians({"copy": copy, **steps}, self.rounds, self.device)
            limit = times.pop("copy") * copy.share
            self.times += [Time(work, size, name, seconds, moved, limit / seconds) for name, seconds in times.items()]
        for name in makers:
            if name in HOMES[self.device]:
                reached = limit / times[name] if name in times else None
                self.bars.append(Bar(f"{work}, {name}: share of the copy", reached, ">=", bar, reasons[name]))
        return times

    def write(self) -> None:
        versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]}
        try:
            import triton

            versions["triton"] = triton.__version__
        except ImportError:
            pass
        name = torch.cuda.get_device_name() if self.device == "cuda" else "CPU"
        folder = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        conditions = f"medians of {self.rounds} rounds in turn, scale {self.scale:g}, random numbers of seed {self.seed}"
        suite = {
            "date": str(date.today()),
            "conditions": conditions,
            "tables": self.tables(),
            "times": [time._asdict() for time in self.times],
            "bars": [{**bar._asdict(), "met": bar.met} for bar in self.bars],
        }
        report = {
            "machine_info": {"device": name, "kind": self.device, "folder": folder, "versions": versions},
            "commit_info": commit(),
            "suites": {"gpu": suite},
        }
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "bars.json").write_text(json.dumps(report, indent=1) + "\n")
        (self.output / "bars.md").write_text("\n\n".join([f"{name}, {conditions}", *self.tables()]) + "\n")

    def tables(self) -> list[str]:
        times = ["| work | size | who | µs | GB/s | share of the copy |", "|---|---|---|---|---|---|"]
        times += ["| " + " | ".join(time.cells()) + " |" for time in self.times]
        bars = ["| bar | reached | bar | |", "|---|---|---|---|"]
        for bar in self.bars:
            reached = f"none: {bar.reason}" if bar.reached is None else f"{bar.reached:.3g}"
            bars.append(f"| {bar.name} | {reached} | {bar.sign} {bar.bar:g} | {'met' if bar.met else 'MISSED'} |")
        return ["\n".join(times), "\n".join(bars)]


def commit() -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        status = git("status", "--porcelain", "--untracked-files=no")
        return {"id": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}
    except FileNotFoundError:
        return {"id": None, "dirty": None}


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
    """Kernels of a step as a user takes it."""
    name, reason = f"{work.name}, {home}: launches of a step", run.homes[home]
    if run.device != "cuda":
        reason = reason or "kernels are counted on a GPU only"
    if reason:
        return Bar(name, None, "<=", 4, reason)
    step = SteepestDescent(parameters, lr=LR, weight_decay=DECAY, backend=home).step
    found, reason = attempt(lambda: kernels_of(step))
    return Bar(name, len(found) if found else None, "<=", 4, reason or ("" if found else "the profiler saw no kernel"))


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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_bars", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the code (default cuda)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the sizes (default 1)")
    parser.add_argument("--rounds", type=int, default=10, help="timings of each contender (default 10)")
    parser.add_argument("--output", type=Path, required=True, help="folder for bars.json and bars.md")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch sees; --device cpu tries the code without one")
    run = Run(arguments.device, arguments.scale, arguments.rounds, arguments.output)
    for part in PARTS:
        part(run)
        release(run)
        run.write()
        print(f"done: {part.__name__}", flush=True)
    print(*run.tables(), sep="\n\n")
    return 0 if all(bar.met for bar in run.bars) else 1


if __name__ == "__main__":
    sys.exit(main())
