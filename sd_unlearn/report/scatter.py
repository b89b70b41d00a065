"""Scatter chart of leakage against retention, with interval bars in both directions and labels that hide nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sd_unlearn.report.axes import Area, Axes, percent
from sd_unlearn.report.formatting import finite
from sd_unlearn.results import Row

WIDTH, HEIGHT = 720, 420
AREA = Area(left=64, right=696, top=20, bottom=360)
LETTER, LINE = 7.2, 15  # width of a letter and height of a line, for the 12 px sans of the style sheet
MIN_RANGE = 0.02  # of an axis, so that tiny differences are not blown up


class Mark(NamedTuple):
    """A labelled point: two rates with their intervals."""

    label: str
    x: Row
    y: Row
    style: int = 0  # colour; points of one style are joined in their order
    details: str = ""  # values in words, shown on hover; parts separated by ";"


def scatter_chart(marks: Sequence[Mark]) -> dict[str, Any] | None:
    """Points, bars, ticks and labels in a view box of 720 x 420; None without a finite point.

    If there is no free place for a point's label, its `text` is None; its `tip` still names it.
    """
    kept = [mark for mark in marks if finite(mark.x.value) and finite(mark.y.value)]
    if not kept:
        return None
    xs, ys = [v for mark in kept for v in _ends(mark.x)], [v for mark in kept for v in _ends(mark.y)]
    top = _padded(0.0, max(ys))[1]
    axes = Axes(AREA, _padded(min(xs), max(xs)), (-0.03 * top, top))  # a point at 0 must not lie on the axis
    points = [_point(axes, mark) for mark in kept]
    _place_labels(points)
    for point in points:
        point["tip"] = _tip(point)
    return {
        "points": points,
        "paths": [
            (style, " ".join(f"{p['x']},{p['y']}" for p in points if p["style"] == style))
            for style in dict.fromkeys(p["style"] for p in points)
        ],
        "x": axes.x_ticks(percent, 7),
        "y": axes.y_ticks(percent, 6),
        "area": AREA,
        "size": (WIDTH, HEIGHT),
    }


def _point(axes: Axes, mark: Mark) -> dict[str, Any]:
    return {
        "label": mark.label,
        "style": mark.style,
        "details": mark.details,
        "x": axes.x(mark.x.value or 0.0),
        "y": axes.y(mark.y.value or 0.0),
        "bar_x": [axes.x(end(_ends(mark.x))) for end in (min, max)],
        "bar_y": [axes.y(end(_ends(mark.y))) for end in (min, max)],
    }


def _place_labels(points: list[dict[str, Any]]) -> None:
    """Place each label where it covers no point, bar or other label, as close as possible, tied by a leader line."""
    bars = [Area(p["bar_x"][0], p["bar_x"][1], p["y"] - 2, p["y"] + 2) for p in points]
    bars += [Area(p["x"] - 2, p["x"] + 2, p["bar_y"][1], p["bar_y"][0]) for p in points]
    taken = [Area(p["x"] - 6, p["x"] + 6, p["y"] - 6, p["y"] + 6) for p in points]
    for p in points:
        width = LETTER * len(p["label"])
        best = min(_places(p, width), key=lambda place: (_overlaps(place, taken), _overlaps(place, bars)))
        p["text"] = p["leader"] = None
        if _overlaps(best, taken):
            continue
        taken.append(best)
        end = best.left - 2 if best.left > p["x"] else best.right + 2
        p["text"] = (round(best.left, 1), round(best.bottom - 4, 1))
        p["leader"] = (round(end, 1), round((best.top + best.bottom) / 2, 1))


def _tip(p: dict[str, Any]) -> dict[str, Any]:
    """The box shown on hover, with the point's label and values, inside the chart."""
    rows = [p["label"], *(part.strip() for part in p["details"].split(";") if part)]
    width, height = 0.9 * LETTER * max(map(len, rows)) + 16, LINE * len(rows) + 10
    x = p["x"] + 12 if p["x"] + 12 + width <= WIDTH else p["x"] - 12 - width
    y = p["y"] - 12 - height if p["y"] - 12 - height >= 0 else p["y"] + 12
    return {"x": round(max(0.0, x), 1), "y": round(y, 1), "width": round(width, 1), "height": height, "rows": rows}


def _places(p: dict[str, Any], width: float) -> list[Area]:
    """Where a label can be placed inside the chart, the nearest first."""
    places = []
    for distance in (12 + i * LINE for i in range(8)):
        for right, up in ((True, True), (False, True), (True, False), (False, False)):
            x = p["x"] + 14 if right else p["x"] - 14 - width
            y = p["y"] - distance if up else p["y"] + distance
            places.append(Area(x, x + width, y - LINE / 2, y + LINE / 2))
    inside = [a for a in places if a.left >= AREA.left and a.right <= WIDTH and a.top >= 0 and a.bottom <= AREA.bottom]
    return inside or places


def _overlaps(area: Area, others: list[Area]) -> int:
    return sum(area.overlaps(other) for other in others)


def _ends(row: Row) -> list[float]:
    """The value and the ends of its interval, as far as they are known."""
    return [v for v in (row.value, row.low, row.high) if finite(v)]


def _padded(low: float, high: float) -> tuple[float, float]:
    padding = max(0.0, MIN_RANGE - (high - low)) / 2 + 0.06 * (high - low)
    return low - padding, high + padding
