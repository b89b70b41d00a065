"""Many LoRAs side by side: the verdict on each concept, the table of figures, differences in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sd_unlearn.report.cases import Case, labels
from sd_unlearn.report.formatting import GROUPS, METRICS, Line, is_rate, number
from sd_unlearn.report.headline import cost_answer
from sd_unlearn.results import BASE, Row

# (metric, groups in order of preference, title); "leakage" stands for whatever says that a concept is there
COLUMNS = (
    ("leakage", ("direct",), "Leakage"),
    ("leakage", ("held_out",), "Leakage, other wordings"),
    ("leakage", ("generic",), "Leakage, generic prompt"),
    ("face_rate", ("direct",), "Face rate"),
    ("confusion", ("alike", "kept", "general"), "Confusion"),
    ("clean_replacement", ("direct",), "Clean replacement"),
    ("retention", ("kept", "general", "alike"), "Retention"),
    ("drift", ("kept", "general", "alike"), "Drift"),
    ("lpips", ("kept", "general", "alike"), "LPIPS"),
    ("fid-digits", ("alike", "kept"), "FID (digits)"),
    ("fid-inception", ("kept", "general", "alike"), "FID"),
    ("kid-inception", ("kept", "general", "alike"), "KID"),
    ("cmmd", ("kept", "general", "alike"), "CMMD"),
    ("clip_score", ("general", "kept", "alike"), "CLIP score"),
)
FALLING = ("retention", "clean_replacement", "accuracy", "face_rate", "clip_score")  # more is better: largest first
CLEAR = 0.05  # below this corrected p a difference is called one


@dataclass(frozen=True)
class Cell:
    """One figure of the table with the row it is of, and how far it lies from the base in words."""

    row: Row
    change: str = ""


def table(results: dict[str, Any], cases: Sequence[Case]) -> dict[str, Any]:
    """Columns that have a figure at all, and a line for each case, the base's own first for each concept."""
    body: list[dict[str, Any]] = []
    names = labels(results)
    for slug in dict.fromkeys(case.concept["slug"] for case in cases):
        mine = [case for case in cases if case.concept["slug"] == slug]
        base = [_base(column, mine) for column in COLUMNS]
        if any(base):
            body.append(
                {
                    "label": f"no LoRA: {names.get(BASE, '')}" if names.get(BASE) else "no LoRA",
                    "case": None,
                    "concept": mine[0].concept,
                    "standing": "",
                    "word": "–",
                    "cells": base,
                }
            )
        for case in mine:
            cells = [_cell(results, case, _line(case, *column[:2])) for column in COLUMNS]
            body.append(
                {
                    "label": case.label,
                    "case": case,
                    "concept": case.concept,
                    "standing": case.standing,
                    "word": case.word,
                    "cells": cells,
                }
            )
    kept = [i for i in range(len(COLUMNS)) if any(line["cells"][i] for line in body)]
    for line in body:
        line["cells"] = [line["cells"][i] for i in kept]
    columns = [(COLUMNS[i][2], COLUMNS[i][0] in FALLING) for i in kept]
    return {"columns": columns, "body": body}


def _line(case: Case, metric: str, groups: Sequence[str]) -> Line | None:
    if metric != "leakage":
        return case.pick(metric, *groups)
    gone = case.gone
    name = gone.metric if gone else metric
    hits = [x for x in case.lines if x.metric == name and x.group in groups and x.lora]
    same = [x for x in hits if gone and x.main.detector == gone.main.detector]
    return next(iter(same or hits), None)


def _base(column: tuple[str, tuple[str, ...], str], cases: Sequence[Case]) -> Cell | None:
    found = [_line(case, *column[:2]) for case in cases]
    return next((Cell(line.base) for line in found if line and line.base), None)


def _cell(results: dict[str, Any], case: Case, line: Line | None) -> Cell | None:
    if line is None or line.lora is None:
        return None
    mine = {
        "concept": case.concept["slug"],
        "subject": case.subject["id"],
        "against": BASE,
        "metric": line.metric,
        "group": line.group,
    }
    hits = [d for d in results["differences"] if all(d[k] == v for k, v in mine.items())]
    same = [d for d in hits if d.get("detector", "") == line.lora.detector] or hits
    return Cell(line.lora, in_words(same[0]) if same else "")


