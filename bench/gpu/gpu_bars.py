"""What every op must reach on a GPU: `python -m bench.gpu.gpu_bars --output DIR` writes bars.json and bars.md there.

Timed between device events, turn by turn with a device-to-device copy of as many bytes, over more memory than the caches
hold; a step of ours is timed only after every element of its result was found to be that of the definition in float64;
torch's, which round a 16-bit weight more than once, are taken as they are. Sizes are cut to the memory that is free.
torch.compile's steps, which take half a minute each to compile, are left out. `--homes cuda` measures one home; what another
run left in DIR of the other home stays. `--device cpu --scale 1e-4` tries the code without a GPU: the CPU's homes stand for
the GPU's, and the figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

import pysteep
from pysteep import SteepestDescent

from ..measure import machine
from ..measure.launches import launches as counted_launches
from ..measure.reporting import Bar, Suite, read, save, write_whole
from ..measure.timing import LARGEST_COPY, Step
from ..measure.works import MANY_TINY, Work
from ..peers.contenders import contenders
from .gpu_flow import flow_seconds
from .gpu_memory import Block
from .gpu_timing import beyond_cache, copies_of, host_medians, in_turn, medians
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

HOMES = {"cuda": ("cuda", "triton"), "cpu": ("cpp", "numba")}
PEERS = ("torch SGD fused", "torch SGD foreach")
QS = (1.0, 1.5, 1.7, 2.0)
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
FRESH_SETS = 48  # of gradients, more than the tables of tensors that a home keeps
EXPECTED_MIRROR = {10: "by its instructions for sm_90 the search for y takes 3 to 4 times as long as memory: 0.25 to 0.33"}


Makers = Callable[[], Sequence[Step]]


class Held(Protocol):
    held: int  # bytes


Operands = TypeVar("Operands", bound=Held)


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

    def __init__(self, device: str, homes: Sequence[str], scale: float, rounds: int, output: Path) -> None:
        self.device, self.homes, self.scale, self.rounds, self.output = device, homes, scale, rounds, output
        self.seed = secrets.randbits(32)
        self.numbers = torch.Generator(device).manual_seed(self.seed)
        self.absent = {name: backend.reason if not backend.available else "" for name, backend in pysteep.backends().items()}
        self.bars: dict[str, list[Bar]] = {home: [] for home in homes}
        self.times: list[Time] = []

    def fitting(self, work: Work, itemsize: int, copies: int) -> Work:
        return fitting(work, itemsize, copies, self.scale, self.device)

    def elements(self, most: int, copies: int) -> int:
        """Of a float32 tensor, so many that `copies` of it fit."""
        return self.fitting(Work("", ((most,),)), 4, copies).weights

    def sets(self, make: Callable[[], Operands]) -> list[Operands]:
        """Operands that no cache holds: one large set, or several."""
        return beyond_cache(make, lambda one: one.held, self.device)

    def share(
        self, work: str, size: str, moved: int, makers: dict[str, Makers], bar: float, expected: str = ""
    ) -> dict[str, float]:
        """Time what the makers give, a step for each set of operands, by their names beside a copy; a bar for each home."""
        steps: dict[str, Step] = {}
        reasons: dict[str, str] = {}
        for name, make in makers.items():
            reasons[name] = self.absent.get(name, "")
            if not reasons[name]:
                made, reasons[name] = attempt(lambda make=make: in_turn(make()))
                steps |= {name: made} if made else {}
        times: dict[str, float] = {}
        if steps:
            copied = min(moved, LARGEST_COPY)
            times = medians({"copy": copies_of(copied, self.device), **steps}, self.rounds, self.device)
            limit = times.pop("copy") * moved / copied
            self.times += [Time(work, size, name, seconds, moved, limit / seconds) for name, seconds in times.items()]
        for home in self.homes:
            reached = limit / times[home] if home in times else None
            self.bars[home].append(Bar(f"{work}, {home}: share of the copy", reached, ">=", bar, reasons[home], expected))
        return times

    def suite(self, home: str) -> Suite:
        rows = ["| work | size | who | µs | GB/s | share of the copy |", "|---|---|---|---|---|---|"]
        others = set(HOMES[self.device]) - {home}
        rows += ["| " + " | ".join(time.cells()) + " |" for time in self.times if time.who not in others]
        conditions = (
            f"medians of {self.rounds} rounds in turn with a copy, scale {self.scale:g}, random numbers of seed {self.seed}"
        )
        return Suite(self.bars[home], ["\n".join(rows)], conditions)

    def write(self) -> None:
        """Beside what an earlier run left of other homes."""
        self.output.mkdir(parents=True, exist_ok=True)
        bars, times = self.output / "bars.json", self.output / "times.json"
        for home in self.homes:
            save(self.suite(home), f"gpu {home}", bars, self.device)
        earlier = [Time(**row) for row in json.loads(times.read_text())] if times.exists() else []
        rows = {(time.work, time.size, time.who): time for time in (*earlier, *self.times)}
        write_whole(times, json.dumps([time._asdict() for time in rows.values()]) + "\n")
        parts = [f"# {machine.device_name(self.device)}"]
        for name, suite in read(bars).items():
            parts += [f"## {name}", suite.conditions, *suite.tables, suite.text()]
        write_whole(self.output / "bars.md", "\n\n".join(parts) + "\n")


# ---- the parts of a run ------------------------------------------------------------------------------------------------------


def one_large(run: Run) -> None:
    for dtype, elements in ((FLOAT32, 1 << 30), (BFLOAT16, 1 << 31)):
        one_large_of(run, dtype, elements)
        release(run)


def one_large_of(run: Run, dtype: torch.dtype, elements: int) -> None:
    work = run.fitting(Work("one tensor", ((elements,),)), dtype.itemsize, 3)
    sets = run.sets(lambda: Steepest(work, dtype, run.numbers))
    for q in QS:
        makers = {home: lambda home=home, q=q: [own.step(home, q) for own in sets] for home in run.homes}
        title = f"steepest_step, one tensor, {str(dtype).removeprefix('torch.')}, q = {q:g}"
        run.share(title, f"{work.weights / 1e6:g} M", sets[0].moved, makers, 0.92)


def llama(run: Run) -> None:
    work = run.fitting(LLAMA_8B, BFLOAT16.itemsize, 3)  # foreach makes a copy
    sets = run.sets(lambda: Steepest(work, BFLOAT16, run.numbers))
    size = f"{work.weights / 1e6:.0f} M"
    parameters = [own.parameters() for own in sets]
    peers = {c.name: c for c in contenders(run.device) if c.name in PEERS and not c.missing}
    for q in QS:
        makers: dict[str, Makers] = {home: lambda home=home, q=q: [own.step(home, q) for own in sets] for home in run.homes}
        if q == 2:
            makers |= {name: lambda peer=peer: [peer.make(own, 2.0) for own in parameters] for name, peer in peers.items()}
        times = run.share(f"steepest_step, {work.name}, bfloat16, q = {q:g}", size, sets[0].moved, makers, 0.9)
    fastest = min((times[name] for name in peers if name in times), default=None)
    for home in run.homes:
        reached = fastest / times[home] if fastest is not None and home in times else None
        name = f"{work.name}, bfloat16, q = 2, {home}: fastest peer's time / time"
        reason = "" if reached else run.absent[home] or "no peer ran"
        run.bars[home] += [Bar(name, reached, ">=", 1.0, reason), launches(run, work, home, parameters[0])]


def launches(run: Run, work: Work, home: str, parameters: list[torch.nn.Parameter]) -> Bar:
    """Of a step as a user takes it."""
    name, reason = f"{work.name}, {home}: launches of a step", run.absent[home]
    if reason:
        return Bar(name, None, "<=", 4, reason)
    step = SteepestDescent(parameters, lr=LR, weight_decay=DECAY, backend=home).step
    found, reason = attempt(lambda: counted_launches(step, run.device))
    return Bar(name, found or None, "<=", 4, reason or ("" if found else "the profiler saw no kernel"))


def many_tiny(run: Run) -> None:
    """How long a step keeps the host: with the same gradients at every step; with new ones, as a backward pass leaves them.

    The host's time alone: what the device's caches hold does not matter.
    """
    operands = Steepest(MANY_TINY, FLOAT32, run.numbers)
    host_times(run, MANY_TINY.name, operands, [operands.gradients], 0.5)
    fresh = [Block(MANY_TINY.shapes, FLOAT32, run.numbers.device) for _ in range(FRESH_SETS)]
    for block in fresh:
        block.fill(run.numbers)
    host_times(run, f"{MANY_TINY.name}, fresh gradients", operands, fresh, 1.0)


def host_times(run: Run, title: str, operands: Steepest, gradients: Sequence[Block], bar: float) -> None:
    """Of optimizers that see one set of gradients after the other, each time as new tensors."""
    parameters = operands.parameters()
    turns = itertools.cycle(gradients)

    def renew() -> Block:
        block = next(turns)
        for p, g in zip(parameters, block.tensors, strict=True):
            p.grad = g.view_as(g)
        return block

    peer = "torch SGD fused"
    options = {"lr": LR, "weight_decay": DECAY}
    makers = {peer: (2.0, lambda: torch.optim.SGD(parameters, **options, fused=True))}
    for home in run.homes:
        makers[home] = 1.0, lambda home=home: SteepestDescent(parameters, **options, backend=home)
    steps: dict[str, Step] = {}
    reasons: dict[str, str] = {}
    for name, (q, make) in makers.items():
        block = renew()
        step, reasons[name] = attempt(
            lambda n=name, q=q, make=make, b=block: operands.checked(f"{n}'s step", make().step, q, b)
        )
        steps |= {name: step} if step else {}
    times = host_medians(steps, run.rounds, run.device, before=renew if len(gradients) > 1 else None)
    run.times += [Time(f"{title}, host", "1288", name, seconds, 0, 0.0) for name, seconds in times.items()]
    for home in run.homes:
        reached = times[home] / times[peer] if home in times and peer in times else None
        reason = "" if reached else reasons[home] or f"{peer}: {reasons[peer]}"
        run.bars[home].append(Bar(f"{title}, {home}: host's time / torch fused SGD's", reached, "<=", bar, reason))


def factor_steps(run: Run) -> None:
    for stored, depth in ((2, 2), (2, 3), (2, 10), (3, 3)):
        factor_steps_at(run, stored, depth)
        release(run)


def factor_steps_at(run: Run, stored: int, depth: int) -> None:
    elements = run.elements(400_000_000, stored + 3)
    sets = run.sets(lambda: FactorStep(elements, stored, depth, run.numbers))
    kind = "full" if stored == depth > 2 else "tied"
    for q in (1.0, 2.0):
        makers = {home: lambda home=home, q=q: [own.step(home, q) for own in sets] for home in run.homes}
        title = f"factor_step, {kind}, L = {depth}, q = {q:g}"
        run.share(title, f"{elements / 1e6:g} M", sets[0].moved, makers, 0.9)


def factor_products(run: Run) -> None:
    for depth in (3, 10):
        factor_products_at(run, depth)
        release(run)


def factor_products_at(run: Run, depth: int) -> None:
    elements = run.elements(1_000_000_000 // depth, 2 * depth + 4)
    sets = run.sets(lambda: FactorProduct(elements, depth, run.numbers))
    size = f"{elements / 1e6:g} M"
    makers = {home: lambda home=home: [own.forward(home) for own in sets] for home in run.homes}
    run.share(f"factor_product, forward, L = {depth}", size, sets[0].moved_forward, makers, 0.9)
    makers = {home: lambda home=home: [own.backward(home) for own in sets] for home in run.homes}
    run.share(f"factor_product, backward, L = {depth}", size, sets[0].moved_backward, makers, 0.9)


def mirror_steps(run: Run) -> None:
    elements = run.elements(500_000_000, 3)
    sets = run.sets(lambda: MirrorStep(elements, run.numbers))
    for depth in (2, 10):
        for q in (1.0, 2.0):
            makers = {home: lambda home=home, d=depth, q=q: [own.step(home, d, q) for own in sets] for home in run.homes}
            title, expected = f"mirror_step, L = {depth}, q = {q:g}", EXPECTED_MIRROR.get(depth, "")
            run.share(title, f"{elements / 1e6:g} M", sets[0].moved, makers, 0.8, expected)


def flows(run: Run) -> None:
    """A bar for the first home alone, on a GPU that of CUDA; Triton's is in the table. Not beside a copy: no memory moves."""
    of_cpu, absent = attempt(lambda: flow_seconds("cpu", "cpp", 64, run.scale, run.seed))
    times = {"cpp, two cores, 64 runs": of_cpu}
    reasons = {}
    for home in run.homes:
        seconds, reasons[home] = attempt(lambda home=home: flow_seconds(run.device, home, 4096, run.scale, run.seed))
        times[home] = seconds
    run.times += [Time("diagonal_flow, a step of a run", "4096 runs", who, t, 0, 0.0) for who, t in times.items() if t]
    first = HOMES[run.device][0]
    if first in run.homes:
        reached = of_cpu / times[first] if of_cpu and times[first] else None
        name = "diagonal_flow, 4096 runs at once, a step of a run: two cores' C++ / time"
        run.bars[first].append(Bar(name, reached, ">=", 50.0, absent or reasons[first]))


