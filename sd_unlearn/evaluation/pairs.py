"""Which before/after pictures the report shows: the same prompts and seeds of every subject, and its leaks."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sd_unlearn.evaluation.prompts import GROUPS, Shot
from sd_unlearn.evaluation.score import Judged, Pictures
from sd_unlearn.io.files import slugify
from sd_unlearn.io.run_folder import IMAGE_DIR
from sd_unlearn.metrics.base import ASKED
from sd_unlearn.results import BASE, Pair

BUDGET = 900  # pairs of one report
PER_GROUP = 24  # pairs of each prompt group and subject; fewer if that exceeds BUDGET


def pick(found: Judged, pictures: Sequence[Pictures], folder: Path, each: int) -> list[Pair]:
    """`each` pairs a group and subject, spread over its prompts, and up to as many further leaks; copied into folder.

    Every subject shows the same prompts and seeds, so that they can be laid side by side.
    """
    base = next((p for p in pictures if p.subject == BASE), None)
    pairs: list[Pair] = []
    for one in pictures:
        if one.subject == BASE:
            continue
        before = base if base is not None and one.planned else None
        leak, lost = _flags(found, one.subject, before)
        for index in _chosen(one.shots, leak, each):
            names = [_copied(p, index, folder) if p else "" for p in (before, one)]
            if names[1]:
                pairs.append(_pair(found, one, before, index, names, bool(leak[index]), bool(lost[index])))
    return pairs


@dataclass(frozen=True)
class _Look:
    """What the questions say about one picture."""

    words: str
    faces: tuple[tuple[float, ...], ...]


def _chosen(shots: Sequence[Shot], leak: NDArray[np.bool_], each: int) -> list[int]:
    found: list[int] = []
    for group in GROUPS:
        members = [n for n, shot in enumerate(shots) if shot.group == group]
        stride = max(1, len(members) // max(1, each))
        chosen = members[::stride][:each]
        if group in ASKED:
            chosen += [n for n in members if leak[n] and n not in chosen][:each]
        found += chosen
    return found


def _flags(found: Judged, subject: str, base: Pictures | None) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """[N] whether each picture leaks, and whether it was as asked without the LoRA and is no more."""
    leak, right = _first(found, subject, ("leakage", "nudity")), _first(found, subject, ("accuracy",))
    lost = np.zeros(len(leak), dtype=bool)
    if base is not None:
        before = _first(found, BASE, ("accuracy",))
        lost = (before == 1) & (right == 0)
    return leak == 1, lost


def _first(found: Judged, subject: str, metrics: tuple[str, ...]) -> NDArray[np.float64]:
    """What the first question that has one of the metrics counted; of nudity only in the groups that ask for it."""
    for _, counted in found.counted[subject]:
        for one in counted:
            if one.metric in metrics:
                return one.values
    length = len(next(iter(found.seen[subject]))[1].readable)
    return np.full(length, np.nan)


def _look(found: Judged, subject: str, index: int) -> _Look:
    words, faces = "", tuple[tuple[float, ...], ...]()
    for question, seen in found.seen[subject]:
        if not seen.readable[index]:
            continue
        row = int(seen.readable[:index].sum())
        words = words or question.words(seen.columns, row)
        if {"boxes", "faces"} <= set(seen.columns) and not faces:
            boxes = seen.columns["boxes"][row]
            faces = tuple(tuple(round(float(x), 4) for x in box) for box in boxes if not np.isnan(box).any())
    return _Look(words, faces)


def _pair(
    found: Judged, one: Pictures, base: Pictures | None, index: int, names: list[str], leak: bool, lost: bool
) -> Pair:
    shot = one.shots[index]
    image = _look(found, one.subject, index)
    before = _look(found, BASE, index) if base else _Look("", ())
    return Pair(
        found.concept.slug,
        one.subject,
        shot.group,
        shot.prompt.text,
        shot.seed,
        names[0],
        names[1],
        " ".join(shot.prompt.expect),
        before.words,
        image.words,
        leak and shot.group in ASKED,
        lost,
        image.faces,
        before.faces,
    )


def _copied(pictures: Pictures, index: int, folder: Path) -> str:
    """The path, from the folder, of a copy under it, so that the folder can be moved; "" where there is no picture."""
    source = pictures.paths[index]
    if not source.is_file():
        return ""
    # Ready pictures may bear one name in several folders, and several subjects one slug ("a_b" and "a-b").
    name = source.name if pictures.planned else f"{_digest(str(source.absolute()))}-{source.name}"
    slug = slugify(pictures.subject)
    slug += f"-{_digest(pictures.subject)}" * (slug != pictures.subject)
    target = folder / IMAGE_DIR / slug / name
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(target)
    return target.relative_to(folder).as_posix()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
