"""Values per image -> the rows and differences of results.json, with intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd_unlearn.evaluation.detections import Detections
from sd_unlearn.metrics.base import KEEP_GROUPS, DetectorOutput, ImageValues, Metric, PromptedImages
from sd_unlearn.metrics.statistics import (
    bootstrap_mean,
    holm,
    paired_difference,
    paired_ratio,
    poisson_high,
    wilson,
)
from sd_unlearn.results import BASE, Difference, Row

COMBINED_GROUPS = {"kept": KEEP_GROUPS}  # name -> prompt groups that also get a row together


def select(prompted: PromptedImages, mask: NDArray[np.bool_]) -> PromptedImages:
    """The images of a mask [N]."""
    return dataclasses.replace(
        prompted,
        groups=prompted.groups[mask],
        seeds=prompted.seeds[mask],
        prompts=tuple(prompt for prompt, chosen in zip(prompted.prompts, mask, strict=True) if chosen),
    )


def image_values(metric: Metric, prompted: PromptedImages, detections: Detections) -> list[ImageValues]:
    """The values of all N images. Unreadable images are unknown in rates and left out of means."""
    unreadable = ~detections.readable
    if not unreadable.any():
        return metric.count(prompted, detections.output)
    filled = []
    for of_metric in metric.count(prompted, _fill_unreadable(detections)):
        values = of_metric.values.astype(float)
        defined = ~np.isnan(values)  # depends on the prompt, not on the placeholder
        values[unreadable] = np.nan
        unknown = unreadable & defined if of_metric.is_rate else None
        filled.append(dataclasses.replace(of_metric, values=values, unknown=unknown))
    return filled


def _fill_unreadable(detections: Detections) -> DetectorOutput:
    """The output for all N images, with ones as placeholders for unreadable images."""
    filled = {}
    for name, values in detections.output.items():
        filled[name] = np.ones((len(detections.readable), *values.shape[1:]), values.dtype)
        filled[name][detections.readable] = values
    return filled


def subject_rows(
    metric: Metric,
    prompted: PromptedImages,
    subject: str,
    values: Sequence[ImageValues],
    base: Sequence[ImageValues] | None,
) -> list[Row]:
    """The rows of one subject; with the base's values also the retention of accuracy."""
    rows = []
    for of_metric in values:
        for group, members in _groups(of_metric, prompted):
            mask = members & (~np.isnan(of_metric.values) | _unknown(of_metric))
            if mask.any():
                rows.append(_mean_row(of_metric, group, of_metric.values[mask], prompted.seeds[mask], metric.name))
    for of_metric, before in _matched(values, base or []):
        if of_metric.metric == "accuracy":
            for group, members in _groups(of_metric, prompted):
                mask = members.copy()
                for side in (of_metric, before):
                    mask &= ~np.isnan(side.values) | _unknown(side)
                if mask.any():
                    rows.append(_retention_row(group, of_metric.values[mask], before.values[mask], metric.name))
    return [_finish(row, prompted.concept.slug, subject) for row in rows]


def comparison_rows(metric: Metric, prompted: PromptedImages, base: Detections, other: Detections) -> list[Row]:
    """The rows of `Metric.compare`, on the images that are readable for both subjects."""
    both = base.readable & other.readable
    if not both.any():
        return []
    outputs = [
        {name: values[both[detections.readable]] for name, values in detections.output.items()}
        for detections in (base, other)
    ]
    rows = metric.compare(select(prompted, both), *outputs)
    return [_finish(row, prompted.concept.slug, row.subject or other.subject) for row in rows]


def differences(
    metric: Metric, prompted: PromptedImages, values: Mapping[str, Sequence[ImageValues]], main: Iterable[str]
) -> list[Difference]:
    """Paired differences per metric and group: every subject against the base, and `main` against each other.

    p_holm corrects for all comparisons of one concept, metric, group and detector, not across these.

    Args:
        values: Subject -> its values, all of the same prompts and seeds.
    """
    main, corrected = list(main), []
    with_base = [(subject, BASE) for subject in values if subject != BASE] if BASE in values else []
    comparisons = [*with_base, *((b, a) for a, b in combinations(main, 2))]
    for of_subject in _by_metric(values):
        for group, members in _groups(next(iter(of_subject.values())), prompted):
            found = [
                _difference(of_subject, a, b, group, members, metric.name, prompted.concept.slug)
                for a, b in comparisons
                if a in of_subject and b in of_subject
            ]
            defined = [difference for difference in found if difference is not None]
            p_holm = holm([d.p if d.p is not None else 1.0 for d in defined])
            corrected += [dataclasses.replace(d, p_holm=p) for d, p in zip(defined, p_holm, strict=True)]
    return corrected


