"""Every contender side by side: a panel for each work, a group of bars for each geometry and depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .results import Results, Timing
from .style import GREY, TYPE, Look, figure_of, plain, plain_logarithmic
from .words import digits, exponent, memory_bound, together

MOST_IN_HALF, MOST_GROUPS_IN_HALF = 26, 6  # bars that are still told apart, and groups that can be named, in half the width
FEWEST = 8  # bars that a panel has room for: one alone is not as wide as the panel
MOST_LEVEL = 10  # bars wide enough for their values to be written level
BETWEEN_GROUPS, BETWEEN_DEPTHS = 1.0, 2.2  # in bars


def chart(results: Results, title: str, timings: Sequence[Timing], absent: Sequence[str], looks: dict[str, Look]) -> Figure:
    """Shares of the machine's yardstick, or times where overhead is what was timed; the simulator's times a step and run."""
    panels = together(timings, lambda one: (one.suite, one.work, "" if one.steps else one.dtype, one.storage or ""))
    wide = any(len(own) > MOST_IN_HALF or len(together(own, _group)) > MOST_GROUPS_IN_HALF for own in panels.values())
    columns = 1 if wide else 2
    rows = -(-len(panels) // columns)
    figure = figure_of(results, title, 1.4 + 2.3 * rows)
    with rc_context(TYPE):
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid[len(panels) :]:
            axes.remove()
        suites = {suite for suite, *_ in panels}
        for axes, ((suite, work, dtype, storage), own) in zip(grid, panels.items(), strict=False):
            parts = (suite if len(suites) > 1 else "", storage, work, dtype)
            axes.set_title(", ".join(part for part in parts if part), loc="left")
            _panel(axes, own, results, looks, columns)
        handles = [looks[name].patch(name) for name in dict.fromkeys(one.contender for one in timings)]
        empty: Any = {"facecolor": "none", "edgecolor": GREY, "linestyle": ":"}
        handles += [Patch(label=f"{name}: absent", **empty) for name in dict.fromkeys(absent)]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _panel(axes: Axes, timings: Sequence[Timing], results: Results, looks: dict[str, Look], columns: int) -> None:
    in_shares = memory_bound(timings, results)
    level = len(timings) <= MOST_LEVEL * (3 - columns)
    mixed = len({one.dtype for one in timings}) > 1
    position, ticks = 0.0, []
    depths: dict[str, list[float]] = {}
    for (depth, q, dtype), group in together(timings, _group).items():
        if depths:
            position += BETWEEN_GROUPS if depth in depths else BETWEEN_DEPTHS
        for k, timing in enumerate(group):
            look = looks[timing.contender]
            value = (results.share(timing) or 0.0) if in_shares else _microseconds(timing)
            axes.bar(position + k, value, 0.9, color=look.colour, hatch=look.hatch, edgecolor="white", linewidth=0)
            _write(axes, position + k, value, in_shares, level)
        parts = (f"q = {q}" if q else "", dtype if mixed else "")
        ticks.append((position + (len(group) - 1) / 2, ", ".join(part for part in parts if part)))
        depths.setdefault(depth, []).append(ticks[-1][0])
        position += len(group)
    axes.set_xticks([x for x, _ in ticks], [text for _, text in ticks])
    axes.set_xticks(
        [sum(xs) / len(xs) for xs in depths.values()], [f"L = {depth}" if depth else "" for depth in depths], minor=True
    )
    axes.tick_params(axis="x", length=0, labelsize=8 if len(ticks) > MOST_LEVEL else 9)
    axes.xaxis.remove_overlapping_locs = False
    deeper = any(depths) and any(text for _, text in ticks)
    axes.tick_params(axis="x", which="minor", length=0, pad=17 if deeper else 4, labelsize=9)
    room = max(FEWEST - position, 0) / 2
    axes.set_xlim(-0.8 - room, position - 0.2 + room)
    if in_shares:
        axes.axhline(1, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
        largest = max(results.share(one) or 0.0 for one in timings)
        axes.set(ylabel=f"{results.machine.yardstick} / time", ylim=(0, 1.2 * max(largest, 1.05)))
    else:
        values = [_microseconds(one) for one in timings]
        axes.set(yscale="log", ylabel="µs a step and run" if timings[0].steps else "µs a call")
        axes.set_ylim(min(values) / 3, max(values) * (max(values) / min(values) * 3) ** 0.25)
        plain_logarithmic(axes.yaxis, plain)


def _write(axes: Axes, position: float, value: float, in_shares: bool, level: bool) -> None:
    """The value above its bar, upright where bars are too narrow for it."""
    axes.annotate(
        f"{value:.2f}" if in_shares else digits(value),
        (position, value),
        (0, 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
        rotation=0 if level else 90,
        fontsize=8 if level else 6.5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.2},
    )


def _group(timing: Timing) -> tuple[str, ...]:
    return ("" if timing.depth is None else str(timing.depth), exponent(timing.q), timing.dtype)


def _microseconds(timing: Timing) -> float:
    return timing.microseconds if timing.microseconds_a_step is None else timing.microseconds_a_step
