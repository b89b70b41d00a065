"""One concept's pictures, of the base and of every subject, through every question: rows, differences, pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sd_unlearn.data.concept import Concept
from sd_unlearn.evaluation import aggregate, detections
from sd_unlearn.evaluation.aggregate import Seen
from sd_unlearn.evaluation.prompts import Shot, as_shots
from sd_unlearn.metrics.base import KEPT, Counted, PairQuestion, Question
from sd_unlearn.metrics.statistics import bootstrap
from sd_unlearn.results import BASE, Difference, Row


@dataclass(frozen=True)
class Pictures:
    """One subject's pictures of one concept. Subjects with `planned` shots are compared picture by picture."""

    subject: str
    shots: Sequence[Shot]
    paths: Sequence[Path]
    cache: Path | None  # where readings of them are kept
    planned: bool = True


@dataclass
class Judged:
    """What came of one concept."""

    concept: Concept
    rows: list[Row] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    skipped: dict[Path, tuple[str, str]] = field(default_factory=dict)  # path -> (subject, why)
    counted: dict[str, list[tuple[Question, list[Counted]]]] = field(default_factory=dict)  # by subject
    seen: dict[str, list[tuple[Question, Seen]]] = field(default_factory=dict)


def judge(
    concept: Concept,
    questions: Sequence[Question],
    pair_questions: Sequence[PairQuestion],
    pictures: Sequence[Pictures],
    main: Sequence[str],
) -> Judged:
    """Ask every question of every subject. main: the subjects that are also compared with each other."""
    found = Judged(concept)
    for question in questions:
        _ask(question, pictures, main, found)
    base = next((p for p in pictures if p.subject == BASE), None)
    for pair_question in pair_questions:
        for other in pictures:
            if base and other.planned and other is not base:
                found.rows += _distances(pair_question, concept, base, other)
    return found


def _ask(question: Question, pictures: Sequence[Pictures], main: Sequence[str], found: Judged) -> None:
    counted: dict[str, list[Counted]] = {}
    base: Seen | None = None
    for one in pictures:
        shots = as_shots(found.concept, one.shots)
        title = f"{question.name.split(' ')[0]} reads {one.subject}"
        seen, failed = detections.read(question, one.paths, one.subject, one.cache, title)
        found.skipped |= {path: (one.subject, why) for path, why in failed.items()}
        mine = aggregate.count(question, shots, seen)
        found.seen.setdefault(one.subject, []).append((question, seen))
        found.counted.setdefault(one.subject, []).append((question, mine))
        if one.subject == BASE:
            base = seen
        rows = aggregate.rows_of(question, shots, seen, mine, counted.get(BASE) if one.planned else None)
        if base is not None and one.planned and one.subject != BASE:
            rows += aggregate.compared(question, shots, base, seen)
        known = {(row.metric, row.group, row.subject, row.detector) for row in found.rows}
        found.rows += [row for row in rows if (row.metric, row.group, row.subject, row.detector) not in known]
        if one.planned:
            counted[one.subject] = mine
    planned = next((p for p in pictures if p.planned), None)
    if planned:
        shots = as_shots(found.concept, planned.shots)
        found.differences += aggregate.differences(question, shots, counted, main)


def _distances(question: PairQuestion, concept: Concept, base: Pictures, other: Pictures) -> list[Row]:
    kept = [n for n, shot in enumerate(base.shots) if shot.group in KEPT]
    if not kept:
        return []
    sides = [[side.paths[n] for n in kept] for side in (base, other)]
    values = detections.distances(question, sides[0], sides[1], other.cache, f"{question.name}: {other.subject}")
    values = values[~np.isnan(values)]
    if not len(values):
        return []
    low, high = bootstrap(np.mean, values)
    note = "of pairs of the same prompt and seed"
    return [
        Row(
            question.metric,
            "kept",
            other.subject,
            float(values.mean()),
            len(values),
            low,
            high,
            question.name,
            "bootstrap",
            note,
            concept.slug,
        )
    ]
