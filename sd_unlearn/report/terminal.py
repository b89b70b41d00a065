"""The metrics of an evaluation as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from sd_unlearn.report import compare
from sd_unlearn.report.cases import Case, cases_of
from sd_unlearn.report.formatting import NONE, interval_text, value_text
from sd_unlearn.report.metric_names import REPORT_ONLY
from sd_unlearn.results import BASE, FLOOR, Results

ONE = ("metric", "group", "base", "lora", "95 % interval", "n")
SEVERAL = ("concept", "lora", "leakage", "95 % interval", "base", "retention", "95 % interval", "is it gone?")
ATTACKS = ("attack", "lora", "brought back", "95 % interval", "from the floor", "from the base", "n")
LEFT = (0, 1, 7)  # columns of text; the others are aligned to the right


def format_table(results: Results) -> str:
    """An aligned table of the metrics, after the verdict."""
    cases = cases_of(results)
    if len(cases) == 1:
        [case] = cases
        title = f"{case.concept.slug}: {case.verdict}. {case.explanation}"
        body = [
            (x.metric, x.group, value_text(x.base), value_text(x.lora), interval_text(x.main), x.n)
            for x in case.lines
            if x.metric not in REPORT_ONLY
        ]
        lines = [title, "", *_aligned([ONE, *body])]
    else:
        lines = [
            ". ".join(compare.headline(cases)),
            "",
            *_aligned([SEVERAL, *map(_line, cases)]),
            *compare.reasons(cases),
        ]
    if results.skipped:
        lines.append(f"{len(results.skipped)} image(s) could not be read; see skipped in results.json.")
    return "\n".join(lines)


def format_attacks(results: Results) -> str:
    """An aligned table of the attacks: how often each brought the concept back, from the LoRA and from the base.

    Base and floor have a value only if they were attacked with the same settings. Several detectors are named.

    Without a LoRA, the attacks on the base and on the floor have lines of their own.
    """
    rows = {(row.concept, row.subject, row.group, row.detector): row for row in results.rows if row.metric == "attack"}
    shown = {subject for _, subject, _, _ in rows} - {BASE, FLOOR} or {BASE, FLOOR}
    several, lines = len({detector for *_, detector in rows}) > 1, []
    for (concept, subject, group, detector), row in rows.items():
        if subject in shown:
            others = [rows.get((concept, model, group, detector)) for model in (BASE, FLOOR)]
            base, floor = (other if other and results.is_same_attack(row, other) else None for other in others)
            name = f"{subject} ({concept})" if len(results.concepts) > 1 else subject
            values = [value_text(one) for one in (row, floor, base)]
            line = (group, name, values[0], interval_text(row), *values[1:], str(row.n))
            lines.append((*line, detector) if several else line)
    return "\n".join(_aligned([(*ATTACKS, "detector") if several else ATTACKS, *lines]))


def _line(case: Case) -> tuple[str, ...]:
    leak, kept = (line.lora if line else None for line in (case.presence, case.retention))
    base = value_text(case.presence.base) if case.presence else NONE
    values = (value_text(leak), interval_text(leak), base, value_text(kept), interval_text(kept))
    return (case.concept.slug, case.label, *values, case.verdict)


def _aligned(table: Sequence[tuple[str, ...]]) -> list[str]:
    """The lines of a table with a rule below the first."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i in LEFT else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
