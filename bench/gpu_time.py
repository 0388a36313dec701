"""Every op on a GPU, timed with device events turn by turn against a device-to-device copy of as many bytes.

`python -m bench.gpu_time --output DIR` writes times.json and times.md. A result is timed only after it was found right.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .contenders import check, contenders
from .works import MANY_TINY, RESNET50, Work

LARGE = Work("one tensor of 500 M", ((500_000_000,),))
Step = Callable[[], object]


def copy_of(moved: int) -> Step:
    """A device-to-device copy that reads and writes `moved` bytes in all."""
    source = torch.empty(max(moved // 2, 1), dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def medians(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median seconds between device events around one call, one of each step in every round."""
    for step in steps.values():
        for _ in range(3):
            step()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3 for name, pairs in events.items()}


def rows_of(work: Work, dtype: torch.dtype, q: float, rounds: int) -> list[dict[str, object]]:
    moved, parameters = work.bytes(dtype), work.parameters(dtype, "cuda")
    steps: dict[str, Step] = {"copy": copy_of(moved)}
    for contender in contenders("cuda"):
        if q not in contender.qs or (contender.name == "torch eager" and work is LARGE):
            continue
        if contender.name == "torch.compile" and work is not LARGE and q != 1:
            continue  # compiling a step over 161 tensors takes half a minute
        if contender.missing:
            print(f"absent: {contender.name} ({contender.missing})")
            continue
        steps[contender.name] = check(contender, parameters, q)
        torch.cuda.empty_cache()
    times = medians(steps, rounds)
    return [
        {
            "work": work.name,
            "dtype": str(dtype).removeprefix("torch."),
            "q": q,
            "contender": name,
            "microseconds": round(seconds * 1e6, 2),
            "gigabytes_per_second": round(moved / seconds / 1e9, 1),
            "share_of_copy": round(times["copy"] / seconds, 3),
        }
        for name, seconds in times.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_time", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for work, dtypes in ((LARGE, (torch.float32, torch.bfloat16)), (RESNET50, (torch.float32,)), (MANY_TINY, (torch.float32,))):
        for dtype in dtypes:
            for q in (1.0, 1.5, 1.7, 2.0):
                rows += rows_of(work, dtype, q, rounds=20)
                torch.cuda.empty_cache()
    device = torch.cuda.get_device_name()
    report = {"device": device, "torch": torch.__version__, "rows": rows}
    (arguments.output / "times.json").write_text(json.dumps(report, indent=1))
    lines = [
        f"{device}, torch {torch.__version__}",
        "",
        "| work | dtype | q | contender | µs | GB/s | share of copy |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    (arguments.output / "times.md").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
