"""--fail_if: conditions on metrics that make `evaluate` end with exit code 3, for pipelines."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sd_unlearn.errors import UsageError, suggest
from sd_unlearn.evaluation.subjects import main_subjects
from sd_unlearn.metrics.base import CONCEPT_GROUPS
from sd_unlearn.report.metric_names import GROUPS, METRICS, PRESENCE, known_as
from sd_unlearn.results import ATTACK_METRIC, BASE, Outcome, Results, Row, SubjectEntry

_FORM = re.compile(
    r"(?P<metric>[A-Za-z][\w-]*)(?:\.(?P<group>[a-z_]+?))??(?:\.(?P<end>low|high))?\s*"
    r"(?P<sign><=|>=|<|>)\s*(?P<limit>[-+.\deE]+)(?P<percent>\s*%)?"
)
DEFAULT_GROUPS = ("direct", "kept")  # of a condition without a group: the first that the metric has, else all
_NO_RETENTION = (
    "cannot tell, because retention is not known, and a model that generates only noise resists every attack. Run "
    "sd-unlearn evaluate first"
)
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
        UsageError: not a condition, an unknown metric or prompt group, or a limit outside of the metric's range.
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
    _check_limit(text, match["metric"], match["sign"], limit)
    return Condition(text, match["metric"], match["group"], match["end"] or "value", match["sign"], limit)


def _check_limit(text: str, metric: str, sign: str, limit: float) -> None:
    """Refuse limits that a rate never passes, e.g. leakage>1, which was meant as 1 %."""
    known = METRICS[known_as(metric)]
    if not known.is_rate:
        return
    too_low = limit < 0 or (limit, sign) == (0, "<")
    if known.is_share:
        too_high = limit > 1 or (limit, sign) == (1, ">")
    else:  # relative to the base
        too_high = limit > 1 and sign in (">", ">=")
    if too_low or too_high:
        allowed = "is between 0 and 1" if known.is_share else "is a share of the base's, e.g. 0.95"
        meant = abs(limit) or 1.0
        raise UsageError(f'--fail_if "{text}": {metric} {allowed}. Write {meant:g}% or {meant / 100:g}.')


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
    """A line with the value for each row that meets a condition, and for each subject without the metric.

    Every condition is met by a subject and concept with a problem, because no verdict may be given on them.

    Conditions apply to every subject but the base; to a LoRA at several strengths at strength 1, else at the highest.
    The metric must be measured on each concept that the subject should forget. Metrics of the concept itself do not
    apply to a LoRA that was trained to unlearn another concept, those of attacks only to what was attacked. The latter
    are met if retention is not known.

    Args:
        only: The id of the only subject to check; default: all of them.
    """
    subjects = main_subjects(results.compared)
    checked = [subject.id for subject in subjects if only in (None, subject.id)]
    concerned = {""} | {row.concept for row in results.rows if row.subject in checked}
    unknown = [
        f"{problem.subject} on {problem.concept or 'every concept'}: {problem.message.rstrip('.')}"
        for problem in results.problems
        if problem.subject in checked or (problem.subject == BASE and problem.concept in concerned)
    ]
    lines = []
    for condition in conditions:
        lines += [f"{condition.text}: cannot tell for {reason}" for reason in unknown]
        found = {subject.id: _reasons(condition, subject, results) for subject in subjects}
        for reasons in (found[subject] for subject in checked):
            lines += [f"{condition.text}: {reason}" for reason in reasons or ()]
        if all(reasons is None for reasons in found.values()):
            lines.append(f"{condition.text}: {_unmeasured(condition)}")
    return lines


def _reasons(condition: Condition, subject: SubjectEntry, results: Results) -> list[str] | None:
    """The values of a subject that meet a condition, and the concepts on which it was not measured.

    None: the condition does not apply to the subject.
    """
    own = [row for row in results.rows if row.subject == subject.id]
    if not own:
        return [f"{subject.id}: {_unmeasured(condition)}"]
    evaluated = list(dict.fromkeys(row.concept for row in own))
    to_forget = [concept for concept in evaluated if subject.should_forget(concept)]
    applies_to = to_forget if _is_of_concept(condition.metric) else evaluated
    failed = [one for one in results.failed_attacks if one.subject == subject.id]
    if condition.metric == ATTACK_METRIC:
        attacked = {row.concept for row in own if row.metric == ATTACK_METRIC} | {one.concept for one in failed}
        applies_to = [concept for concept in applies_to if concept in attacked]
    if not applies_to:
        return None
    reasons = []
    for concept in applies_to:
        of_concept = [row for row in own if row.concept == concept]
        matching = _matching_rows(condition, of_concept)
        failures = [one for one in failed if one.concept == concept and condition.group in (None, one.attack)]
        if condition.metric == ATTACK_METRIC and not _retention_is_known(of_concept):
            reasons.append(f"{subject.id} on {concept}: {_NO_RETENTION}")
        if condition.metric == ATTACK_METRIC:
            reasons += [f"{subject.id} on {concept}: the attack {one.attack} failed" for one in failures]
        if not matching and not failures and concept in (to_forget or applies_to):
            reasons.append(f"{subject.id} on {concept}: {_unmeasured(condition)}")
        for row in filter(condition.holds, matching):
            value = condition.value(row)
            text = "unknown" if value is None else f"{value:.4g}"
            where = row.group if row.metric == condition.metric else f"{row.group}, {row.metric}"
            reasons.append(f"{subject.id} on {concept} has {text} ({where})")
    return reasons


def _retention_is_known(rows: Sequence[Row]) -> bool:
    return any(row.metric == "retention" and row.value is not None for row in rows)


def _is_of_concept(metric: str) -> bool:
    known = METRICS.get(known_as(metric))
    return known is not None and known.of_concept


def _unmeasured(condition: Condition) -> str:
    if condition.metric == ATTACK_METRIC:
        return f"the attack {condition.group} was not carried out" if condition.group else "no attack was carried out"
    where = f" on {condition.group} prompts" if condition.group else ""
    return f"{condition.metric}{where} was not measured"


def _is_about(condition: Condition, row: Row) -> bool:
    """Whether a condition is about a row: one on leakage is about all detectors of the concept, also NudeNet.

    One on cmmd is about cmmd-ViT-L-14, whatever the model.
    """
    detects = row.metric in PRESENCE and row.group in CONCEPT_GROUPS
    named = condition.metric in (row.metric, known_as(row.metric))
    return named or (condition.metric == "leakage" and detects)


def _matching_rows(condition: Condition, rows: Sequence[Row]) -> list[Row]:
    of_metric = [row for row in rows if _is_about(condition, row)]
    for group in [condition.group] if condition.group else DEFAULT_GROUPS:
        matching = [row for row in of_metric if row.group == group]
        if matching:
            return matching
    return [] if condition.group else of_metric
