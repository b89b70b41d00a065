"""Line charts of metrics.jsonl: how far predictions have moved, or the losses and their ratio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sd_unlearn.report.axes import Area, Axes, spread_labels
from sd_unlearn.report.formatting import finite

AREA = Area(left=52, right=378, top=16, bottom=216)  # in a view box of 480 x 260
MOST_POINTS = 400  # of a line; further ones would not be visible


def training_charts(log: list[dict[str, Any]], beta: float | None) -> list[dict[str, Any]]:
    """With the base as teacher, how far predictions have moved. Else the mean losses, and their ratio with the
    equilibrium 1 / beta, if it has one.

    log: the lines of metrics.jsonl.
    """
    moved = line_chart(log, ("moved",), target=(1, "as the generic caption"))
    spillover = line_chart(log, ("spillover",))
    losses = ratio = None
    if not moved:
        losses = line_chart(log, ("mean_u", "mean_s"))
        equilibrium = (1 / beta, f"equilibrium 1 / beta = {1 / beta:,.3g}") if beta else None
        ratio = line_chart(log, ("ratio",), target=equilibrium)
    charts = [
        ("Moved", "predictions on concept images, from the base's (0) to those under the generic caption (1)", moved),
        ("Spillover", "change of predictions on retained images, relative to the effect of their captions", spillover),
        ("Mean loss", "loss of unlabeled images (mean_u) and concept images (mean_s)", losses),
        ("Ratio", "mean loss of concept images divided by that of unlabeled images (mean_s / mean_u)", ratio),
    ]
    return [{"title": title, "about": about, **chart} for title, about, chart in charts if chart]


def line_chart(
    log: list[dict[str, Any]], keys: Sequence[str], target: tuple[float, str] | None = None
) -> dict[str, Any] | None:
    """Geometry of a chart with one line per key: polylines, ticks and end labels; None without two points.

    Missing and non-finite values are left out. target: a value to mark with a horizontal line, and its label.
    """
    by_step = {r["step"]: r for r in log if finite(r.get("step"))}  # of a repeated step the last line counts
    series = {k: [(s, by_step[s][k]) for s in sorted(by_step) if finite(by_step[s].get(k))] for k in keys}
    points = [point for line in series.values() for point in line]
    steps, values = {x for x, _ in points}, [y for _, y in points]
    if len(steps) < 2:
        return None
    top = max(0.0, *values, target[0] if target else 0.0) * 1.05 or 1.0
    axes = Axes(AREA, (min(steps), max(steps)), (min(0.0, *values), top))
    lines = []
    for name, line in series.items():
        shown = line[:: max(1, len(line) // MOST_POINTS)] + line[-1:]
        if shown:
            last = shown[-1][1]
            lines.append({"name": name, "points": axes.points(shown), "y": axes.y(last), "last": last})
    spread_labels(lines, AREA)
    return {
        "series": lines,
        "x": axes.x_ticks(lambda step: f"{step:,.0f}"),
        "y": axes.y_ticks(lambda value: f"{value:,.4g}"),
        "area": AREA,
        "target": None if target is None else (axes.y(target[0]), target[1]),
    }
