"""Many LoRAs as pictures: leakage against retention, and both against a LoRA's strength."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sd_unlearn.report.cases import Case
from sd_unlearn.report.formatting import GROUPS, Line, shown, span
from sd_unlearn.report.scatter import Mark, tradeoff
from sd_unlearn.report.training_curves import apart, finite, ticks
from sd_unlearn.results import BASE, Row


def charts(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """For each concept with something to compare: the scatter, the strength curves, and what is not in them."""
    made = []
    for slug in dict.fromkeys(case.concept["slug"] for case in cases):
        mine = [case for case in cases if case.concept["slug"] == slug]
        scatter, strengths = scattered(mine), strength_charts(mine)
        if scatter or strengths:
            made.append({"concept": mine[0].concept, "scatter": scatter, "strengths": strengths})
    return made


def scattered(cases: Sequence[Case]) -> dict[str, Any] | None:
    """Retention to the right, leakage upwards, a point a LoRA and strength; None for less than two points."""
    families = list(dict.fromkeys(case.family for case in cases))
    marks, groups = [], []
    for case in cases:
        leak, kept = case.gone, case.pick("retention", "kept", "general", "alike")
        if leak and kept and leak.lora and kept.lora:
            told = f"leakage {told_of(leak.lora)}; retention {told_of(kept.lora)}"
            marks.append(Mark(case.label, kept.lora, leak.lora, families.index(case.family), told))
            groups.append(kept.group)
    drawn = tradeoff(marks)
    if drawn is None or len(drawn["points"]) < 2:
        return None
    labels = [point["label"] for point in drawn["points"]]
    before = next((case.gone.base for case in cases if case.gone and case.gone.base), None)
    kept_is = figure_listed(groups)
    return {
        **drawn,
        "kept_is": kept_is,
        "before": shown(before) if before else "",
        "left_out": [case.label for case in cases if case.label not in labels],
    }


def figure_listed(groups: Sequence[str]) -> str:
    return " or ".join(dict.fromkeys(GROUPS[g][0] if g in GROUPS else g for g in groups))


def strength_charts(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Leakage and retention of one concept against strength, a line and band for each LoRA that has two strengths.

    At 0 the LoRA does nothing: there the base's own figures stand.
    """
    families: dict[str, list[Case]] = {}
    for case in cases:
        if finite(case.subject.get("strength")):
            families.setdefault(case.family, []).append(case)
    several = [
        sorted(members, key=lambda c: c.subject["strength"])
        for members in families.values()
        if len({c.subject["strength"] for c in members}) > 1
    ]
    leaks = [(m[0].subject["name"], _along(m, "leakage")) for m in several]
    kept = [(m[0].subject["name"], _along(m, "retention")) for m in several]
    made = [("Leakage", "pictures that still show it", leaks), ("Retention", "accuracy as a share of the base’s", kept)]
    return [{"title": title, "about": about, **drawn} for title, about, series in made if (drawn := bands(series))]


def _along(members: Sequence[Case], metric: str) -> list[tuple[float, Row]]:
    found: list[tuple[float, Line]] = []
    for case in members:
        line = case.gone if metric == "leakage" else case.pick("retention", "kept", "general", "alike")
        if line and line.lora and finite(line.lora.value):
            found.append((float(case.subject["strength"]), line))
    points = [(strength, line.lora) for strength, line in found if line.lora]
    if points and points[0][0] > 0:
        first = found[0][1]
        alone = Row(metric, first.group, BASE, 1.0, first.main.n) if metric == "retention" else first.base
        points = [(0.0, alone), *points] if alone and finite(alone.value) else points
    return points


def bands(series: Sequence[tuple[str, list[tuple[float, Row]]]]) -> dict[str, Any] | None:
    """Geometry of rates against strength in a 480 x 300 box; None when no line has two points."""
    left, right, top, bottom = 58, 366, 16, 246
    drawn = [(name, points) for name, points in series if len(points) > 1]
    if not drawn:
        return None
    xs = [x for _, points in drawn for x, _ in points]
    ys = [v for _, points in drawn for _, row in points for v in (row.value, row.low, row.high) if finite(v)]
    x0, x1, y1 = min(xs), max(xs), max(1.0, *ys)
    y0 = 0.0 if min(ys) < 0.5 else math.floor(20 * min(ys)) / 20 - 0.05

    def across(x: float) -> float:
        return round(left + (x - x0) / (x1 - x0) * (right - left), 1)

    def down(y: float) -> float:
        return round(bottom - (y - y0) / (y1 - y0) * (bottom - top), 1)

    made = []
    for number, (name, points) in enumerate(drawn):
        spread = [(x, *(r.value or 0.0 if end is None else end for end in (r.low, r.high))) for x, r in points]
        upper = [f"{across(x)},{down(high)}" for x, _, high in spread]
        lower = [f"{across(x)},{down(low)}" for x, low, _ in reversed(spread)]
        made.append(
            {
                "name": name,
                "style": number % 6,
                "y": down(points[-1][1].value or 0.0),
                "points": " ".join(f"{across(x)},{down(r.value or 0.0)}" for x, r in points),
                "band": " ".join(upper + lower),
                "dots": [
                    (across(x), down(r.value or 0.0), f"{name} at strength {x:g}: {told_of(r)}") for x, r in points
                ],
            }
        )
    apart(made, top, bottom)
    return {
        "series": made,
        "box": (left, right, top, bottom),
        "x": [(across(x), f"{x:g}") for x in sorted(set(xs))],
        "y": [(down(t), f"{100 * t:.4g} %") for t in ticks(y0, y1)],
    }


def told_of(row: Row) -> str:
    return f"{shown(row)} ({span(row)}, n = {row.n:,})" if span(row) != "–" else f"{shown(row)} (n = {row.n:,})"
