"""A data folder as training examples: images with captions. Imports no torch, so that `train` can refuse it at once."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sd_unlearn.data.captions import Caption, read_captions
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.photos import describe, describe_skipped, split_readable
from sd_unlearn.errors import UsageError
from sd_unlearn.io.images import UnreadableImage, open_image
from sd_unlearn.io.run_folder import NEGATIVE, POSITIVE, UNLABELED

UNUSED = "unused"  # group of the examples that a step of one of several concepts does not sample (turns.py)


@dataclass(frozen=True)
class Example:
    """One training image."""

    path: Path
    caption: str
    group: str  # generic | mixed_in | keep; positive | negative in the folders of that kind; UNUSED
    positive_set: int = 0  # of a positive: index of its folder in positive_sets()
    own_caption: bool = False  # whether the caption comes from a metadata or text file, not from the concept

    @property
    def is_positive(self) -> bool:
        return self.group == "positive"

    @property
    def is_negative(self) -> bool:
        """Whether the image is known not to show the concept."""
        return self.group == "negative"


def positive_sets(folder: Path) -> list[str]:
    """Names of a data folder's sets of positives (1_positive, 1_positive_2, ...). Each set has its own beta."""
    return sorted(p.name for p in folder.glob(f"{POSITIVE}*") if p.is_dir()) or [POSITIVE]


def set_names(concept: Concept) -> list[str]:
    """Names of the folders with the positives that are rendered: one for each of several concepts."""
    parts = concept.parts
    return [POSITIVE] if len(parts) == 1 else [f"{POSITIVE}_{part.slug}" for part in parts]


def sets_of(folder: Path, concept: Concept) -> list[tuple[str, Concept]]:
    """The name of each set of positives in a data folder, and the concept whose images it holds."""
    parts = concept.parts
    if len(parts) == 1:
        return [(name, concept) for name in positive_sets(folder)]
    return list(zip(set_names(concept), parts, strict=True))


def members_of_sets(examples: Sequence[Example]) -> dict[int, list[int]]:
    """Index of each set of positives -> indices of its examples."""
    sets: dict[int, list[int]] = {}
    for i, example in enumerate(examples):
        if example.is_positive:
            sets.setdefault(example.positive_set, []).append(i)
    return sets


def has_negatives(folder: Path, eta: float) -> bool:
    """Whether the folder has images known not to show the concept and --eta gives them a weight."""
    return eta > 0 and (folder / NEGATIVE).is_dir()


def split_beta(concept: Concept, sets: Sequence[str], beta: float, source: str) -> tuple[list[float], str]:
    """Split beta over the sets of positives; returns (beta of each set, where the values come from).

    The concept file's `betas` are used if it has any, else equal shares. A beta that is given as an option or estimated
    is always the total; the concept file's `betas` then only give the proportions.
    """
    if not concept.betas:
        return [beta / len(sets)] * len(sets), source
    betas = [concept.betas[name] for name in sets]
    is_total = source in ("option", "estimated")
    return ([beta * b / sum(betas) for b in betas], source) if is_total else (betas, "concept")


def _check_betas(concept: Concept, folder: Path, sets: Sequence[str]) -> None:
    if concept.betas and set(concept.betas) != set(sets):
        raise UsageError(
            f"--data_dir {folder} holds the sets {', '.join(sets)}, but the concept file has betas for "
            f"{', '.join(sorted(concept.betas))}. Give every folder a beta, or none."
        )


def scan(folder: Path, concept: Concept, eta: float = 1.0, positives: Path | None = None) -> list[Example]:
    """List the images of a data folder with their captions. Each image is decoded once, so that a bad one is reported.

    Captions come from a metadata or text file (captions.py); without one, images have the concept's `generic` prompt,
    and positives its `caption`. Images in 2_negative are known not to show the concept; with eta 0 they are not read.
    positives: a folder whose images are used instead of those in 1_positive.

    Raises:
        UsageError: a missing folder or fewer than two images, `betas` for other sets of positives, an unreadable image,
            an invalid metadata file, or a line of it that matches no image.
    """
    sets = sets_of(folder, concept)
    _check_betas(concept, folder, [name for name, _ in sets])
    read_caption = read_captions(folder)
    examples = _scan_folder(folder / UNLABELED, read_caption, Example(folder, concept.generic, "generic"))
    for number, (name, part) in enumerate(sets):
        if positives and name == POSITIVE:
            examples += scan_positives(positives, concept)
        else:
            examples += _scan_folder(folder / name, read_caption, Example(folder, part.caption, "positive", number))
    if has_negatives(folder, eta):
        examples += _scan_folder(folder / NEGATIVE, read_caption, Example(folder, concept.generic, "negative"))
    if not any(e.group in ("generic", "mixed_in") for e in examples):
        raise UsageError(f"--data_dir {folder}: {UNLABELED} holds only keep images. Add images of {concept.generic!r}.")
    return examples


def scan_positives(folder: Path, concept: Concept) -> list[Example]:
    """The images of --positives, with captions as in a data folder.

    Raises:
        UsageError: as scan.
    """
    if not folder.is_dir():
        raise UsageError(f"--positives {folder} is not a folder. Give one with photos of the concept.")
    default = Example(folder, concept.caption, "positive")
    return _scan_folder(folder, read_captions(folder, "--positives"), default, "--positives")


def _scan_folder(
    folder: Path, read_caption: Callable[[Path], Caption | None], default: Example, option: str = "--data_dir"
) -> list[Example]:
    """The examples of one folder; `default` is one without own caption and group, in the folder that `option` names."""
    images, skipped = split_readable(folder)
    if len(images) < 2:
        raise UsageError(
            f"{option} {default.path}: {folder} holds {len(images)} images{describe_skipped(skipped)}. At least 2 "
            f"are needed; 20 work better.{_hint(folder)}"
        )
    examples = []
    for path in images:
        try:
            open_image(path)
        except UnreadableImage as error:
            raise UsageError(f"{option}: {error}") from None
        examples.append(_example(path, read_caption(path), default))
    return examples


def _hint(folder: Path) -> str:
    """How to generate the images that a folder of the user's lacks."""
    positive = folder.parent / POSITIVE
    if folder.name != UNLABELED or not positive.is_dir():
        return ""
    return f" To generate them, give --positives {positive} instead of --data_dir."


def _example(path: Path, own: Caption | None, default: Example) -> Example:
    if own is None:
        return dataclasses.replace(default, path=path)
    group = default.group
    # Only among unlabeled images does metadata set the group, and it cannot make one a labeled image: a line that was
    # copied with its image from 1_positive or 2_negative still says so.
    if group == "generic" and own.group and own.group not in ("positive", "negative"):
        group = own.group
    return dataclasses.replace(default, path=path, caption=own.text, group=group, own_caption=True)


def describe_positives(folder: Path, photos: Sequence[Example]) -> str:
    """What was found in the folder of --positives, in one line."""
    skipped = describe_skipped(split_readable(folder)[1])
    captions = sum(photo.own_caption for photo in photos)
    return f"{folder}: {len(photos):,} images of the concept, {captions:,} with own captions{skipped}."


def describe_images(folder: Path, examples: Sequence[Example]) -> str:
    """What was found in a folder of the user's own images, in one line."""
    return describe(folder, [e.caption if e.own_caption else None for e in examples])


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 of the training data: bytes, file name, caption, group and set of every image, not the folder's path."""
    digest = hashlib.sha256()
    for example in examples:
        fields = (example.path.name, example.caption, example.group, str(example.positive_set), "")
        digest.update("\0".join(fields).encode())
        digest.update(example.path.read_bytes())
    return digest.hexdigest()
