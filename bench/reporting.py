"""How the bars of a benchmark are printed."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch


class Bar(NamedTuple):
    """What was reached, and what it must be at least (">=") or at most ("<=")."""

    name: str
    reached: float
    sign: str
    bar: float

    @property
    def met(self) -> bool:
        return self.reached <= self.bar if self.sign == "<=" else self.reached >= self.bar


def report(bars: Sequence[Bar], tables: Sequence[str], conditions: str, output: Path | None) -> int:
    """Print the bars; write them to `output` under today's conditions and the tables. The exit code: 1 if one was missed."""
    lines = [f"| {bar.name} | {bar.reached:.2f} | {bar.sign} {bar.bar:g} | {'met' if bar.met else 'MISSED'} |" for bar in bars]
    text = "\n".join(["| bar | reached | bar | |", "|---|---|---|---|", *lines])
    print(text)
    if output:
        machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("\n\n".join([f"{date.today()}, {machine}, {conditions}", *tables, text]) + "\n")
    return 0 if all(bar.met for bar in bars) else 1
