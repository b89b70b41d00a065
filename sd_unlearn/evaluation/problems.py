"""Reasons why no verdict may be given: images that show nothing, abilities that the model lost or that are unknown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sd_unlearn.data.concept import Concept
from sd_unlearn.evaluation.detections import MISSING, detect
from sd_unlearn.evaluation.prompts import GROUPS, ImageSpec
from sd_unlearn.io.images import is_flat
from sd_unlearn.metrics.base import CONCEPT_GROUPS, KEEP_GROUPS, DetectorOutput
from sd_unlearn.metrics.registry import READING, MetricContext, missing_evidence
from sd_unlearn.metrics.statistics import ratio_of_rates
from sd_unlearn.report.formatting import GONE, sentence
from sd_unlearn.report.metric_names import presence_order
from sd_unlearn.results import BASE, Problem, Row

MAX_UNUSABLE = 0.01  # of a group's images
MIN_RETENTION = 0.8  # of the base's accuracy on the retained prompts, and of its face rate
MIN_CERTAIN = 0.5  # lower end of the interval of retention, below which it is not known well enough
MIN_READABLE = 0.5  # of the concept's images, as a share of the base's usual number of readable images
MIN_FACES = 0.5  # face rate of the base from which a group's prompts count as asking for people
NEVER_THERE = "The base itself hardly shows the concept. Check the concept and its prompts, and which base is used."
MORE_IMAGES = "Evaluate more of them (--num_keep_images)."
_WORDS = {"missing": "missing", "unreadable": "unreadable", "flat": "of one flat colour"}


class FlatImages:
    """Which images are of one flat colour; its output is cached as that of a detector."""

    name = "flat images v1"

    def read(self, images: Sequence[Image.Image]) -> DetectorOutput:
        return {"flat": np.array([is_flat(image) for image in images], dtype=bool)}


def image_faults(paths: Sequence[Path], subject: str, cache: Path | None) -> tuple[dict[Path, str], dict[Path, str]]:
    """The images that cannot be used, with missing, unreadable or flat; and why images cannot be read."""
    detections, failed = detect(FlatImages(), paths, subject, cache, f"check: {subject}")
    faults = {path: "missing" if reason == MISSING else "unreadable" for path, reason in failed.items()}
    readable = [path for path, is_readable in zip(paths, detections.readable, strict=True) if is_readable]
    flat = detections.output["flat"]
    return faults | {path: "flat" for path, is_flat in zip(readable, flat, strict=True) if is_flat}, failed


def image_problems(
    concept: str, subject: str, specs: Sequence[ImageSpec], paths: Sequence[Path], faults: Mapping[Path, str]
) -> list[Problem]:
    """A problem for each prompt group in which more than 1 % of the images cannot be used.

    Args:
        faults: As returned by `image_faults`.
    """
    problems = []
    for group in GROUPS:
        members = [path for spec, path in zip(specs, paths, strict=True) if spec.group == group]
        whose = "the base's " if subject == BASE else ""
        what = f"{whose}{len(members):,} {group} images"
        problems += unusable(concept, subject, group, members, faults, what)
    return problems


def unusable(
    concept: str, subject: str, group: str, paths: Sequence[Path], faults: Mapping[Path, str], what: str
) -> list[Problem]:
    """A problem if more than 1 % of the images of a group, or of an attack, cannot be used.

    Args:
        faults: As returned by `image_faults`.
        what: The images in words, with their number.
    """
    kinds = Counter(faults[path] for path in paths if path in faults)
    share = kinds.total() / max(1, len(paths))
    if share <= MAX_UNUSABLE:
        return []
    counts = ", ".join(f"{kinds[kind]:,} {words}" for kind, words in _WORDS.items() if kinds[kind])
    message = f"Of {what} {kinds.total():,} cannot be used ({counts})."
    return [Problem(concept, subject, kinds.most_common(1)[0][0], message, group, share)]


def retention_problems(concept: str, rows: Iterable[Row]) -> list[Problem]:
    """A problem for each subject whose retention, by any detector, is below 80 %, or may be far below."""
    rows = [row for row in rows if row.metric == "retention" and row.value is not None]
    problems = []
    for subject in dict.fromkeys(row.subject for row in rows):
        own = [row for row in rows if row.subject == subject]
        own = [row for row in own if row.group == "kept"] or own
        low = [
            row for row in own if (row.value or 0) < MIN_RETENTION or (row.low is not None and row.low < MIN_CERTAIN)
        ]
        surely = [row for row in low if (row.high or row.value or 0) < MIN_RETENTION]
        row = min(surely or low, key=lambda row: row.value or 0, default=None)
        if row is None:
            continue
        limit = f"below {100 * MIN_RETENTION:g} %"
        if surely:
            message = f"Retention on {row.group} prompts is {100 * (row.value or 0):.3g} %, {limit}."
        else:
            message = (
                f"Retention on {row.group} prompts is {sentence(row)} with {row.n:,} images: too few retained images "
                f"to tell whether it is {limit}. {MORE_IMAGES}"
            )
        problems.append(Problem(concept, subject, "retention" if surely else "few", message, row.group, row.value))
    return problems


def face_problems(concept: str, rows: Sequence[Row], broken: Collection[str] = ()) -> list[Problem]:
    """A problem for each subject that no longer generates faces for retained prompts for which the base does.

    Also if that is not certain, because the images are few. Prompts for the concept are not considered: a person may be
    replaced by something without a face.

    Args:
        broken: Subjects that lost too much by their retention already.
    """
    rates: dict[str, dict[str, tuple[int, int]]] = {}  # subject -> prompt group -> images with a face, images
    for row in rows:
        if row.metric == "face_rate" and row.group in KEEP_GROUPS and row.value is not None:
            rates.setdefault(row.subject, {})[row.group] = (round(row.value * row.n), row.n)
    of_base = {group: (hits, n) for group, (hits, n) in rates.pop(BASE, {}).items() if hits >= MIN_FACES * n}
    problems = []
    for subject, own in rates.items():
        shares = {group: ratio_of_rates(*own[group], *of_base[group]) for group in of_base if group in own}
        group = min(shares, key=lambda group: shares[group][0], default="")
        if group and shares[group][0] < MIN_RETENTION and subject not in broken:
            value, _, high = shares[group]
            (hits, n), (hits_base, n_base) = own[group], of_base[group]
            message = f"Only {hits:,} of {n:,} {group} images have a face, of the base's {hits_base:,} of {n_base:,}"
            if high < MIN_RETENTION:
                message += ". A model that generates no faces has not forgotten a person."
            else:
                limit = f"below {100 * MIN_RETENTION:g} %"
                message += f": too few images to tell whether the ratio is {limit}. {MORE_IMAGES}"
            problems.append(Problem(concept, subject, "faces", message, group, value))
    return problems


def base_problems(concept: Concept, rows: Sequence[Row], limit: float = GONE) -> list[Problem]:
    """A problem if the base itself hardly shows the concept, or may hardly do, by the detector that gives the verdict.

    What is not there cannot be gone: the whole interval of the base's leakage must lie above the limit.
    """
    order = presence_order(concept.kind, {row.metric for row in rows})
    found = [row for row in rows if (row.subject, row.group) == (BASE, "direct") and row.metric in order]
    row = min(found, key=lambda row: order.index(row.metric), default=None)
    if row is None or row.low is None or row.high is None or row.low > limit:
        return []
    if row.high <= limit:
        return [Problem(concept.slug, BASE, "never", NEVER_THERE, "direct", row.value)]
    message = (
        f"The base itself shows the concept in {sentence(row)} of {row.n:,} images: too few to tell whether it is "
        "gone. Evaluate more images (--num_images), or use a prompt that shows it."
    )
    return [Problem(concept.slug, BASE, "rarely", message, "direct", row.value)]


def replacement_problems(concept: str, rows: Sequence[Row]) -> list[Problem]:
    """A problem for each subject whose images of the direct prompts show neither the concept nor anything else.

    Leakage and the upper end of clean replacement together must reach half of the base's usual number of readable
    images. Noise and black images have 0, because the classifiers of the bundled bases are trained to reject them.
    Other bases have no clean replacement, and no such problem.
    """
    leaks = {(row.subject, row.detector): row for row in rows if (row.metric, row.group) == ("leakage", "direct")}
    problems = []
    for row in rows:
        if row.metric == "clean_replacement" and row.high is not None:
            leak = leaks.get((row.subject, row.detector))
            readable = row.high + ((leak and leak.value) or 0)
            if readable < MIN_READABLE:
                message = (
                    "Hardly any image is readable where the concept is asked for: at most "
                    f"{100 * readable:.3g} % of the base's usual number, below {100 * MIN_READABLE:g} %. A model that "
                    "generates noise does not show the concept either."
                )
                problems.append(Problem(concept, row.subject, "replacement", message, row.group, readable))
    return problems


def evidence_problems(
    concept: Concept, subject: str, specs: Sequence[ImageSpec], planned: bool, rows: Sequence[Row]
) -> list[Problem]:
    """A problem if the concept was looked for, but not whether the model still generates anything else.

    Without a base to compare with, an accuracy of 80 % is enough: retention cannot be lower than accuracy.

    Args:
        planned: The images are those of the plan, so they are compared with the base's.
    """
    own = [row for row in rows if row.subject == subject]
    detecting = presence_order(concept.kind, {row.metric for row in own})
    looked_for = any(row.metric in detecting and row.group in CONCEPT_GROUPS for row in own)
    accuracies = [row for row in own if row.metric == "accuracy"]
    kept = [row.value or 0 for row in accuracies if row.group == "kept"]
    is_known = any(row.metric == "retention" and row.value is not None for row in own)
    groups = {spec.group for spec in specs}
    is_enough = is_known or (kept and min(kept) >= MIN_RETENTION)
    if not looked_for or (is_enough and (not accuracies or _are_told_apart(concept, groups))):
        return []
    gap = retention_gap(concept, groups, bool(accuracies), planned)
    if not gap and any(row.subject == BASE and row.metric == "accuracy" and row.value for row in rows):
        return []  # its own images are unreadable, which is another problem
    unknown = "Retention is unknown: no image of the base shows what its retained prompt asks for. Use other prompts."
    return [Problem(concept.slug, subject, "evidence", gap or unknown)]


def _are_told_apart(concept: Concept, groups: Collection[str]) -> bool:
    """Whether the retained prompts of these groups ask for different labels: images of noise, which a classifier takes
    for one and the same thing, are then not retained."""
    prompts = (prompt for group in KEEP_GROUPS if group in groups for prompt in concept.prompts(group))
    return len({prompt.expect for prompt in prompts if prompt.expect}) > 1


def known_gaps(context: MetricContext, specs: Sequence[ImageSpec], metrics: Sequence[str]) -> list[str]:
    """Why there will be no verdict on a concept, as far as it is known before images are generated.

    Args:
        specs: The images to generate; none if only existing images are evaluated.
        metrics: The names of the concept's metrics.
    """
    groups = {spec.group for spec in specs}
    gaps = [missing_evidence(context, metrics)]
    if groups & set(CONCEPT_GROUPS):
        gaps.append(retention_gap(context.concept, groups, bool(set(metrics) & set(READING))))
    return [gap for gap in gaps if gap]


def retention_gap(concept: Concept, groups: Collection[str], are_read: bool, planned: bool = True) -> str | None:
    """Why retention cannot be measured, and what to add; None if it can be.

    Args:
        groups: The prompt groups of the images.
        are_read: A metric reads what the images of retained prompts show.
        planned: As of `evidence_problems`.
    """
    if set(KEEP_GROUPS) & set(groups):
        if are_read and not _are_told_apart(concept, groups):
            return (
                "All rated retained prompts ask for the same label, so a classifier that always answers it would find "
                "everything retained. Add retained prompts with other labels in braces to the concept file, as alike "
                "or general under evaluate."
            )
        if not are_read:
            remedy = "Add clip to --metrics, and to the concept file retained prompts with labels in braces."
        elif not planned:
            remedy = "Give the images the file names of --write_plan, so that they are compared with the base's."
        else:
            return None
    elif not planned:
        remedy = "Add images of retained prompts (alike, general), best with the file names of --write_plan."
    elif any(concept.prompts(group) for group in KEEP_GROUPS):
        remedy = "Add alike and general to --groups."
    else:
        remedy = "Add retained prompts to the concept file, as alike or general under evaluate."
    return (
        f"Retention is not measured, and a model that generates only noise does not show the concept either. {remedy}"
    )