PARTS = (one_large, llama, factor_steps, mirror_steps, factor_products, many_tiny, flows)


def release(run: Run) -> None:
    gc.collect()
    if run.device == "cuda":
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.gpu_bars", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the code (default cuda)")
    parser.add_argument("--homes", type=lambda text: text.split(","), help="e.g. cuda (default: all of the device)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the sizes (default 1)")
    parser.add_argument("--rounds", type=int, default=10, help="timings of each contender (default 10)")
    parser.add_argument("--output", type=Path, required=True, help="folder for bars.json and bars.md")
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch sees; --device cpu tries the code without one")
    homes = asked.homes or HOMES[asked.device]
    if unknown := [home for home in homes if home not in HOMES[asked.device]]:
        parser.error(f"--homes must be among {', '.join(HOMES[asked.device])}; got {', '.join(unknown)}")
    earlier = asked.output / "bars.json"
    device = machine.device_name(asked.device)
    if earlier.exists() and (other := json.loads(earlier.read_text())["machine_info"]["device"]) != device:
        parser.error(f"--output {asked.output} has results of {other}; those of {device} need a folder of their own")
    run = Run(asked.device, homes, asked.scale, asked.rounds, asked.output)
    for part in PARTS:
        part(run)
        release(run)
        run.write()
        print(f"done: {part.__name__}", flush=True)
    for home in homes:
        suite = run.suite(home)
        print(f"{home}, {suite.conditions}", *suite.tables, suite.text(), sep="\n\n")
    return 0 if all(run.suite(home).met for home in homes) else 1


if __name__ == "__main__":
    sys.exit(main())
