"""Choose the before/after image pairs of the report and copy their images into the output folder."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sd_unlearn.evaluation.prompts import GROUPS, ImageSpec
from sd_unlearn.evaluation.score import ConceptResults, SubjectImages
from sd_unlearn.io.files import atomic_path
from sd_unlearn.io.paths import slugify
from sd_unlearn.io.run_folder import IMAGE_DIR
from sd_unlearn.metrics.base import CONCEPT_GROUPS
from sd_unlearn.report.examples import one_of_each_prompt
from sd_unlearn.report.metric_names import presence_order
from sd_unlearn.results import BASE, Pair, PairCount

PAIRS_PER_GROUP = 24  # pairs of each prompt group and subject; fewer if there were more than MAX_PAIRS
MAX_PAIRS = 900  # of one report

_Boxes = tuple[tuple[float, ...], ...]
_Outcomes = tuple[SubjectImages, SubjectImages | None, NDArray[np.bool_], NDArray[np.bool_]]


def pick_pairs(results: ConceptResults, folder: Path, count: int) -> list[Pair]:
    """`count` pairs per subject and group, and up to `count` more that leak or are lost.

    They are the first image of each prompt, then the second of each, and so on.

    All subjects show the same prompts and seeds, so the report can place them side by side.
    """
    pairs: list[Pair] = []
    for images, before, leaks, lost in _outcomes(results):
        for index in _choose(images.specs, leaks, lost, count):
            before_file = _copy_image(before, index, folder) if before else ""
            if file := _copy_image(images, index, folder):
                flags = bool(leaks[index]), bool(lost[index])
                pairs.append(_make_pair(results, images, before, index, (before_file, file), flags))
    return pairs


def count_outcomes(results: ConceptResults) -> list[PairCount]:
    """How many images of each subject and prompt group leak or are lost, shown or not."""
    counts = []
    for images, _, leaks, lost in _outcomes(results):
        for group in GROUPS:
            members = [n for n, spec in enumerate(images.specs) if spec.group == group]
            num_leaks = int(leaks[members].sum()) if group in CONCEPT_GROUPS else 0
            num_lost = int(lost[members].sum())
            if num_leaks or num_lost:
                counts.append(PairCount(results.concept.slug, images.subject, group, num_leaks, num_lost))
    return counts


def _outcomes(results: ConceptResults) -> Iterator[_Outcomes]:
    """Of each subject but the base: its images, the base's if they pair, and which ones leak and are lost."""
    base = next((images for images in results.images if images.subject == BASE), None)
    for images in results.images:
        if images.subject != BASE:
            before = base if images.planned else None
            yield images, before, _leaks(results, images), _lost(results, images, before)


def _choose(specs: Sequence[ImageSpec], leaks: NDArray[np.bool_], lost: NDArray[np.bool_], count: int) -> list[int]:
    indices: list[int] = []
    for group in GROUPS:
        members = [n for n, spec in enumerate(specs) if spec.group == group]
        members = one_of_each_prompt(members, [specs[n].prompt.text for n in members])
        chosen = members[:count]
        telling = leaks if group in CONCEPT_GROUPS else lost
        chosen += [n for n in members if telling[n] and n not in chosen][:count]
        indices += chosen
    return indices


def _lost(results: ConceptResults, images: SubjectImages, base: SubjectImages | None) -> NDArray[np.bool_]:
    """[N] whether the base's image was correct and this one is not."""
    if base is None:
        return np.zeros(len(images.specs), dtype=bool)
    before = _first_values(results, base, "accuracy")
    return (before == 1) & (_first_values(results, images, "accuracy") == 0)


def _leaks(results: ConceptResults, images: SubjectImages) -> NDArray[np.bool_]:
    """[N] whether the detector that gives the verdict finds the concept."""
    measured = {values.metric for values in results.values.get(images.subject, [])}
    return _first_values(results, images, *presence_order(results.concept.kind, measured)) == 1


def _first_values(results: ConceptResults, images: SubjectImages, *metrics: str) -> NDArray[np.float64]:
    """[N] the values of the first of these metrics that was computed; nan if none was."""
    for metric in metrics:
        for values in results.values.get(images.subject, []):
            if values.metric == metric:
                return values.values
    return np.full(len(images.specs), np.nan)


@dataclass(frozen=True)
class _Description:
    """What the detectors saw on one image."""

    words: str = ""
    faces: _Boxes = ()  # x0, y0, x1, y1 as fractions of width and height


def _describe(results: ConceptResults, subject: str, index: int) -> _Description:
    words, faces = "", _Description.faces
    for metric, detections in results.detections.get(subject, []):
        if not detections.readable[index]:
            continue
        row = int(detections.readable[:index].sum())
        words = words or metric.words(detections.output, row)
        if {"boxes", "faces"} <= set(detections.output) and not faces:
            boxes = detections.output["boxes"][row]
            faces = tuple(tuple(round(float(x), 4) for x in box) for box in boxes if not np.isnan(box).any())
    return _Description(words, faces)


def _make_pair(
    results: ConceptResults,
    images: SubjectImages,
    base: SubjectImages | None,
    index: int,
    files: tuple[str, str],
    flags: tuple[bool, bool],
) -> Pair:
    """files: of the base and of the subject; flags: whether the image leaks, and whether it was correct and is lost."""
    spec = images.specs[index]
    before = _describe(results, BASE, index) if base else _Description()
    after = _describe(results, images.subject, index)
    return Pair(
        concept=results.concept.slug,
        subject=images.subject,
        group=spec.group,
        prompt=spec.prompt.text,
        seed=spec.seed,
        base=files[0],
        image=files[1],
        expected=" ".join(spec.prompt.expect),
        base_read=before.words,
        image_read=after.words,
        leak=flags[0] and spec.group in CONCEPT_GROUPS,
        lost=flags[1],
        faces=after.faces,
        base_faces=before.faces,
    )


def _copy_image(images: SubjectImages, index: int, folder: Path) -> str:
    """Copy an image into `folder`; returns the relative path, so that the folder can be moved. "" if it is missing."""
    source = images.paths[index]
    if not source.is_file():
        return ""
    # In folders of existing images a file name can occur twice, and two subjects can have one slug ("a_b" and "a-b").
    name = source.name if images.planned else f"{_digest(str(source.absolute()))}-{source.name}"
    slug = slugify(images.subject)
    if slug != images.subject:
        slug += f"-{_digest(images.subject)}"
    target = folder / IMAGE_DIR / slug / name
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
    return target.relative_to(folder).as_posix()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
