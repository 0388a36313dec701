"""What a benchmark must reach, and how what it reached is printed and kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from . import machine


class Bar(NamedTuple):
    """What was reached, and what it must be at least (">=") or at most ("<="). Not measured: None, for a reason.

    `expected`: why it cannot be met, where that is known beforehand; such a miss is shown and stored, and fails nothing.
    """

    name: str
    reached: float | None
    sign: str
    bar: float
    reason: str = ""
    expected: str = ""

    @property
    def met(self) -> bool:
        if self.reached is None:
            return False
        return self.reached <= self.bar if self.sign == "<=" else self.reached >= self.bar

    @property
    def fails(self) -> bool:
        """Whether it is missed unexpectedly, or was not measured."""
        return not self.met and (self.reached is None or not self.expected)

    @property
    def verdict(self) -> str:
        if self.reached is None:
            return self.reason
        if self.met:
            return "met, though a miss was expected" if self.expected else "met"
        return f"missed as expected: {self.expected}" if self.expected else "MISSED"

    def row(self) -> str:
        reached = "not measured" if self.reached is None else f"{self.reached:.2f}"
        return f"| {self.name} | {reached} | {self.sign} {self.bar:g} | {self.verdict} |"


class Time(NamedTuple):
    """What a contender took, and the triad in turn with it over the same memory; absent (`microseconds` None): for a reason."""

    work: str
    contender: str
    q: float | None
    microseconds: float | None
    triad_microseconds: float | None
    reason: str = ""


class Suite(NamedTuple):
    """The bars of one run, the Markdown tables behind them, how it was measured, and times that others are compared by."""

    bars: Sequence[Bar]
    tables: Sequence[str]
    conditions: str
    times: Sequence[Time] = ()

    @property
    def met(self) -> bool:
        return not any(bar.fails for bar in self.bars)

    def text(self) -> str:
        return "\n".join(["| bar | reached | bar | |", "|---|---|---|---|", *(bar.row() for bar in self.bars)])


def write_whole(path: Path, text: str) -> None:
    """As Path.write_text, but whoever is ended in the middle leaves what was there."""
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_text(text)
    unfinished.replace(path)


def save(suite: Suite, name: str, path: Path, device: str = "cpu") -> None:
    """Put a suite into a file of several."""
    kept: dict[str, Any] = json.loads(path.read_text())["suites"] if path.exists() else {}
    kept[name] = {
        "date": str(date.today()),
        "commit": machine.commit()["id"],
        "conditions": suite.conditions,
        "tables": list(suite.tables),
        "bars": [{**bar._asdict(), "met": bar.met} for bar in suite.bars],
        "times": [time._asdict() for time in suite.times],
    }
    found = {"machine_info": machine.machine(device), "commit_info": machine.commit(), "suites": kept}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> dict[str, Suite]:
    """The suites that `save` put into a file, by name."""
    found = {}
    for name, kept in json.loads(path.read_text())["suites"].items():
        bars = [Bar(**{field: bar[field] for field in Bar._fields if field in bar}) for bar in kept["bars"]]
        found[name] = Suite(bars, kept["tables"], kept["conditions"], [Time(**time) for time in kept["times"]])
    return found
