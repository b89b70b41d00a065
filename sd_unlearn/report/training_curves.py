"""Geometry of the training curve, and of ticks and labels that all charts share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeGuard


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) inside [low, high], about `count` of them."""
    if high <= low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10, 20) if (high - low) / (step * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def chart(log: list[dict[str, Any]], keys: Sequence[str], target: float | None = None) -> dict[str, Any] | None:
    """Geometry of one line chart in a 480 x 260 box: polylines, ticks and end labels; None without two points.

    Values that are missing or not finite are left out of their line.
    """
    left, right, top, bottom = 52, 378, 16, 216
    by_step = {r["step"]: r for r in log if isinstance(r.get("step"), int | float)}  # a resumed step counts once
    series = {k: [(s, by_step[s][k]) for s in sorted(by_step) if finite(by_step[s].get(k))] for k in keys}
    points = [p for line in series.values() for p in line]
    if len({x for x, _ in points}) < 2:
        return None
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    y0, y1 = min(0.0, *(y for _, y in points)), max(0.0, *(y for _, y in points), target or 0.0) * 1.05 or 1.0

    def across(x: float) -> float:
        return round(left + (x - x0) / (x1 - x0) * (right - left), 1)

    def down(y: float) -> float:
        return round(bottom - (y - y0) / (y1 - y0) * (bottom - top), 1)

    drawn = []
    for key, line in series.items():
        kept = line[:: max(1, len(line) // 400)] + line[-1:]
        if kept:
            drawn.append(
                {
                    "name": key,
                    "points": " ".join(f"{across(x)},{down(y)}" for x, y in kept),
                    "y": down(kept[-1][1]),
                    "last": kept[-1][1],
                }
            )
    apart(drawn, top, bottom)
    return {
        "series": drawn,
        "x": [(across(t), f"{t:,.0f}") for t in ticks(x0, x1)],
        "y": [(down(t), f"{t:,.4g}") for t in ticks(y0, y1)],
        "box": (left, right, top, bottom),
        "target": None if target is None else (down(target), f"{target:,.3g}"),
    }


def training_charts(log: list[dict[str, Any]], beta: float | None) -> list[dict[str, Any]]:
    """What metrics.jsonl says of a training: both means, and their ratio against the equilibrium."""
    risk = chart(log, ("mean_u", "mean_s"))
    ratio = chart(log, ("ratio",), target=1 / beta if beta else None)
    made = [
        ("Mean loss", "loss of unlabeled (mean_u) and concept pictures (mean_s)", risk),
        ("Ratio", "mean_s over mean_u", ratio),
    ]
    return [{"title": title, "about": about, **drawn} for title, about, drawn in made if drawn]


def apart(labels: list[dict[str, Any]], top: float, bottom: float, gap: float = 16) -> None:
    """Move the labels' y as little as need be for none to cover another, inside the box while they fit."""
    order = sorted(labels, key=lambda s: s["y"])
    for above, below in itertools.pairwise(order):
        below["y"] = max(below["y"], above["y"] + gap)
    limit = bottom
    for label in reversed(order):
        label["y"] = max(min(label["y"], limit), top)
        limit = label["y"] - gap


def finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)
