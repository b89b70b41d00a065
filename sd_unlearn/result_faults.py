"""What a results.json must not contain: values that no evaluation writes, as a damaged or hand-edited file has them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sd_unlearn.results import Difference, Results, Row


def first_fault(results: Results) -> str:
    """What is impossible about the results; "" if nothing is."""
    return next(_faults(results), "")


def _faults(results: Results) -> Iterator[str]:
    for key in ("rows", "differences"):
        for number, item in enumerate(getattr(results, key)):
            if fault := _impossible(item):
                yield f"{key}[{number}] ({item.metric}) {fault}"
    yield from _listed_twice(results)
    yield from _not_listed(results)


def _impossible(item: Row | Difference) -> str:
    """What is impossible about the numbers of a row or difference; "" if nothing is."""
    ends = [value for value in (item.low, item.high) if value is not None]
    if any(not math.isfinite(value) for value in (*ends, item.value or 0)):
        return "has a value that is not finite"
    if item.n < 0:
        return f"has n = {item.n}"
    if len(ends) == 2 and ends[0] > ends[1]:
        return f"has low = {ends[0]:g} above high = {ends[1]:g}"
    if item.interval == "wilson" and item.value is not None and not 0 <= item.value <= 1:
        return f"is a share of {item.value:g}"
    return ""


def _listed_twice(results: Results) -> Iterator[str]:
    keys: dict[str, list[Any]] = {
        "concepts": [concept.slug for concept in results.concepts],
        "subjects": [subject.id for subject in results.subjects],
        "rows": [(row.concept, row.subject, row.metric, row.group, row.detector) for row in results.rows],
    }
    for key, names in keys.items():
        for twice in (name for name, count in Counter(names).items() if count > 1):
            yield f"{key} lists {twice if isinstance(twice, str) else ' '.join(filter(None, twice))} twice"


def _not_listed(results: Results) -> Iterator[str]:
    """Rows, differences, pairs, problems and attacks of a concept or subject that is not listed."""
    subjects = {subject.id for subject in results.subjects}
    listed = {"concept": {concept.slug for concept in results.concepts}, "subject": subjects, "against": subjects}
    for key in ("rows", "differences", "pairs", "problems", "attacks"):
        for number, item in enumerate(getattr(results, key)):
            for attribute, known in listed.items():
                name = getattr(item, attribute, None)
                concerns_all = key == "problems" and name in ("", "base")
                if name is not None and name not in known and not concerns_all:
                    yield f'{attribute} "{name}" of {key}[{number}] is not listed'
