"""Charts that compare LoRAs: leakage against retention, and both against the strength of a LoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sd_unlearn.report.axes import Area, Axes, percent, spread_labels
from sd_unlearn.report.cases import Case
from sd_unlearn.report.formatting import NONE, finite, interval_text, value_text
from sd_unlearn.report.metric_names import group_name
from sd_unlearn.report.scatter import Mark, scatter_chart
from sd_unlearn.results import BASE, Row

STRENGTH_AREA = Area(left=58, right=366, top=16, bottom=246)  # in a view box of 480 x 300
STYLES = 6  # colours of the style sheet


def charts(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The scatter and strength charts of each concept that has something to compare."""
    found = []
    for slug in dict.fromkeys(case.concept.slug for case in cases):
        members = [case for case in cases if case.concept.slug == slug]
        scatter, strengths = compare_loras(members), strength_charts(members)
        if scatter or strengths:
            found.append({"concept": members[0].concept, "scatter": scatter, "strengths": strengths})
    return found


def compare_loras(cases: Sequence[Case]) -> dict[str, Any] | None:
    """Retention (x) against leakage (y), a point for each LoRA and strength; None for fewer than two points."""
    families = list(dict.fromkeys(case.family for case in cases))
    marks, groups = [], []
    for case in cases:
        leak, kept = case.presence, case.retention
        if leak and kept and leak.lora and kept.lora:
            values = f"leakage {describe(leak.lora)}; retention {describe(kept.lora)}"
            marks.append(Mark(case.label, kept.lora, leak.lora, families.index(case.family) % STYLES, values))
            groups.append(kept.group)
    chart = scatter_chart(marks)
    if chart is None or len(chart["points"]) < 2:
        return None
    shown = {point["label"] for point in chart["points"]}
    base = next((case.presence.base for case in cases if case.presence and case.presence.base), None)
    return {
        **chart,
        "kept_groups": " or ".join(dict.fromkeys(map(group_name, groups))),
        "base_leakage": value_text(base) if base else "",
        "left_out": [case.label for case in cases if case.label not in shown],
    }


def strength_charts(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Leakage and retention of one concept against strength: a line and band for each LoRA with several strengths.

    At strength 0 a LoRA does nothing, so the line starts at the base's value.
    """
    families: dict[str, list[Case]] = {}
    for case in cases:
        if finite(case.subject.strength):
            families.setdefault(case.family, []).append(case)
    several = [
        sorted(members, key=lambda case: case.subject.strength or 0.0)
        for members in families.values()
        if len({case.subject.strength for case in members}) > 1
    ]
    leakage = [(members[0].subject.name, _by_strength(members, "leakage")) for members in several]
    retention = [(members[0].subject.name, _by_strength(members, "retention")) for members in several]
    charts = [
        ("Leakage", "images that still show the concept", leakage),
        ("Retention", "accuracy relative to the base", retention),
    ]
    drawn = [(title, about, strength_chart(series)) for title, about, series in charts]
    return [{"title": title, "about": about, **chart} for title, about, chart in drawn if chart]


def _by_strength(members: Sequence[Case], metric: str) -> list[tuple[float, Row]]:
    points, first = [], None
    for case in members:
        line = case.presence if metric == "leakage" else case.retention
        if line and line.lora and finite(line.lora.value):
            points.append((float(case.subject.strength or 0.0), line.lora))
            first = first or line
    if first and points[0][0] > 0:
        base = Row(metric, first.group, BASE, 1.0, first.main.n) if metric == "retention" else first.base
        points = [(0.0, base), *points] if base and finite(base.value) else points
    return points


def strength_chart(series: Sequence[tuple[str, list[tuple[float, Row]]]]) -> dict[str, Any] | None:
    """Geometry of rates against strength; None if no line has two points. series: name and (strength, row) points."""
    lines = [(name, points) for name, points in series if len(points) > 1]
    if not lines:
        return None
    strengths = sorted({x for _, points in lines for x, _ in points})
    values = [v for _, points in lines for _, row in points for v in (row.value, row.low, row.high) if finite(v)]
    bottom = 0.0 if min(values) < 0.5 else math.floor(20 * min(values)) / 20 - 0.05
    axes = Axes(STRENGTH_AREA, (strengths[0], strengths[-1]), (bottom, max(1.0, *values)))
    geometry = [_strength_line(axes, name, points, i % STYLES) for i, (name, points) in enumerate(lines)]
    spread_labels(geometry, STRENGTH_AREA)
    return {
        "series": geometry,
        "area": STRENGTH_AREA,
        "x": [(axes.x(x), f"{x:g}") for x in strengths],
        "y": axes.y_ticks(percent),
    }


def _strength_line(axes: Axes, name: str, points: list[tuple[float, Row]], style: int) -> dict[str, Any]:
    values = [(x, row.value or 0.0) for x, row in points]
    low = [(x, row.value or 0.0 if row.low is None else row.low) for x, row in points]
    high = [(x, row.value or 0.0 if row.high is None else row.high) for x, row in points]
    return {
        "name": name,
        "style": style,
        "y": axes.y(values[-1][1]),  # of the label at the end
        "points": axes.points(values),
        "band": axes.points([*high, *reversed(low)]),
        "dots": [
            (axes.x(x), axes.y(row.value or 0.0), f"{name} at strength {x:g}: {describe(row)}") for x, row in points
        ],
    }


def describe(row: Row) -> str:
    """'1.0 % (0.3–3.6 %, n = 200)'."""
    interval = interval_text(row)
    return (
        f"{value_text(row)} (n = {row.n:,})" if interval == NONE else f"{value_text(row)} ({interval}, n = {row.n:,})"
    )
