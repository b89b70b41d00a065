"""Run all metrics of one concept on the images of every subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sd_unlearn.data.concept import Concept
from sd_unlearn.evaluation import aggregate
from sd_unlearn.evaluation.detections import Detections, detect, pair_distances
from sd_unlearn.evaluation.problems import (
    base_problems,
    evidence_problems,
    face_problems,
    image_faults,
    image_problems,
    replacement_problems,
    retention_problems,
)
from sd_unlearn.evaluation.prompts import ImageSpec, to_prompted_images
from sd_unlearn.io.images import image_size
from sd_unlearn.metrics.base import KEEP_GROUPS, ImageValues, Metric, PairMetric
from sd_unlearn.metrics.statistics import distance_interval
from sd_unlearn.results import BASE, Difference, Problem, Row


@dataclass(frozen=True)
class SubjectImages:
    """One subject's images of one concept."""

    subject: str
    specs: Sequence[ImageSpec]
    paths: Sequence[Path]
    cache: Path | None  # folder for cached detector output
    planned: bool = True  # the images are those of the plan, so they pair with the base's


@dataclass
class ConceptResults:
    """The results of one concept."""

    concept: Concept
    images: Sequence[SubjectImages]
    rows: list[Row] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    skipped: dict[Path, tuple[str, str]] = field(default_factory=dict)  # path -> (subject, reason)
    values: dict[str, list[ImageValues]] = field(default_factory=dict)  # by subject, of all metrics
    detections: dict[str, list[tuple[Metric, Detections]]] = field(default_factory=dict)  # by subject

    def add_rows(self, rows: Sequence[Row]) -> None:
        """Add rows; of two rows with the same name (e.g. the base's, from each comparison) the first is kept."""
        known = {(row.metric, row.group, row.subject, row.detector) for row in self.rows}
        self.rows += [row for row in rows if (row.metric, row.group, row.subject, row.detector) not in known]


def run_metrics(
    concept: Concept,
    metrics: Sequence[Metric],
    pair_metrics: Sequence[PairMetric],
    images: Sequence[SubjectImages],
    main: Sequence[str],
) -> ConceptResults:
    """Run every metric on every subject, the base first.

    Args:
        main: Subjects that are also compared with each other.
    """
    results = ConceptResults(concept, images)
    for of_subject in images:
        _check_images(of_subject, results)
    for metric in metrics:
        _run_metric(metric, main, results)
    base = next((i for i in images if i.subject == BASE), None)
    for pair_metric in pair_metrics:
        for other in images:
            if base and other.planned and other is not base:
                results.rows += _pair_rows(pair_metric, concept, base, other)
    _check_abilities(results)
    return results


def _check_abilities(results: ConceptResults) -> None:
    """Record what prevents a verdict although no image shows the concept.

    The base does not show it either; a subject lost abilities of the base, or was not tested for them.
    """
    concept, rows = results.concept, results.rows
    results.problems += [*base_problems(concept, rows), *replacement_problems(concept.slug, rows)]
    lost = retention_problems(concept.slug, rows)
    broken = {problem.subject for problem in lost if problem.kind == "retention"}
    results.problems += [*lost, *face_problems(concept.slug, rows, broken)]
    for images in results.images:
        if images.subject != BASE:
            results.problems += evidence_problems(concept, images.subject, images.specs, images.planned, rows)


def _check_images(images: SubjectImages, results: ConceptResults) -> None:
    """Record the images that cannot be used, and the groups in which they are too many for a verdict."""
    faults, failed = image_faults(images.paths, images.subject, images.cache)
    results.problems += image_problems(results.concept.slug, images.subject, images.specs, images.paths, faults)
    results.skipped |= {path: (images.subject, reason) for path, reason in failed.items()}


def _run_metric(metric: Metric, main: Sequence[str], results: ConceptResults) -> None:
    paired: dict[str, list[ImageValues]] = {}  # subject -> values on the planned images
    base: Detections | None = None
    for images in results.images:
        subject = images.subject
        prompted = to_prompted_images(results.concept, images.specs)
        title = f"{metric.name.split(' ')[0]}: {subject}"
        detections, failed = detect(metric, images.paths, subject, images.cache, title)
        values = aggregate.image_values(metric, prompted, detections)
        results.skipped |= {path: (subject, reason) for path, reason in failed.items()}
        results.detections.setdefault(subject, []).append((metric, detections))
        results.values.setdefault(subject, []).extend(values)
        base_values = paired.get(BASE) if images.planned else None
        rows = aggregate.subject_rows(metric, prompted, subject, values, base_values)
        if base is not None and images.planned:
            rows += aggregate.comparison_rows(metric, prompted, base, detections)
        results.add_rows(rows)
        if subject == BASE:
            base = detections
        if images.planned:
            paired[subject] = values
    planned = next((images for images in results.images if images.planned), None)
    if planned:
        prompted = to_prompted_images(results.concept, planned.specs)
        results.differences += aggregate.differences(metric, prompted, paired, main)


def _pair_rows(metric: PairMetric, concept: Concept, base: SubjectImages, other: SubjectImages) -> list[Row]:
    kept = [n for n, spec in enumerate(base.specs) if spec.group in KEEP_GROUPS]
    if not kept:
        return []
    base_paths, other_paths = ([images.paths[n] for n in kept] for images in (base, other))
    title = f"{metric.name}: {other.subject}"
    distances = pair_distances(metric, base_paths, other_paths, other.cache, title)
    distances = distances[~np.isnan(distances)]
    if not len(distances):
        return []
    low, high, interval = distance_interval(distances)
    mean, n = float(distances.mean()), len(distances)
    note = "of pairs of the same prompt and seed"
    if other_size := _other_size(base_paths, other_paths):
        note += f"; {other_size}"
    row = Row(metric.metric, "kept", other.subject, mean, n, low, high, metric.name, interval, note, concept.slug)
    return [row]


def _other_size(base: Sequence[Path], other: Sequence[Path]) -> str:
    """How many images of pairs are not of the base's size, and thus were scaled to it; "" if none."""
    sizes = [(image_size(a), image_size(b)) for a, b in zip(base, other, strict=True)]
    scaled = [(a, b) for a, b in sizes if a and b and a != b]
    if not scaled:
        return ""
    (to_width, to_height), (width, height) = scaled[0]
    example = f"{width} x {height} pixels to {to_width} x {to_height}"
    return f"{len(scaled)} of {len(base)} images were scaled to the size of the base's, e.g. from {example}"
