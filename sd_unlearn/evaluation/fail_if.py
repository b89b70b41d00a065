"""--fail_if: conditions on figures that make `evaluate` end with exit code 1, for pipelines."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sd_unlearn.errors import UsageError
from sd_unlearn.results import BASE

_FORM = re.compile(
    r"(?P<metric>[A-Za-z][\w-]*)(?:\.(?P<group>[a-z_]+?))??(?:\.(?P<end>low|high))?\s*"
    r"(?P<sign><=|>=|<|>)\s*(?P<limit>[-+.\deE]+)(?P<percent>\s*%)?"
)
SHARES = ("leakage", "accuracy", "nudity", "confusion", "face_rate")
OF_THE_CONCEPT = ("leakage", "leakage_top5", "nudity", "detections", "clean_replacement")
_SIGNS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclass(frozen=True)
class Condition:
    """metric[.group][.low|.high] < <= > >= limit; without a group it is of direct prompts, else of what must stay."""

    text: str
    metric: str
    group: str | None
    end: str  # value, or an end of its interval
    sign: str
    limit: float

    def holds(self, row: dict[str, Any]) -> bool:
        """Whether a figure meets the condition. One that is unknown does: a pipeline must not pass on it."""
        found = row.get(self.end)
        return found is None or _SIGNS[self.sign](found, self.limit)


def parse(text: str) -> Condition:
    """A condition as it is written.

    Raises:
        UsageError: naming the form.
    """
    match = _FORM.fullmatch(text.strip())
    try:
        limit = float(match["limit"]) if match else float("nan")
    except ValueError:
        match = None
    if match is None:
        raise UsageError(
            f'--fail_if "{text}" is no condition. E.g. "leakage>0.02", "leakage.held_out.high>5%", '
            '"retention.kept<0.95".'
        )
    limit = limit / 100 if match["percent"] else limit
    if match["metric"] in SHARES and limit > 1:
        raise UsageError(
            f'--fail_if "{text}": {match["metric"]} is a share from 0 to 1. Write {limit:g}% or {limit / 100:g}.'
        )
    return Condition(text, match["metric"], match["group"], match["end"] or "value", match["sign"], limit)


def met(conditions: Sequence[Condition], results: dict[str, Any]) -> list[str]:
    """What each condition that holds is about, with the figure; also a condition on something that was not measured.

    They are asked of every subject but the base; of a LoRA at several strengths, at strength 1, else at the greatest.
    Whether a concept is there is not asked of a LoRA that was trained to forget another.
    """
    found = []
    subjects = judged_subjects(results)
    meant = {s["id"]: s.get("forgets") for s in results["subjects"]}
    judged = [row for row in results["rows"] if row["subject"] in subjects]
    for condition in conditions:
        rows = _rows(
            condition,
            [
                row
                for row in judged
                if row["metric"] not in OF_THE_CONCEPT or meant[row["subject"]] in (None, row["concept"])
            ],
        )
        if not rows:
            where = f" on {condition.group} prompts" if condition.group else ""
            found.append(f"{condition.text}: {condition.metric}{where} was not measured")
        for row in rows:
            if condition.holds(row):
                value = row.get(condition.end)
                shown = "unknown" if value is None else f"{value:.4g}"
                found.append(f"{condition.text}: {row['subject']} on {row['concept']} has {shown} ({row['group']})")
    return found


def judged_subjects(results: dict[str, Any]) -> set[str]:
    """The ids that conditions are asked of."""
    strengths: dict[str, list[float]] = {}
    for subject in results["subjects"]:
        if subject.get("strength") is not None:
            strengths.setdefault(subject["name"], []).append(subject["strength"])
    usual = {name: 1 if 1 in given else max(given) for name, given in strengths.items()}
    return {
        s["id"] for s in results["subjects"] if s["id"] != BASE and s.get("strength") in (None, usual.get(s["name"]))
    }


def _rows(condition: Condition, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    of_metric = [row for row in rows if row["metric"] == condition.metric]
    for group in [condition.group] if condition.group else ["direct", "kept"]:
        chosen = [row for row in of_metric if row["group"] == group]
        if chosen:
            return chosen
    return [] if condition.group else of_metric
