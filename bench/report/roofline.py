"""Where each op stands under the roofs of the machine (Williams et al. 2009): memory on the left, arithmetic on the right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .labels import Point, place
from .results import Ceilings, Results, Timing
from .style import BLACK, TYPE, Look, figure_of, plain, plain_logarithmic
from .words import digits, exponent, together

MARKS = {"steepest_step": "o", "factor_step full": "s", "factor_step tied": "D", "factor_product": "^", "mirror_step": "v"}
OTHER_MARK = "P"
NEAR = 0.12  # decades: points of one op closer than this are named together


def chart(results: Results, ceilings: Ceilings, timings: Sequence[Timing], looks: dict[str, Look]) -> Figure:
    """GFLOP/s against operations per byte, each op on the work that it does fastest; ours filled and named, peers hollow."""
    points = _fastest(timings)
    figure = figure_of(results, "Roofline: each op on the work that it does fastest, float32", 6.6)
    with rc_context(TYPE):
        axes = figure.subplots()
        for timing in sorted(points, key=lambda one: one.ours):
            axes.add_line(_mark(looks[timing.contender], MARKS.get(_op(timing), OTHER_MARK), timing.ours, _place_of(timing)))
        axes.set(xscale="log", yscale="log", xlabel="floating-point operations per byte that must move", ylabel="GFLOP/s")
        _limit(axes, points, ceilings)
        roofs = _draw_roofs(axes, ceilings)
        for axis in (axes.xaxis, axes.yaxis):
            plain_logarithmic(axis, plain)
        axes.grid(alpha=0.2)
        _legend(figure, points, looks)
        place(axes, _names(points), [_place_of(one) for one in points], roofs)
    return figure


def drawn(timings: Iterable[Timing]) -> list[Timing]:
    """Those that have a place here: operations and bytes known, and float32 as the roof of arithmetic is."""
    return [one for one in timings if one.operations and one.bytes and one.dtype == "float32" and one.over is None]


def _place_of(timing: Timing) -> Point:
    assert timing.operations
    assert timing.bytes
    assert timing.gigaflops
    return timing.operations / timing.bytes, timing.gigaflops


def _op(timing: Timing) -> str:
    return f"{timing.suite} {timing.storage}" if timing.suite == "factor_step" else timing.suite


def _fastest(timings: Iterable[Timing]) -> list[Timing]:
    best: dict[object, Timing] = {}
    for one in timings:
        key = (_op(one), one.contender, one.q, one.depth)
        if key not in best or _place_of(one)[1] > _place_of(best[key])[1]:
            best[key] = one
    return list(best.values())


def _mark(look: Look, mark: str, filled: bool, place: Point = (math.nan, math.nan), label: str = "") -> Line2D:
    inside, edge, width = (look.colour, "white", 0.5) if filled else ("none", look.colour, 1.2)
    return Line2D(
        [place[0]],
        [place[1]],
        linestyle="none",
        marker=mark,
        markersize=6.5,
        color=look.colour,
        label=label,
        markerfacecolor=inside,
        markeredgecolor=edge,
        markeredgewidth=width,
    )


def _limit(axes: Axes, points: Sequence[Timing], ceilings: Ceilings) -> None:
    xs, ys = zip(*map(_place_of, points), strict=True)
    ridge = ceilings.gigaflops / min(ceilings.triad, ceilings.copy)
    axes.set_xlim(min(xs) / 2.2, max(*xs, ridge) * 2)
    axes.set_ylim(min(ys) / 2, max(*ys, ceilings.gigaflops) * 2)


def _draw_roofs(axes: Axes, ceilings: Ceilings) -> list[Point]:
    """Lines and their names; points along the lines."""
    low, high = axes.get_xlim()
    along: list[Point] = []
    higher = max(ceilings.triad, ceilings.copy)
    for name, rate, dashes in (("triad", ceilings.triad, "-"), ("copy", ceilings.copy, "--")):
        ridge = ceilings.gigaflops / rate
        xs = np.geomspace(low, ridge, 200)
        axes.plot(xs, xs * rate, color=BLACK, linewidth=1.3, linestyle=dashes, zorder=1)
        along += zip(xs.tolist(), (xs * rate).tolist(), strict=True)
        start, side = (low * 1.04 * rate * 1.08, "bottom") if rate == higher else (low * 1.04 * rate / 1.1, "top")
        slope = math.degrees(math.atan(rate))
        axes.text(
            low * 1.04,
            start,
            f"{name}, {digits(rate)} GB/s",
            fontsize=8,
            va=side,
            zorder=1,
            rotation=slope,
            rotation_mode="anchor",
            transform_rotates_text=True,
        )
    xs = np.geomspace(ceilings.gigaflops / higher, high, 200)
    axes.plot(xs, np.full_like(xs, ceilings.gigaflops), color=BLACK, linewidth=1.3, zorder=1)
    along += [(x, ceilings.gigaflops) for x in xs.tolist()]
    name = f"float32 matrix product, {digits(ceilings.gigaflops)} GFLOP/s"
    axes.annotate(name, (high, ceilings.gigaflops), (-4, 4), textcoords="offset points", ha="right", fontsize=8)
    return along


def _names(points: Sequence[Timing]) -> list[tuple[Point, str]]:
    """A label for each point of the home of ours that stands first; near ones of an op share one."""
    home = next((one.contender for one in points if one.ours), "")
    chief = [one for one in points if one.contender == home]
    labels = []
    for own in together(chief, lambda one: (_op(one),)).values():
        of_depth: list[list[Timing]] = []  # near each other, alike in depth
        for one in own:
            _join(of_depth, [one], alike=lambda first, new: first[0].depth == new[0].depth)
        of_op: list[list[Timing]] = []  # near each other, with the same set of q at each depth
        for cluster in of_depth:
            _join(of_op, cluster, alike=lambda first, new: _qs(first) == _qs(new))
        for cluster in of_op:
            middle = np.exp(np.mean(np.log([_place_of(one) for one in cluster]), axis=0))
            depths = ", ".join(dict.fromkeys(str(one.depth) for one in cluster if one.depth))
            parts = (f"L = {depths}" if depths else "", f"q = {', '.join(_qs(cluster))}" if _qs(cluster) else "")
            labels.append(((float(middle[0]), float(middle[1])), "; ".join(part for part in parts if part)))
    return labels


def _join(clusters: list[list[Timing]], new: list[Timing], alike: Callable[[list[Timing], list[Timing]], bool]) -> None:
    """Add `new` to the first cluster that is alike and near, or as one of its own."""
    for cluster in clusters:
        apart = np.abs(np.log10(_place_of(cluster[0])) - np.log10(_place_of(new[0])))
        if alike(cluster, new) and apart.max() < NEAR:
            cluster.extend(new)
            return
    clusters.append(new)


def _qs(cluster: Sequence[Timing]) -> list[str]:
    return [exponent(q) for q in sorted({one.q for one in cluster if one.q is not None})]


def _legend(figure: Figure, points: Sequence[Timing], looks: dict[str, Look]) -> None:
    black = Look(BLACK, "", "")
    handles = [_mark(black, MARKS.get(op, OTHER_MARK), True, label=op) for op in dict.fromkeys(_op(one) for one in points)]
    for (name,), own in together(points, lambda one: (one.contender,)).items():
        mark = MARKS.get(_op(own[0]), OTHER_MARK)
        handles.append(_mark(looks[name], mark, own[0].ours, label=name))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
