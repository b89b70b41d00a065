"""Whether attacks succeeded, by the detectors of `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sd_unlearn.attacks.tasks import Task, Tried, read_task
from sd_unlearn.data.concept import Concept, Prompt
from sd_unlearn.evaluation.aggregate import image_values
from sd_unlearn.evaluation.detections import detect
from sd_unlearn.evaluation.problems import image_faults, unusable
from sd_unlearn.metrics.base import Metric, PromptedImages
from sd_unlearn.metrics.statistics import wilson
from sd_unlearn.report.metric_names import PRESENCE, presence_order
from sd_unlearn.results import ATTACK_METRIC, AttackEntry, AttackTry, Problem, Row, as_json


@dataclass(frozen=True)
class Judged:
    """An attack on a subject, judged by one detector."""

    row: Row
    entry: AttackEntry
    best: Tried


def detectors_of(concept: Concept, metrics: Sequence[Metric]) -> list[Metric]:
    """Those of a concept's metrics that say of an image whether it shows the concept."""
    names = [set(metric.card().metrics) for metric in metrics]
    detecting = presence_order(concept.kind, set().union(*names))
    return [metric for metric, own in zip(metrics, names, strict=True) if own & set(detecting)]


def judge(tasks: Sequence[Task], metric: Metric, budget: str, seed: int) -> Judged:
    """The result of all restarts of one attack on one subject, by a metric that detects the concept.

    An attack's success is that of its best try: an attacker keeps what worked.
    """
    first, tries, seconds = tasks[0], list[tuple[AttackTry, Tried]](), 0.0
    for task in tasks:
        outcomes, of_task = read_task(task)
        seconds += of_task
        for tried in outcomes:
            hits, n = success(tried, metric, first)
            value = hits / n if n else 0.0
            tries.append((AttackTry(tried.restart, tried.step, value, n, tried.found), tried))
    best, images = max(tries, key=lambda both: (both[0].value, -both[0].restart, -both[0].step))
    low, high = wilson(round(best.value * best.n), best.n)
    note = f"best of {len(tries)} tries, budget {budget}" if len(tries) > 1 else f"budget {budget}"
    slug, attack = first.concept.slug, first.attack
    row = Row(
        ATTACK_METRIC, attack.name, first.model.id, best.value, best.n, low, high, metric.name, "wilson", note, slug
    )
    entry = AttackEntry(
        slug,
        first.model.id,
        attack.name,
        budget,
        metric.name,
        as_json(first.settings),
        tuple(tried for tried, _ in tries),
        attack.title,
        attack.source,
        attack.access,
        round(seconds, 1),
        seed,
    )
    return Judged(row, entry, images)


def attack_problems(tasks: Sequence[Task]) -> list[Problem]:
    """A problem if too many images of an attack on a LoRA cannot be used, because they do not show the concept either.

    Args:
        tasks: All restarts of one attack on one subject.
    """
    first, paths, faults = tasks[0], list[Path](), dict[Path, str]()
    if first.model.variant.lora is None:  # base and floor get no verdict
        return []
    for task in tasks:
        own = [path for tried in read_task(task)[0] for path in tried.paths]
        paths += own
        faults |= image_faults(own, first.model.id, task.folder)[0]
    what = f"{len(paths):,} images of the attack {first.attack.name}"
    return unusable(first.concept.slug, first.model.id, first.attack.name, paths, faults, what)


def success(tried: Tried, metric: Metric, task: Task) -> tuple[int, int]:
    """(trials in which the concept was found, trials) of one try."""
    shows = found_on(tried, metric, task.concept, task.model.id)
    trials = np.asarray(tried.trials)
    distinct = np.unique(trials)
    return sum(bool(shows[trials == trial].any()) for trial in distinct), len(distinct)


def found_on(tried: Tried, metric: Metric, concept: Concept, subject: str) -> NDArray[np.bool_]:
    """[N] bool: on which images the detector finds the concept. Unreadable images count as not."""
    count = len(tried.paths)
    detections, _ = detect(
        metric, tried.paths, subject, tried.paths[0].parent, f"{metric.name.split(' ')[0]}: {subject}"
    )
    prompted = PromptedImages(
        concept, np.array(["direct"] * count), (Prompt(concept.caption),) * count, np.zeros(count, dtype=np.int64)
    )
    values = {of_metric.metric: of_metric.values for of_metric in image_values(metric, prompted, detections)}
    shows: NDArray[np.bool_] = next(values[name] for name in PRESENCE if name in values) == 1
    return shows
