"""The pictures beside report.md: a roofline, a bar chart for each suite, and how times grow."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from . import bar_charts, roofline, scaling
from .results import Results
from .style import looks
from .words import chart_of

TITLES = {
    "steepest_step": "A step of steepest descent",
    "depth": "Depth: steps on factors, their product, the mirror flow",
    "diagonal_flow": "Diagonal networks: whole training runs in one call",
}


def figures(results: Results) -> dict[str, Figure]:
    """Each picture by its name; a suite that was not run has none."""
    every = looks(one.contender for one in results.timings)
    made: dict[str, Figure] = {}
    if results.roofs and (points := roofline.drawn(results.timings)):
        made["roofline"] = roofline.chart(results, results.roofs, points, every)
    for name in dict.fromkeys(map(chart_of, results.timings)):
        timings = [one for one in results.timings if chart_of(one) == name]
        suites, present = {one.suite for one in timings}, {one.contender for one in timings}
        if name == "scaling":
            made[name] = scaling.chart(results, timings, every)
        else:
            absent = [one.contender for one in results.absent if one.suite in suites and one.contender not in present]
            title = TITLES.get(name.removesuffix(f"_{timings[0].dtype}"), name)
            made[name] = bar_charts.chart(results, title, timings, absent, every)
    return made


def save(results: Results, folder: Path) -> list[str]:
    """Write the pictures as PNG into `folder`; their names without suffix."""
    made = figures(results)
    for name, figure in made.items():
        figure.savefig(folder / f"{name}.png")
    return list(made)
