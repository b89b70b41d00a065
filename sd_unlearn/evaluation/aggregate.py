"""What was counted picture by picture -> the rows and differences of results.json, with intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd_unlearn.metrics.base import KEPT, Columns, Counted, Question, Shots
from sd_unlearn.metrics.statistics import bootstrap, holm, paired_difference, paired_ratio, wilson
from sd_unlearn.results import BASE, Difference, Row

TOGETHER = {"kept": KEPT}  # groups that are also judged together


@dataclass(frozen=True)
class Seen:
    """What a question read of one subject's pictures. `readable` [N]: columns hold those pictures alone, in order."""

    subject: str
    columns: Columns
    readable: NDArray[np.bool_]


def subset(shots: Shots, kept: NDArray[np.bool_]) -> Shots:
    """The shots of some pictures."""
    return dataclasses.replace(
        shots,
        groups=shots.groups[kept],
        seeds=shots.seeds[kept],
        prompts=tuple(prompt for prompt, keep in zip(shots.prompts, kept, strict=True) if keep),
    )


def count(question: Question, shots: Shots, seen: Seen) -> list[Counted]:
    """What each of the N shots counts for. One that could not be read does not show what a rate asks about, and has no
    value for a mean."""
    unread = ~seen.readable
    if not unread.any():
        return question.count(shots, seen.columns)
    found = []
    for counted in question.count(shots, _spread(seen)):
        values = counted.values.astype(float)  # whether it is asked of a picture follows from the shot, not from it
        values[unread & ~np.isnan(values)] = 0.0 if counted.is_rate else np.nan
        found.append(dataclasses.replace(counted, values=values))
    return found


def _spread(seen: Seen) -> Columns:
    """The columns over all N shots, with ones in the place of pictures that could not be read."""
    columns = {}
    for name, values in seen.columns.items():
        columns[name] = np.ones((len(seen.readable), *values.shape[1:]), values.dtype)
        columns[name][seen.readable] = values
    return columns


def rows_of(
    question: Question, shots: Shots, seen: Seen, counted: Sequence[Counted], base: Sequence[Counted] | None
) -> list[Row]:
    """The rows of one subject from what was counted; with the base's counts also what was retained of it."""
    rows = []
    for one in counted:
        for group, members in _groups(one, shots):
            chosen = members & ~np.isnan(one.values)
            if chosen.any():
                rows.append(_mean(one, group, one.values[chosen], shots.seeds[chosen], question.name))
    for one, before in _matched(counted, base or []):
        if one.metric == "accuracy":
            for group, members in _groups(one, shots):
                chosen = members & ~np.isnan(one.values) & ~np.isnan(before.values)
                if chosen.any():
                    rows.append(_retention(group, one.values[chosen], before.values[chosen], question.name))
    return [_finished(row, shots.concept.slug, seen.subject) for row in rows]


def compared(question: Question, shots: Shots, base: Seen, seen: Seen) -> list[Row]:
    """Figures of whole sets and pairs, on the pictures that both subjects have."""
    both = base.readable & seen.readable
    if not both.any():
        return []
    columns = [{name: values[both[one.readable]] for name, values in one.columns.items()} for one in (base, seen)]
    rows = question.compare(subset(shots, both), columns[0], columns[1])
    return [_finished(row, shots.concept.slug, row.subject or seen.subject) for row in rows]


def differences(
    question: Question, shots: Shots, counted: Mapping[str, Sequence[Counted]], main: Iterable[str]
) -> list[Difference]:
    """Every subject against the base, and the subjects of `main` against each other, per metric and group.

    counted: by subject, on the same shots. p_holm corrects over all comparisons of one metric and group.
    """
    main, found = list(main), []
    against = [(subject, BASE) for subject in counted if subject != BASE] if BASE in counted else []
    for kinds in _kinds(counted):
        one = next(iter(kinds.values()))
        for group, members in _groups(one, shots):
            made = [
                _difference(kinds[a], kinds[b], a, b, group, members, question.name, shots.concept.slug)
                for a, b in (*against, *((b, a) for a, b in combinations(main, 2)))
                if a in kinds and b in kinds
            ]
            kept = [difference for difference in made if difference is not None]
            for difference, p in zip(kept, holm([d.p if d.p is not None else 1.0 for d in kept]), strict=True):
                found.append(dataclasses.replace(difference, p_holm=p))
    return found


def _kinds(counted: Mapping[str, Sequence[Counted]]) -> list[dict[str, Counted]]:
    """By metric, in order of appearance: subject -> what was counted."""
    kinds: dict[tuple[str, tuple[str, ...]], dict[str, Counted]] = {}
    for subject, found in counted.items():
        for one in found:
            kinds.setdefault((one.metric, one.groups), {})[subject] = one
    return list(kinds.values())


def _difference(
    a: Counted, b: Counted, subject: str, against: str, group: str, members: NDArray, detector: str, concept: str
) -> Difference | None:
    chosen = members & ~np.isnan(a.values) & ~np.isnan(b.values)
    if not chosen.any():
        return None
    value, low, high, p = paired_difference(a.values[chosen], b.values[chosen], a.is_rate)
    return Difference(
        concept, a.metric, group, subject, against, value, int(chosen.sum()), low, high, p, None, detector
    )


def _groups(counted: Counted, shots: Shots) -> list[tuple[str, NDArray[np.bool_]]]:
    """The groups a metric is asked of, with their members; what must stay also together."""
    groups = [(group, shots.of(group)) for group in counted.groups]
    for name, parts in TOGETHER.items():
        if set(parts) <= set(counted.groups):
            groups.append((name, shots.of(*parts)))
    return [(group, members) for group, members in groups if members.any()]


def _matched(counted: Sequence[Counted], base: Sequence[Counted]) -> list[tuple[Counted, Counted]]:
    before = {(one.metric, one.groups): one for one in base}
    return [(one, before[one.metric, one.groups]) for one in counted if (one.metric, one.groups) in before]


def _mean(counted: Counted, group: str, values: NDArray, seeds: NDArray, detector: str) -> Row:
    if counted.is_rate:
        low, high = wilson(int(values.sum()), len(values))
    else:
        low, high = bootstrap(np.mean, values)
    several = sorted(set(seeds.tolist()))
    by_seed = tuple(float(values[seeds == seed].mean()) for seed in several) if len(several) > 1 else None
    interval = "wilson" if counted.is_rate else "bootstrap"
    return Row(
        counted.metric,
        group,
        "",
        float(values.mean()),
        len(values),
        low,
        high,
        detector,
        interval,
        counted.note,
        seeds=by_seed,
    )


def _retention(group: str, with_lora: NDArray, without: NDArray, detector: str) -> Row:
    value, low, high = paired_ratio(with_lora, without)
    note = "accuracy with the LoRA over accuracy without, same seeds"
    return Row("retention", group, "", value, len(without), low, high, detector, "bonett-price", note)


def _finished(row: Row, concept: str, subject: str) -> Row:
    """A row of a concept and subject; a ratio over zero is unknown, null in JSON, which knows no NaN."""
    unknown: dict[str, Any] = {
        key: None
        for key in ("value", "low", "high")
        if (number := getattr(row, key)) is not None and not math.isfinite(number)
    }
    return dataclasses.replace(row, concept=concept, subject=subject, **unknown)
