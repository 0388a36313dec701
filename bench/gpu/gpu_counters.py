"""Bytes that the GPU's own counters saw, for a step of every op: `python -m bench.gpu.gpu_counters --output DIR`, where ncu is.

ncu runs this module again with --profiled, which takes the steps; one launch of each is counted. The table stands beside the
times of bench.gpu.gpu_bars, where DIR has its times.json. The card's clocks are left as they are.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..measure.timing import Step
from ..measure.works import Work
from .gpu_bars import attempt
from .gpu_works import FactorProduct, FactorStep, MirrorStep, Steepest

HOMES = ("cuda", "triton")
ELEMENTS = 1 << 28  # of a float32 tensor: beyond every cache
READ, WRITTEN, TIME = "dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum"
KERNELS = "(step|factor|product|mirror)_kernel"
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
UNITS |= {"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "s": 1, "second": 1}


class Launch(NamedTuple):
    """One kernel, as ncu counted it."""

    kernel: str
    read: float
    written: float
    seconds: float


class Case(NamedTuple):
    """A step of one op; its work is named as in bench.gpu.gpu_bars."""

    work: str
    home: str
    moved: int  # the fewest bytes


def cases(elements: int, homes: Sequence[str], device: str) -> Iterator[tuple[Case, Callable[[], Step]]]:
    """In the order in which they are counted; each of them launches one kernel."""
    numbers = torch.Generator(device).manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        step = Steepest(Work("", ((elements,),)), dtype, numbers)
        for q in (1.0, 1.5, 1.7, 2.0):
            work = f"steepest_step, one tensor, {str(dtype).removeprefix('torch.')}, q = {q:g}"
            for home in homes:
                yield Case(work, home, step.moved), (lambda home=home, q=q, step=step: step.step(home, q))
    for stored, depth in ((2, 2), (2, 3), (2, 10), (3, 3)):
        factors = FactorStep(elements, stored, depth, numbers)
        work = f"factor_step, {'full' if stored == depth > 2 else 'tied'}, L = {depth}, q = 2"
        for home in homes:
            yield Case(work, home, factors.moved), (lambda home=home, factors=factors: factors.step(home, 2.0))
    for depth in (3, 10):
        product = FactorProduct(elements // depth, depth, numbers)
        for home in homes:
            forward, backward = product.moved_forward, product.moved_backward
            work = f"factor_product, {{}}, L = {depth}"
            yield Case(work.format("forward"), home, forward), (lambda home=home, product=product: product.forward(home))
            yield Case(work.format("backward"), home, backward), (lambda home=home, product=product: product.backward(home))
    mirror = MirrorStep(elements, numbers)
    for depth in (2, 10):
        for q in (1.0, 2.0):
            for home in homes:
                work = f"mirror_step, L = {depth}, q = {q:g}"
                yield Case(work, home, mirror.moved), (lambda home=home, depth=depth, q=q: mirror.step(home, depth, q))


def take_steps(names: Path, scale: float) -> None:
    """What ncu watches: of each case, the step after the one that was checked.

    `names` is told which cases these were, and of which the step could not be taken or was wrong, with the reason.
    """
    done, failed = [], []
    for case, make in cases(max(100, round(ELEMENTS * scale)), HOMES, "cuda"):
        step, reason = attempt(make)
        if reason:
            failed.append(f"{case.work}, {case.home}: {reason}")
            continue
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        step()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        done.append(case)
    names.write_text(json.dumps({"done": done, "failed": failed}))


def counted(text: str) -> list[Launch]:
    """The launches in what ncu wrote with --csv --page raw: a line of names, one of units, one for each.

    Raises:
        ValueError: there is no such table, or a metric is missing from it.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    table = list(csv.reader(lines))
    if len(table) < 2:
        raise ValueError(f"ncu wrote no table; its last words: {text[-500:]!r}")
    names, units = table[:2]
    missing = [name for name in ("Kernel Name", READ, WRITTEN, TIME) if name not in names]
    if missing:
        raise ValueError(f"ncu's table lacks {', '.join(missing)}; it has {', '.join(names)}")

    def number(row: list[str], name: str) -> float:
        at = names.index(name)
        return float(row[at].replace(",", "")) * UNITS[units[at]]

    return [
        Launch(row[names.index("Kernel Name")], *(number(row, name) for name in (READ, WRITTEN, TIME))) for row in table[2:]
    ]


def table(of_cases: Sequence[Case], launches: Sequence[Launch], timed: dict[tuple[str, str], float]) -> str:
    """Raises ValueError where the launches are not one for each case."""
    if len(of_cases) != len(launches) or not all(re.search(KERNELS, launch.kernel) for launch in launches):
        found = ", ".join(launch.kernel[:40] for launch in launches)
        raise ValueError(f"there must be {len(of_cases)} launches, one for each case; ncu counted {len(launches)}: {found}")
    lines = [
        "| work | who | bytes counted / fewest | read / written | GB/s counted | GB/s timed |",
        "|---|---|---|---|---|---|",
    ]
    for case, launch in zip(of_cases, launches, strict=True):
        both = launch.read + launch.written
        of_bytes = f"{both / case.moved:.3f} | {launch.read / launch.written:.2f}"
        beside = f"{timed[case.work, case.home]:.0f}" if (case.work, case.home) in timed else "not timed"
        lines.append(f"| {case.work} | {case.home} | {of_bytes} | {both / launch.seconds / 1e9:.0f} | {beside} |")
    return "\n".join(lines)


def timed_in(folder: Path) -> dict[tuple[str, str], float]:
    """GB/s by work and home, of the bars in that folder."""
    path = folder / "times.json"
    times = json.loads(path.read_text()) if path.exists() else []
    return {(row["work"], row["who"]): row["moved"] / row["seconds"] / 1e9 for row in times if row["moved"]}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.gpu_counters", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for counters.csv and counters.md")
    parser.add_argument("--scale", type=float, default=1.0, help="of the sizes (default 1)")
    parser.add_argument("--profiled", action="store_true", help="take the steps; for ncu")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    names, log = output / "counters.json", output / "counters.csv"
    if arguments.profiled:
        take_steps(names, arguments.scale)
        return 0
    metrics = ",".join((READ, WRITTEN, TIME))
    command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", "--target-processes", "all"]
    command += ["--profile-from-start", "off", "--kernel-name", f"regex:.*{KERNELS}.*", "--metrics", metrics]
    command += ["--log-file", str(log), "--force-overwrite"]
    itself = [sys.executable, "-P", "-m", "bench.gpu.gpu_counters", "--profiled", "--output", str(output)]
    itself += ["--scale", str(arguments.scale)]
    done = subprocess.run([*command, *itself], check=False)
    text = log.read_text() if log.exists() else ""
    if done.returncode != 0:
        print(text[-2000:])
        return done.returncode
    taken = json.loads(names.read_text())
    print(*(f"not counted: {line}" for line in taken["failed"]), sep="\n", end="\n" * bool(taken["failed"]))
    result = table([Case(*case) for case in taken["done"]], counted(text), timed_in(output))
    (output / "counters.md").write_text(result + "\n")
    print(result)
    return int(bool(taken["failed"]))


if __name__ == "__main__":
    sys.exit(main())