def _by_metric(values: Mapping[str, Sequence[ImageValues]]) -> list[dict[str, ImageValues]]:
    """For each metric in order of appearance: subject -> its values."""
    by_metric: dict[tuple[str, tuple[str, ...]], dict[str, ImageValues]] = {}
    for subject, of_subject in values.items():
        for of_metric in of_subject:
            by_metric.setdefault((of_metric.metric, of_metric.groups), {})[subject] = of_metric
    return list(by_metric.values())


def _difference(
    of_subject: Mapping[str, ImageValues],
    subject: str,
    against: str,
    group: str,
    members: NDArray[np.bool_],
    detector: str,
    concept: str,
) -> Difference | None:
    a, b = of_subject[subject], of_subject[against]
    mask = members & ~np.isnan(a.values) & ~np.isnan(b.values)
    if not mask.any():
        return None
    value, low, high, p = paired_difference(a.values[mask], b.values[mask], a.is_rate)
    interval, n = "bonett-price" if a.is_rate else "none" if low is None else "paired-bootstrap", int(mask.sum())
    return Difference(concept, a.metric, group, subject, against, value, n, low, high, p, None, detector, interval)


def _groups(values: ImageValues, prompted: PromptedImages) -> list[tuple[str, NDArray[np.bool_]]]:
    """(name, mask [N]) of each non-empty prompt group of a metric, then of the combined groups."""
    groups = [(group, prompted.in_groups(group)) for group in values.groups]
    for name, parts in COMBINED_GROUPS.items():
        if set(parts) <= set(values.groups):
            groups.append((name, prompted.in_groups(*parts)))
    return [(group, members) for group, members in groups if members.any()]


def _matched(values: Sequence[ImageValues], base: Sequence[ImageValues]) -> list[tuple[ImageValues, ImageValues]]:
    before = {(of_metric.metric, of_metric.groups): of_metric for of_metric in base}
    return [(v, before[v.metric, v.groups]) for v in values if (v.metric, v.groups) in before]


def _unknown(values: ImageValues) -> NDArray[np.bool_]:
    """[N] whether an image is counted although its value is unknown."""
    return np.zeros(len(values.values), dtype=bool) if values.unknown is None else values.unknown


def _mean_row(of_metric: ImageValues, group: str, values: NDArray, seeds: NDArray, detector: str) -> Row:
    """The mean of the known values. nan: unknown, counted in n; the interval covers whatever they may be."""
    known = ~np.isnan(values)
    num_unknown, note = int((~known).sum()), of_metric.note
    low: float | None
    high: float | None
    if of_metric.is_rate:
        hits = int(values[known].sum())
        low, high = wilson(hits, len(values))[0], wilson(hits + num_unknown, len(values))[1]
        interval = "wilson"
    elif not values.any():  # counts
        low, high, interval = 0.0, poisson_high(len(values)), "poisson"
    else:
        low, high = bootstrap_mean(values)
        interval = "none" if low is None else "bootstrap"
    if num_unknown:
        note = "; ".join(filter(None, [note, f"{num_unknown} of {len(values)} unknown: unreadable images"]))
    several = sorted(set(seeds.tolist()))
    by_seed = tuple(_mean(values[seeds == seed]) for seed in several) if len(several) > 1 else None
    mean = _mean(values)
    return Row(of_metric.metric, group, "", mean, len(values), low, high, detector, interval, note, seeds=by_seed)


def _mean(values: NDArray) -> float | None:
    """The mean of the known values; None if no value is known."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _retention_row(group: str, with_lora: NDArray, without: NDArray, detector: str) -> Row:
    known = ~np.isnan(with_lora) & ~np.isnan(without)
    value, low, high = paired_ratio(with_lora[known], without[known]) if known.any() else (float("nan"),) * 3
    note = "accuracy with the LoRA over accuracy without, same seeds"
    if not known.all():  # the interval covers whatever the unknown images show
        low = paired_ratio(np.nan_to_num(with_lora, nan=0), np.nan_to_num(without, nan=1))[1]
        high = paired_ratio(np.nan_to_num(with_lora, nan=1), np.nan_to_num(without, nan=0))[2]
        note += f"; {int((~known).sum())} of {len(known)} unknown: unreadable images"
    return Row("retention", group, "", value, len(without), low, high, detector, "bonett-price", note)


def _finish(row: Row, concept: str, subject: str) -> Row:
    """Set concept and subject; values that are not finite (a ratio over zero) become None, as JSON has no NaN."""
    unknown: dict[str, Any] = {
        key: None
        for key in ("value", "low", "high")
        if (number := getattr(row, key)) is not None and not math.isfinite(number)
    }
    return dataclasses.replace(row, concept=concept, subject=subject, **unknown)
