"""What pysteep must reach on a CPU, each row measured turn by turn in one run: `python -m bench bars [SUITE...]`.

Prints a Markdown table for each work, and the bars with what was reached; exits 1 if one is missed. Each suite runs in a
process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..measure import machine
from ..measure.reporting import Suite, save

SUITES = ("steepest_step", "depth", "flow", "diagnostics", "rounding", "sharded", "gradient_release")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench bars", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)} (default: all)")
    parser.add_argument("--rounds", type=int, help="timings of each contender (default: the suite's own)")
    parser.add_argument("--output", type=Path, help="also put what was reached into this JSON file")
    asked = parser.parse_args(arguments)
    if unknown := set(asked.suites) - set(SUITES):
        parser.error(f"SUITE must be among {', '.join(SUITES)}; got {', '.join(sorted(unknown))}")
    if len(asked.suites) == 1:
        return _run(asked.suites[0], asked.rounds, asked.output)
    options = [
        *(["--rounds", str(asked.rounds)] if asked.rounds else []),
        *(["--output", asked.output] if asked.output else []),
    ]
    run = [sys.executable, "-m", "bench", "bars"]
    return max(subprocess.run([*run, suite, *options], check=False).returncode for suite in asked.suites or SUITES)


def _run(name: str, rounds: int | None, output: Path | None) -> int:
    module = importlib.import_module(f".{name}", __name__)
    suite: Suite = module.measure(rounds or module.ROUNDS)
    print("\n\n".join([f"{name}: {machine.device_name('cpu')}, {suite.conditions}", *suite.tables, suite.text()]), flush=True)
    if output:
        save(suite, name, output)
    return 0 if suite.met else 1
