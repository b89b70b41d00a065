"""Several LoRAs side by side: the summary of each concept, the comparison table and the differences in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sd_unlearn.report.cases import Case, labels
from sd_unlearn.report.formatting import NONE, finite, is_rate, number
from sd_unlearn.report.headline import cost_answer
from sd_unlearn.report.lines import KEPT, Line
from sd_unlearn.report.metric_names import METRICS, group_name, metric_name
from sd_unlearn.results import BASE, ConceptEntry, Difference, Results, Row

ALPHA = 0.05  # a corrected p below this counts as a difference


class Column(NamedTuple):
    """A column of the comparison table."""

    title: str
    metric: str  # key of METRICS; "leakage" stands for whatever metric detects the concept
    groups: tuple[str, ...]  # in order of preference

    @property
    def higher_is_better(self) -> bool:
        return METRICS[self.metric].higher_is_better


COLUMNS = (
    Column("Leakage", "leakage", ("direct",)),
    Column("Retention", "retention", KEPT),
    Column("Leakage, other wordings", "leakage", ("held_out",)),
    Column("Leakage, generic prompt", "leakage", ("generic",)),
    Column("Face rate", "face_rate", ("direct",)),
    Column("Confusion", "confusion", ("alike", "kept", "general")),
    Column("Clean replacement", "clean_replacement", ("direct",)),
    Column("Drift", "drift", KEPT),
    Column("LPIPS", "lpips", KEPT),
    Column("FID (digits)", "fid-digits", ("alike", "kept")),
    Column("FID (emoji)", "fid-emoji", ("alike", "kept")),
    Column("FID", "fid-inception", KEPT),
    Column("KID", "kid-inception", KEPT),
    Column("CMMD", "cmmd", KEPT),
    Column("CLIP score", "clip_score", ("general", "kept", "alike")),
)


@dataclass(frozen=True)
class Cell:
    """A value of the table, and its difference from the base in words."""

    row: Row
    change: str = ""


@dataclass
class TableLine:
    """A line of the table: a LoRA on a concept, or the base alone (`case` is None)."""

    label: str
    concept: ConceptEntry
    cells: list[Cell | None]
    case: Case | None = None


def table(results: Results, cases: Sequence[Case]) -> dict[str, Any]:
    """The columns that have a value, and a line for each case; for each concept the base comes first."""
    body: list[TableLine] = []
    base_name = labels(results.subjects).get(BASE)
    for slug in dict.fromkeys(case.concept.slug for case in cases):
        members = [case for case in cases if case.concept.slug == slug]
        base = [_base_cell(column, members) for column in COLUMNS]
        if any(base):
            body.append(TableLine(f"no LoRA: {base_name}" if base_name else "no LoRA", members[0].concept, base))
        for case in members:
            cells = [_cell(results, case, column) for column in COLUMNS]
            body.append(TableLine(case.label, case.concept, cells, case))
    used = [i for i in range(len(COLUMNS)) if any(line.cells[i] for line in body)]
    for line in body:
        line.cells = [line.cells[i] for i in used]
    return {"columns": [COLUMNS[i] for i in used], "body": body}


def _line(case: Case, column: Column) -> Line | None:
    if column.metric != "leakage":
        return case.pick(column.metric, *column.groups)
    direct = case.presence
    name = direct.metric if direct else column.metric
    hits = [line for line in case.lines if line.metric == name and line.group in column.groups and line.lora]
    same = [line for line in hits if direct and line.main.detector == direct.main.detector]
    return next(iter(same or hits), None)


def _base_cell(column: Column, cases: Sequence[Case]) -> Cell | None:
    lines = [_line(case, column) for case in cases]
    return next((Cell(line.base) for line in lines if line and line.base), None)


def _cell(results: Results, case: Case, column: Column) -> Cell | None:
    line = _line(case, column)
    if line is None or line.lora is None:
        return None
    key = (case.concept.slug, case.subject.id, BASE, line.metric, line.group)
    hits = [d for d in results.differences if (d.concept, d.subject, d.against, d.metric, d.group) == key]
    same = [d for d in hits if d.detector == line.lora.detector] or hits
    return Cell(line.lora, in_words(same[0]) if same else "")


def in_words(difference: Difference) -> str:
    """'−95.5 points, p < 0.001', or that no difference was shown."""
    value = difference.value
    if not finite(value):
        return ""
    if value == 0:
        return "not shown to differ"
    p, size = p_value(difference), ("−" if value < 0 else "+") + _size(difference, abs(value))
    if p is None:
        return size
    return f"{size}, {p_text(p)}" if p < ALPHA else f"{size}, not shown to differ, {p_text(p)}"


def _row(difference: Difference) -> Row:
    return Row(difference.metric, difference.group, difference.subject, difference.value, difference.n)


def _size(difference: Difference, value: float | None) -> str:
    """A difference in points if it is of a rate, else in the unit of its metric."""
    row = _row(difference)
    return number(value, row).replace(" %", " points") if is_rate(row) else number(value, row)


def p_value(difference: Difference) -> float | None:
    """p corrected for the comparisons of its metric and group, or uncorrected if only that is known."""
    return difference.p if difference.p_holm is None else difference.p_holm


def p_text(p: float) -> str:
    """'p < 0.001', 'p = 0.012', 'p = 0.60'."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def differences(results: Results) -> list[dict[str, Any]]:
    """Every difference with the names to display, its interval and its meaning in words."""
    names, concepts = labels(results.subjects), {concept.slug: concept.name for concept in results.concepts}
    found = []
    for d in results.differences:
        ends, p = [number(end, _row(d)).removesuffix(" %") for end in (d.low, d.high)], p_value(d)
        found.append(
            {
                "concept": concepts[d.concept],
                "subject": names[d.subject],
                "against": names[d.against],
                "metric": metric_name(d.metric),
                "group": group_name(d.group),
                "value": _size(d, d.value).replace("-", "−"),
                "interval": " to ".join(ends).replace("-", "−"),
                "n": d.n,
                "p": NONE if p is None else p_text(p).removeprefix("p ").removeprefix("= "),
                "means": "" if p is None else "differ" if p < ALPHA else "not shown to differ",
            }
        )
    return found


