"""Time against what grows: the size of a tensor, the number of tensors, threads, depth. Both axes are logarithmic."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from .results import SCALED, Results, Timing
from .style import BLACK, TYPE, Look, figure_of, plain_logarithmic
from .words import count_of, exponent, series, short_duration, together

AXES = {"size": "weights in a tensor", "tensors": "number of tensors", "threads": "threads", "depth": "depth L"}
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)))
TRIAD: dict[str, Any] = {"color": BLACK, "linewidth": 0.9, "linestyle": (0, (1, 2))}


def chart(results: Results, timings: Sequence[Timing], looks: dict[str, Look]) -> Figure:
    """A panel for each of what grew; in a panel a colour for each contender and a dash for what else differs."""
    panels = [(over, own) for over in SCALED if (own := [one for one in timings if one.over == over])]
    rows = -(-len(panels) // 2)
    figure = figure_of(results, "Time of a call, as its work grows", 1.4 + 2.9 * rows)
    with rc_context(TYPE):
        grid = figure.subplots(rows, 2, squeeze=False).ravel()
        for axes in grid[len(panels) :]:
            axes.remove()
        for axes, (over, own) in zip(grid, panels, strict=False):
            _panel(axes, over, own, looks)
        handles = [
            Line2D([], [], label=name, **_style(looks[name])) for name in dict.fromkeys(one.contender for one in timings)
        ]
        handles.append(Line2D([], [], label="triad over the same bytes", **TRIAD))
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _style(look: Look) -> dict[str, Any]:
    return {"color": look.colour, "marker": look.mark, "markersize": 4.5, "linewidth": 1.6}


def _panel(axes: Axes, over: str, timings: Sequence[Timing], looks: dict[str, Look]) -> None:
    kinds = series(timings, lambda one: (one.storage or "", one.dtype, f"q = {exponent(one.q)}" if one.q else ""))
    same = [len(set(values)) == 1 for values in zip(*kinds, strict=True)]
    named = []
    for dashes, (kind, own) in zip(cycle(DASHES), kinds.items(), strict=False):
        for (contender,), points in together(own, lambda one: (one.contender,)).items():
            points = sorted(points, key=lambda one: one.at or 0)
            places = [(one.at or 0, one.microseconds) for one in points]
            axes.plot(*zip(*places, strict=True), linestyle=dashes, **_style(looks[contender]))
        if differing := ", ".join(part for part, alike in zip(kind, same, strict=True) if part and not alike):
            named.append(Line2D([], [], color=BLACK, linestyle=dashes, linewidth=1.4, label=differing))
    axes.set(xscale="log", yscale="log", xlabel=AXES[over], ylabel="time of a call")
    limits = axes.get_ylim()  # of the contenders: the triad of a few weights is far below them
    for own in series(timings, lambda one: (one.storage or "", one.dtype)).values():
        _triad(axes, own)
    axes.set_ylim(limits)
    common = next(iter(kinds))
    axes.set_title(", ".join(part for part, alike in zip(common, same, strict=True) if part and alike), loc="left")
    plain_logarithmic(axes.yaxis, short_duration)
    sizes = sorted({one.at for one in timings if one.at is not None})
    axes.set_xticks(sizes, [count_of(size) for size in sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="minor", length=0)
    axes.grid(alpha=0.25)
    if named:
        axes.legend(handles=named, fontsize=8, handlelength=3)


def _triad(axes: Axes, timings: Sequence[Timing]) -> None:
    """The limit of memory, as it was met at its fastest by all who must move as many bytes."""
    limits: dict[float, float] = {}
    for one in timings:
        if one.at and one.triad_microseconds:
            limits[one.at] = min(one.triad_microseconds, limits.get(one.at, one.triad_microseconds))
    axes.plot(sorted(limits), [limits[size] for size in sorted(limits)], zorder=1, **TRIAD)