def in_words(difference: dict[str, Any]) -> str:
    """'−95.5 points, p < 0.001', or that no difference was shown."""
    value = difference["value"]
    if value is None or not math.isfinite(value):
        return ""
    if value == 0:
        return "no difference"
    p, far = chance(difference), ("−" if value < 0 else "+") + distance(difference)
    if p is None:
        return far
    return f"{far}, {said(p)}" if p < CLEAR else f"{far}, not shown to differ, {said(p)}"


def distance(difference: dict[str, Any]) -> str:
    """The size of a difference: points of a rate, else in the metric's own unit."""
    row = Row(difference["metric"], difference["group"], "", abs(difference["value"]), difference["n"])
    return number(row.value, row).replace(" %", " points") if is_rate(row) else number(row.value, row)


def chance(difference: dict[str, Any]) -> float | None:
    """p corrected for all that was compared, or as it is where it was not corrected."""
    p = difference.get("p_holm")
    return p if p is not None else difference.get("p")


def said(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def differences(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Every difference with the names people read, its interval and its meaning in words."""
    names, about = labels(results), {c["slug"]: c["name"] for c in results["concepts"]}
    made = []
    for d in results["differences"]:
        row = Row(d["metric"], d["group"], "", d["value"], d["n"])
        ends = [number(d.get(k), row).removesuffix(" %") for k in ("low", "high")]
        p = chance(d)
        made.append(
            {
                "concept": about[d["concept"]],
                "subject": names[d["subject"]],
                "against": names[d["against"]],
                "metric": METRICS.get(d["metric"], (d["metric"],))[0],
                "group": GROUPS.get(d["group"], (d["group"],))[0],
                "value": number(d["value"], row).replace(" %", " points").replace("-", "−"),
                "span": " to ".join(ends).replace("-", "−"),
                "n": d["n"],
                "p": "–" if p is None else said(p).removeprefix("p ").removeprefix("= "),
                "means": "" if p is None else "differ" if p < CLEAR else "not shown to differ",
            }
        )
    return made


def summary(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """For each concept how many forget it, and the one that does with least harm (or leaks least)."""
    made = []
    for slug in dict.fromkeys(case.concept["slug"] for case in cases):
        mine = [c for c in cases if c.concept["slug"] == slug and c.meant and c.standing != "unmeasured"]
        gone = [c for c in mine if c.standing == "gone"]
        best = max(gone, key=_retention) if gone else min(mine, key=_leakage, default=None)
        made.append(
            {
                "concept": next(c.concept for c in cases if c.concept["slug"] == slug),
                "gone": len(gone),
                "of": len(mine),
                "best": best,
                "leakage": best and best.gone,
                "retention": best and best.pick("retention", "kept", "general", "alike"),
                "cost": cost_answer(best.about["cost"])["big"] if best else "–",
            }
        )
    return made


def _retention(case: Case) -> float:
    line = case.pick("retention", "kept", "general", "alike")
    return line.lora.value if line and line.lora and line.lora.value is not None else -1.0


def _leakage(case: Case) -> float:
    line = case.gone
    return line.lora.value if line and line.lora and line.lora.value is not None else math.inf


def headline(cases: Sequence[Case]) -> tuple[str, str]:
    """The verdict on many: a title and a sentence that counts."""
    rows = summary(cases)
    done, asked = sum(bool(r["gone"]) for r in rows), len(rows)
    tried, gone = sum(r["of"] for r in rows), sum(r["gone"] for r in rows)
    if not tried:
        return "Not measured", "No picture was judged."
    if asked == 1:
        best = rows[0]["best"]
        return f"Gone with {gone} of {tried}", f"The best of them is {best.label}: {best.verdict}"
    each = "All gone" if gone == tried else "Each is gone with some LoRA"
    word = each if done == asked else "None gone" if not done else f"{done} of {asked} gone"
    return word, (
        f"{done} of {asked} concepts are gone with at least one setting; of all {tried} pairs of a concept and a LoRA "
        f"meant to forget it, {gone} are."
    )