@dataclass(frozen=True)
class Summary:
    """How many LoRAs make the base forget a concept, and which of them is best."""

    concept: ConceptEntry
    gone: int
    of: int
    best: Case | None

    @property
    def leakage(self) -> Line | None:
        return self.best.presence if self.best else None

    @property
    def retention(self) -> Line | None:
        return self.best.retention if self.best else None

    @property
    def cost(self) -> str:
        return cost_answer(self.best.subject.cost or {}).value if self.best else NONE


def summary(cases: Sequence[Case]) -> list[Summary]:
    """For each concept the LoRA that forgets it with the highest retention; if none does, the lowest leakage."""
    found = []
    for slug in dict.fromkeys(case.concept.slug for case in cases):
        every = [case for case in cases if case.concept.slug == slug]
        members = [case for case in every if case.is_target and case.standing != "unmeasured"]
        gone = [case for case in members if case.standing == "gone"]
        best = max(gone, key=_retention) if gone else min(members, key=_leakage, default=None)
        found.append(Summary(every[0].concept, len(gone), len(members), best))
    return found


def _retention(case: Case) -> float:
    line = case.retention
    return line.lora.value if line and line.lora and line.lora.value is not None else -1.0


def _leakage(case: Case) -> tuple[bool, float]:
    """Leakage as a sort key; cases that get no verdict come last."""
    line = case.presence
    return bool(case.problems), line.lora.value if line and line.lora and line.lora.value is not None else math.inf


def reasons(cases: Sequence[Case]) -> list[str]:
    """What is wrong with LoRAs and their measurements, a sentence for each reason: most prevent a verdict."""
    return [
        f"{case.label} on {case.concept.name}: {message}"
        for case in cases
        if case.is_target
        for message in dict.fromkeys(problem.message for problem in case.problems)
    ]


def headline(cases: Sequence[Case]) -> tuple[str, str]:
    """The verdict on several LoRAs: a title and a sentence that counts."""
    rows = summary(cases)
    done, concepts = sum(bool(row.gone) for row in rows), len(rows)
    tried, gone = sum(row.of for row in rows), sum(row.gone for row in rows)
    if not tried:
        return "Not measured", "No image was evaluated."
    if concepts == 1 and (best := rows[0].best):
        return f"Gone with {gone} of {tried}", f"The best is {best.label}: {best.explanation}"
    every = "All gone" if gone == tried else "Each is gone with some LoRA"
    title = every if done == concepts else "None gone" if not done else f"{done} of {concepts} gone"
    return title, (
        f"{done} of {concepts} concepts are gone with at least one LoRA. Of the {tried} pairs of a concept and a LoRA "
        f"trained to forget it, {gone} are gone."
    )
