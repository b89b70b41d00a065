"""--fail_if: conditions on metrics that make `evaluate` end with exit code 3, for pipelines."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sd_unlearn.errors import UsageError, suggest
from sd_unlearn.report.metric_names import GROUPS, METRICS, known_as
from sd_unlearn.results import BASE, FLOOR

_FORM = re.compile(
    r"(?P<metric>[A-Za-z][\w-]*)(?:\.(?P<group>[a-z_]+?))??(?:\.(?P<end>low|high))?\s*"
    r"(?P<sign><=|>=|<|>)\s*(?P<limit>[-+.\deE]+)(?P<percent>\s*%)?"
)
SHARES = ("leakage", "attack", "accuracy", "nudity", "confusion", "face_rate")  # metrics between 0 and 1
CONCEPT_METRICS = (
    "leakage",
    "attack",
    "leakage_top5",
    "nudity",
    "detections",
    "clean_replacement",
)  # measure the concept itself
DEFAULT_GROUPS = ("direct", "kept")  # of a condition without a group: the first that the metric has
_SIGNS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclass(frozen=True)
class Condition:
    """metric[.group][.low|.high] < <= > >= limit."""

    text: str
    metric: str
    group: str | None  # None: see DEFAULT_GROUPS
    end: str  # value, low or high
    sign: str
    limit: float

    def holds(self, row: dict[str, Any]) -> bool:
        """Whether a row meets the condition. Unknown values do, so that a pipeline does not pass because of them."""
        value = row.get(self.end)
        return value is None or _SIGNS[self.sign](value, self.limit)


def parse_condition(text: str) -> Condition:
    """Parse a condition such as "leakage.held_out.high>5%".

    Raises:
        UsageError: not a condition, an unknown metric or prompt group, or a limit above 1 for a metric between 0 and 1.
    """
    match = _FORM.fullmatch(text.strip())
    try:
        limit = float(match["limit"]) if match else float("nan")
    except ValueError:
        match = None
    if match is None:
        raise UsageError(
            f'--fail_if "{text}" is not a condition. Examples: "leakage>0.02", "leakage.held_out.high>5%", '
            '"retention.kept<0.95".'
        )
    _check_names(text, match["metric"], match["group"])
    limit = limit / 100 if match["percent"] else limit
    if match["metric"] in SHARES and limit > 1:
        raise UsageError(
            f'--fail_if "{text}": {match["metric"]} is between 0 and 1. Write {limit:g}% or {limit / 100:g}.'
        )
    return Condition(text, match["metric"], match["group"], match["end"] or "value", match["sign"], limit)


def _check_names(text: str, metric: str, group: str | None) -> None:
    if known_as(metric) not in METRICS:
        raise UsageError(
            f'--fail_if "{text}": there is no metric {metric}.{suggest(metric, METRICS)} Known: {", ".join(METRICS)}.'
        )
    if group is not None and group not in GROUPS:
        known = (*GROUPS, "low", "high")
        raise UsageError(
            f'--fail_if "{text}": {group} is not a prompt group.{suggest(group, known)} Known: {", ".join(GROUPS)}.'
        )


def outcomes(conditions: Sequence[Condition], results: dict[str, Any]) -> list[dict[str, Any]]:
    """The outcome of each condition as results.json records it: condition, holds, and why for each subject."""
    found = []
    for condition in conditions:
        because = met_conditions([condition], results)
        reasons = [line.removeprefix(f"{condition.text}: ") for line in because]
        found.append({"condition": condition.text, "holds": bool(because), "reasons": reasons})
    return found


def met_conditions(conditions: Sequence[Condition], results: dict[str, Any]) -> list[str]:
    """A line with the value for each row that meets a condition, and for each condition on a metric without rows.

    Every condition is met by a subject and concept with a problem, because no verdict may be given on them.

    Conditions apply to every subject but the base; to a LoRA at several strengths at strength 1, else at the highest.
    Metrics of the concept itself do not apply to a LoRA that was trained to unlearn another concept.
    """
    subjects = checked_subjects(results)
    unknown = _without_verdict(results, subjects)
    lines = []
    unlearned = {subject["id"]: subject.get("forgets") for subject in results["subjects"]}
    rows = [
        row
        for row in results["rows"]
        if row["subject"] in subjects
        and (row["metric"] not in CONCEPT_METRICS or unlearned[row["subject"]] in (None, row["concept"]))
    ]
    for condition in conditions:
        lines += [f"{condition.text}: cannot tell for {reason}" for reason in unknown]
        matching = _matching_rows(condition, rows)
        if not matching:
            where = f" on {condition.group} prompts" if condition.group else ""
            lines.append(f"{condition.text}: {condition.metric}{where} was not measured")
        for row in matching:
            if condition.holds(row):
                value = row.get(condition.end)
                text = "unknown" if value is None else f"{value:.4g}"
                lines.append(f"{condition.text}: {row['subject']} on {row['concept']} has {text} ({row['group']})")
    return lines


def checked_subjects(results: dict[str, Any]) -> set[str]:
    """The ids of the subjects that conditions apply to."""
    strengths: dict[str, list[float]] = {}
    for subject in results["subjects"]:
        if subject.get("strength") is not None:
            strengths.setdefault(subject["name"], []).append(subject["strength"])
    main = {name: 1 if 1 in values else max(values) for name, values in strengths.items()}
    return {
        subject["id"]
        for subject in results["subjects"]
        if subject["id"] not in (BASE, FLOOR) and subject.get("strength") in (None, main.get(subject["name"]))
    }


def _without_verdict(results: dict[str, Any], subjects: set[str]) -> list[str]:
    """ "subject on concept: reason" for each problem of the subjects; one of the base concerns all of them."""
    return [
        f"{problem['subject']} on {problem['concept'] or 'every concept'}: {problem['message'].rstrip('.')}"
        for problem in results.get("problems", ())
        if problem["subject"] == BASE or problem["subject"] in subjects
    ]


def _matching_rows(condition: Condition, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    of_metric = [row for row in rows if row["metric"] == condition.metric]
    for group in [condition.group] if condition.group else DEFAULT_GROUPS:
        matching = [row for row in of_metric if row["group"] == group]
        if matching:
            return matching
    return [] if condition.group else of_metric
