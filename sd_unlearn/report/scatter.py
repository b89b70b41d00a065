"""Geometry of leakage against retention: points with interval bars in both directions, and labels that hide nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from sd_unlearn.report.training_curves import finite, ticks
from sd_unlearn.results import Row

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 696, 20, 360
LETTER, LINE = 7.2, 15  # a label's letter and line in the same units, for the 12 px sans of the style sheet
NARROWEST = 0.02  # a span of the axes below which differences would be blown up out of all proportion


class Mark(NamedTuple):
    """One labelled point: two rates with their intervals."""

    label: str
    x: Row
    y: Row
    style: int = 0  # points of one style are joined in their order
    told: str = ""  # the figures in words, shown when the point is asked


class Box(NamedTuple):
    """A rectangle of the picture; y grows downwards."""

    x0: float
    y0: float
    x1: float
    y1: float

    def meets(self, other: Box) -> bool:
        return self.x0 < other.x1 and other.x0 < self.x1 and self.y0 < other.y1 and other.y0 < self.y1


def tradeoff(marks: Sequence[Mark]) -> dict[str, Any] | None:
    """Points, bars, ticks and labels in a 720 x 420 box, x to the right and y upwards; None without a finite point.

    A point whose label finds no free place goes without: `text` is None. Its `tip` says the same.
    """
    kept = [m for m in marks if finite(m.x.value) and finite(m.y.value)]
    if not kept:
        return None
    xs, ys = [v for m in kept for v in _ends(m.x)], [v for m in kept for v in _ends(m.y)]
    x0, x1 = _padded(min(xs), max(xs))
    y1 = _padded(0.0, max(ys))[1]
    y0 = -0.03 * y1  # a point at 0 shall not lie on the axis

    def across(value: float) -> float:
        return round(LEFT + (value - x0) / (x1 - x0) * (RIGHT - LEFT), 1)

    def down(value: float) -> float:
        return round(BOTTOM - (value - y0) / (y1 - y0) * (BOTTOM - TOP), 1)

    points = [
        {
            "label": m.label,
            "style": m.style,
            "told": m.told,
            "x": across(m.x.value or 0.0),
            "y": down(m.y.value or 0.0),
            "bar_x": [across(v) for v in (min(_ends(m.x)), max(_ends(m.x)))],
            "bar_y": [down(v) for v in (min(_ends(m.y)), max(_ends(m.y)))],
        }
        for m in kept
    ]
    _place_labels(points)
    for point in points:
        point["tip"] = _tip(point)
    return {
        "points": points,
        "paths": [
            (style, " ".join(f"{p['x']},{p['y']}" for p in points if p["style"] == style))
            for style in dict.fromkeys(p["style"] for p in points)
        ],
        "x": [(across(t), f"{100 * t:.4g} %") for t in ticks(x0, x1, 7)],
        "y": [(down(t), f"{100 * t:.4g} %") for t in ticks(y0, y1, 6)],
        "box": (LEFT, RIGHT, TOP, BOTTOM),
        "size": (WIDTH, HEIGHT),
    }


def _place_labels(points: list[dict[str, Any]]) -> None:
    """Give each point a label where it meets no point, bar or other label, as near as possible, tied by a leader."""
    bars = [Box(p["bar_x"][0], p["y"] - 2, p["bar_x"][1], p["y"] + 2) for p in points]
    bars += [Box(p["x"] - 2, p["bar_y"][1], p["x"] + 2, p["bar_y"][0]) for p in points]
    taken = [_around(p) for p in points]
    for p in points:
        wide = LETTER * len(p["label"])
        best = min(_places(p, wide), key=lambda box: (_met(box, taken), _met(box, bars)))
        p["text"] = p["leader"] = None
        if _met(best, taken):
            continue
        taken.append(best)
        right = best.x0 > p["x"]
        p["text"] = (round(best.x0, 1), round(best.y1 - 4, 1))
        p["leader"] = (round(best.x0 - 2 if right else best.x1 + 2, 1), round((best.y0 + best.y1) / 2, 1))


def _tip(p: dict[str, Any]) -> dict[str, Any]:
    """A small box beside the point with its name and figures, inside the picture."""
    rows = [p["label"], *(part.strip() for part in p["told"].split(";") if part)]
    wide, high = 0.9 * LETTER * max(map(len, rows)) + 16, LINE * len(rows) + 10
    x = p["x"] + 12 if p["x"] + 12 + wide <= WIDTH else p["x"] - 12 - wide
    y = p["y"] - 12 - high if p["y"] - 12 - high >= 0 else p["y"] + 12
    return {"x": round(max(0.0, x), 1), "y": round(y, 1), "wide": round(wide, 1), "high": high, "rows": rows}


def _places(p: dict[str, Any], wide: float) -> list[Box]:
    """Where a label may stand inside the picture, the nearest first."""
    boxes = []
    for away in (12 + i * LINE for i in range(8)):
        for right, up in ((True, True), (False, True), (True, False), (False, False)):
            x = p["x"] + 14 if right else p["x"] - 14 - wide
            y = p["y"] - away if up else p["y"] + away
            boxes.append(Box(x, y - LINE / 2, x + wide, y + LINE / 2))
    inside = [b for b in boxes if b.x0 >= LEFT and b.x1 <= WIDTH and b.y0 >= 0 and b.y1 <= BOTTOM]
    return inside or boxes


def _met(box: Box, others: list[Box]) -> int:
    return sum(box.meets(other) for other in others)


def _around(p: dict[str, Any]) -> Box:
    return Box(p["x"] - 6, p["y"] - 6, p["x"] + 6, p["y"] + 6)


def _ends(row: Row) -> list[float]:
    """The value and whatever ends its interval has."""
    return [v for v in (row.value, row.low, row.high) if v is not None and math.isfinite(v)]


def _padded(low: float, high: float) -> tuple[float, float]:
    room = max(0.0, NARROWEST - (high - low)) / 2 + 0.06 * (high - low)
    return low - room, high + room
