"""Reasons why no verdict may be given: images that show nothing, and abilities that the model lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sd_unlearn.evaluation.prompts import GROUPS, ImageSpec
from sd_unlearn.io.images import is_flat
from sd_unlearn.metrics.base import DetectorOutput
from sd_unlearn.results import BASE, Problem, Row

MAX_UNUSABLE = 0.01  # of a group's images
MIN_RETENTION = 0.8  # of the base's accuracy on the retained prompts
_WORDS = {"missing": "missing", "unreadable": "unreadable", "flat": "of one flat colour"}


class FlatImages:
    """Which images are of one flat colour; its output is cached as that of a detector."""

    name = "flat images v1"

    def read(self, images: Sequence[Image.Image]) -> DetectorOutput:
        return {"flat": np.array([is_flat(image) for image in images], dtype=bool)}


def image_problems(
    concept: str, subject: str, specs: Sequence[ImageSpec], paths: Sequence[Path], faults: Mapping[Path, str]
) -> list[Problem]:
    """A problem for each prompt group in which more than 1 % of the images cannot be used.

    Args:
        faults: Path -> missing | unreadable | flat, of the images that cannot be used.
    """
    problems = []
    for group in GROUPS:
        members = [path for spec, path in zip(specs, paths, strict=True) if spec.group == group]
        kinds = Counter(faults[path] for path in members if path in faults)
        share = kinds.total() / max(1, len(members))
        if share > MAX_UNUSABLE:
            counts = ", ".join(f"{kinds[kind]:,} {words}" for kind, words in _WORDS.items() if kinds[kind])
            whose = "the base's " if subject == BASE else ""
            message = f"Of {whose}{len(members):,} {group} images {kinds.total():,} cannot be used ({counts})."
            problems.append(Problem(concept, subject, kinds.most_common(1)[0][0], message, group, share))
    return problems


def retention_problems(concept: str, rows: Iterable[Row]) -> list[Problem]:
    """A problem for each subject whose retention, by any detector, is below 80 %."""
    rows = [row for row in rows if row.metric == "retention" and row.value is not None]
    problems = []
    for subject in dict.fromkeys(row.subject for row in rows):
        own = [row for row in rows if row.subject == subject]
        values = [(row.value, row.group) for row in own if row.group == "kept"] or [(r.value, r.group) for r in own]
        lowest, group = min((value, group) for value, group in values if value is not None)
        if lowest < MIN_RETENTION:
            message = f"Retention on {group} prompts is {100 * lowest:.3g} %, below {100 * MIN_RETENTION:g} %."
            problems.append(Problem(concept, subject, "retention", message, group, lowest))
    return problems
