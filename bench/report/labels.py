"""Labels beside points, so placed that none covers another, a point or a line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from .style import GREY

Point = tuple[float, float]

DISTANCES = (7, 12, 18, 25, 34, 45, 58, 72, 88)  # from a point to the nearest side of its label, in points of type
ANGLES = tuple(range(0, 360, 15))
LEADER = 13  # a label farther than this is joined to its point by a line
OUTSIDE, OTHER_LABEL, OTHER_POINT, LINE = 1000, 30, 10, 1  # what it costs to cover these


def place(axes: Axes, labels: Sequence[tuple[Point, str]], points: Sequence[Point], lines: Sequence[Point]) -> list[Annotation]:
    """A label for each ((x, y), text), clear of `points` and of those along `lines`, as far as there is room.

    In data coordinates; the axes' limits must be final. Each label takes the nearest free place, those in a crowd first.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    dots = figure.dpi / 72
    inside = axes.get_window_extent()
    taken = [(text.get_window_extent().padded(dots), OTHER_LABEL) for text in axes.texts]
    taken += [(_around(one, 4 * dots), OTHER_POINT) for one in _on_page(axes, points)]
    taken += [(_around(one, 2 * dots), LINE) for one in _on_page(axes, lines)]
    anchors = _on_page(axes, [point for point, _ in labels])
    crowd = [sum(math.dist(one, other) < 60 * dots for other in anchors) for one in anchors]
    placed = []
    for k in sorted(range(len(labels)), key=lambda k: -crowd[k]):
        point, text = labels[k]
        note = axes.annotate(text, point, (0, 0), textcoords="offset points", fontsize=7.5, ha="center", va="center")
        own = note.get_window_extent().padded(dots)
        best: tuple[int, Point, Bbox, Bbox] | None = None
        for distance, angle in product(DISTANCES, ANGLES):
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            offset = (dx * (distance * dots + own.width / 2), dy * (distance * dots + own.height / 2))
            box = own.translated(*offset)
            leader = Bbox([anchors[k], _nearest(box, anchors[k])])
            outside = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
            cost = OUTSIDE * outside + sum(weight for other, weight in taken if box.overlaps(other))
            if distance > LEADER:
                cost += sum(weight for other, weight in taken if weight == OTHER_LABEL and _crosses(leader, other))
            if best is None or cost < best[0]:
                best = (cost, offset, box, leader)
            if cost == 0:
                break
        assert best is not None
        _, offset, box, leader = best
        note.set_position((offset[0] / dots, offset[1] / dots))
        taken.append((box, OTHER_LABEL))
        if math.dist(leader.p0, leader.p1) > LEADER * dots:
            (x, y), (x0, y0) = leader.p1, leader.p0
            line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
            end = ((x - x0) / dots, (y - y0) / dots)
            axes.annotate("", point, end, textcoords="offset points", arrowprops=line, zorder=1)
            taken += [(_around(one, dots), OTHER_POINT) for one in _along(leader)]
        placed.append(note)
    return placed


def _on_page(axes: Axes, points: Sequence[Point]) -> list[Point]:
    return [(float(x), float(y)) for x, y in axes.transData.transform(np.reshape(points, (-1, 2)))]


def _around(point: Point, radius: float) -> Bbox:
    return Bbox.from_bounds(point[0] - radius, point[1] - radius, 2 * radius, 2 * radius)


def _nearest(box: Bbox, point: Point) -> Point:
    """The place in `box` that is nearest to `point`."""
    return min(max(point[0], box.x0), box.x1), min(max(point[1], box.y0), box.y1)


def _along(line: Bbox) -> list[Point]:
    """Points of the line from a box's first corner to its second."""
    (x0, y0), (x1, y1) = line.p0, line.p1
    return [(x0 + part * (x1 - x0), y0 + part * (y1 - y0)) for part in np.linspace(0.1, 1, 15)]


def _crosses(line: Bbox, box: Bbox) -> bool:
    return any(box.contains(*point) for point in _along(line))
