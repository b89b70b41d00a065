"""--fail_if: conditions on metrics that make `evaluate` end with exit code 3, for pipelines."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sd_unlearn.errors import UsageError, suggest
from sd_unlearn.report.metric_names import GROUPS, METRICS, known_as
from sd_unlearn.results import BASE, FLOOR, Outcome, Results, Row, SubjectEntry

_FORM = re.compile(
    r"(?P<metric>[A-Za-z][\w-]*)(?:\.(?P<group>[a-z_]+?))??(?:\.(?P<end>low|high))?\s*"
    r"(?P<sign><=|>=|<|>)\s*(?P<limit>[-+.\deE]+)(?P<percent>\s*%)?"
)
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

    def value(self, row: Row) -> float | None:
        """The value of a row that the condition is about."""
        return {"value": row.value, "low": row.low, "high": row.high}[self.end]

    def holds(self, row: Row) -> bool:
        """Whether a row meets the condition. Unknown values do, so that a pipeline does not pass because of them."""
        value = self.value(row)
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
    if METRICS[known_as(match["metric"])].is_share and limit > 1:
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


def outcomes(conditions: Sequence[Condition], results: Results) -> list[Outcome]:
    """The outcome of each condition, with the reasons why it holds."""
    found = []
    for condition in conditions:
        because = met_conditions([condition], results)
        reasons = tuple(line.removeprefix(f"{condition.text}: ") for line in because)
        found.append(Outcome(condition.text, bool(because), reasons))
    return found


def met_conditions(conditions: Sequence[Condition], results: Results, only: str | None = None) -> list[str]:
    """A line with the value for each row that meets a condition, and for each condition on a metric without rows.

    Every condition is met by a subject and concept with a problem, because no verdict may be given on them.

    Conditions apply to every subject but the base; to a LoRA at several strengths at strength 1, else at the highest.
    Metrics of the concept itself do not apply to a LoRA that was trained to unlearn another concept.

    Args:
        only: The id of the only subject to check; default: all of them.
    """
    checked = {s.id: s for s in checked_subjects(results) if only in (None, s.id)}
    rows = [
        row
        for row in results.rows
        if row.subject in checked and (not _is_of_concept(row) or checked[row.subject].should_forget(row.concept))
    ]
    unknown = [
        f"{problem.subject} on {problem.concept or 'every concept'}: {problem.message.rstrip('.')}"
        for problem in results.problems
        if problem.subject == BASE or problem.subject in checked
    ]
    lines = []
    for condition in conditions:
        lines += [f"{condition.text}: cannot tell for {reason}" for reason in unknown]
        matching = _matching_rows(condition, rows)
        if not matching:
            where = f" on {condition.group} prompts" if condition.group else ""
            lines.append(f"{condition.text}: {condition.metric}{where} was not measured")
        for row in matching:
            if condition.holds(row):
                value = condition.value(row)
                text = "unknown" if value is None else f"{value:.4g}"
                lines.append(f"{condition.text}: {row.subject} on {row.concept} has {text} ({row.group})")
    return lines


def checked_subjects(results: Results) -> list[SubjectEntry]:
    """The subjects that conditions apply to."""
    strengths: dict[str, list[float]] = {}
    for subject in results.compared:
        if subject.strength is not None:
            strengths.setdefault(subject.name, []).append(subject.strength)
    main = {name: 1 if 1 in values else max(values) for name, values in strengths.items()}
    return [s for s in results.compared if s.id != FLOOR and s.strength in (None, main.get(s.name))]


def _is_of_concept(row: Row) -> bool:
    metric = METRICS.get(known_as(row.metric))
    return metric is not None and metric.of_concept


def _matching_rows(condition: Condition, rows: Sequence[Row]) -> list[Row]:
    of_metric = [row for row in rows if row.metric == condition.metric]
    for group in [condition.group] if condition.group else DEFAULT_GROUPS:
        matching = [row for row in of_metric if row.group == group]
        if matching:
            return matching
    return [] if condition.group else of_metric
