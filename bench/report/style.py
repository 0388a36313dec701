"""Colours, fonts and the frame of every figure: colours that colour-blind readers tell apart (Okabe and Ito 2008)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .results import Results

# 9 inches at twice 100 dots: the type is sized for a page that shows a figure 900 px wide.
WIDTH, DOTS = 9.0, 200
OURS = {"cpp": "#0072B2", "cuda": "#0072B2", "numba": "#56B4E9", "triton": "#56B4E9"}
OTHER_OF_OURS = "#332288"
PEERS = ("#E69F00", "#D55E00", "#009E73", "#CC79A7", "#7F7F7F", "#882255", "#3B3B3B")
HATCHES = ("", "////", "....", "xxxx")
MARKS = ("^", "D", "v", "P", "X")
TICKS = ((1.0, (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)), (2.5, (1.0, 2.0, 5.0)))  # within a power of ten, below so many powers
BLACK, GREY = "#3B3B3B", "#7F7F7F"
TYPE: Any = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.7,
}


@dataclass(frozen=True)
class Look:
    """How one contender is drawn, in every figure."""

    colour: str
    hatch: str
    mark: str

    def patch(self, label: str) -> Patch:
        return Patch(facecolor=self.colour, hatch=self.hatch, edgecolor="white", label=label)


def looks(contenders: Iterable[str]) -> dict[str, Look]:
    """Ours in blues by home, peers in the other colours in turn; a hatch where a colour comes again."""
    found: dict[str, Look] = {}
    times: dict[str, int] = {}
    peers = 0
    for name in dict.fromkeys(contenders):
        words = name.replace(",", " ").split()
        if words[0] == "pysteep":
            home = words[1] if len(words) > 1 else ""
            colour, mark = OURS.get(home, OTHER_OF_OURS), "o" if home in ("cpp", "cuda") else "s"
        else:
            colour, mark = PEERS[peers % len(PEERS)], MARKS[peers % len(MARKS)]
            peers += 1
        times[colour] = times.get(colour, -1) + 1
        found[name] = Look(colour, HATCHES[times[colour] % len(HATCHES)], mark)
    return found


def figure_of(results: Results, title: str, height: float) -> Figure:
    """An empty figure `height` inches high, under its title, the machine and the date."""
    machine = results.machine
    threads = f", {machine.threads} threads" if machine.kind == "cpu" and machine.threads else ""
    torch = f", torch {machine.versions['torch']}" if "torch" in machine.versions else ""
    with rc_context(TYPE):
        figure = Figure(figsize=(WIDTH, height), dpi=DOTS, layout="constrained")
        figure.suptitle(f"{title}\n{machine.device}{threads}{torch}, {results.date}", fontsize=11)
    return figure


def plain_logarithmic(axis: Axis, write: Callable[[float], str]) -> None:
    """Ticks of a logarithmic axis in plain numbers: powers of ten, and more where there are few of them."""
    low, high = axis.get_view_interval()
    parts = next((parts for decades, parts in TICKS if math.log10(high / low) < decades), (1.0,))
    axis.set_major_locator(LogLocator(subs=parts))
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    axis.set_minor_formatter(NullFormatter())


def plain(value: float) -> str:
    """A tick without powers of ten."""
    return f"{value:,.10g}".replace(",", " ")
