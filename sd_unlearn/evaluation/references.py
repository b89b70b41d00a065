"""Options that belong to one concept of several: whose photos a folder of --reference holds, and --label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sd_unlearn.data.concept import Concept
from sd_unlearn.errors import UsageError, suggest
from sd_unlearn.evaluation.image_folders import split_name
from sd_unlearn.io.paths import concept_slug


def reference_folders(given: Sequence[str], concepts: Mapping[str, Concept]) -> dict[str, Path]:
    """Slug -> the folder that --reference gives for this concept.

    Args:
        given: The values of --reference: [concept=]folder.
        concepts: The evaluated concepts by slug.

    Raises:
        UsageError: a folder does not exist, no evaluated concept has the name, it is unclear whose photos a folder
            without a name holds, or two folders are given for one concept.
    """
    folders: dict[str, Path] = {}
    for each in given:
        name, folder = split_name(each, "--reference")
        slug = _only_person(folder, concepts) if name is None else _concept_called(name, each, concepts)
        if slug in folders:
            raise UsageError(
                f"--reference {each}: {concepts[slug].name} already has the folder {folders[slug]}. Put all photos of "
                "one person into one folder; its subfolders are read, too."
            )
        folders[slug] = folder
    return folders


def check_label(label: str | None, concepts: Mapping[str, Concept]) -> None:
    """Refuse a --label for several concepts: all would be measured as the same class.

    Raises:
        UsageError
    """
    if label is not None and len(concepts) > 1:
        raise UsageError(
            f"--label {label} would be the class of all {len(concepts)} concepts ({_names(concepts)}). Leave it out "
            "and write label: into each concept file, or evaluate one --concept at a time."
        )


def _only_person(folder: Path, concepts: Mapping[str, Concept]) -> str:
    """The only concept, or the only person among several."""
    people = [slug for slug, concept in concepts.items() if concept.kind == "person"]
    candidates = list(concepts) if len(concepts) == 1 else people
    if len(candidates) != 1:
        example = next(iter(people or concepts))
        raise UsageError(
            f"--reference {folder} does not say whose photos these are, and {len(concepts)} concepts are evaluated "
            f"({_names(concepts)}). Name the concept of each folder, as in {example}={folder}."
        )
    return candidates[0]


def _concept_called(name: str, given: str, concepts: Mapping[str, Concept]) -> str:
    slug = concept_slug(name)
    if slug not in concepts:
        hint = suggest(slug, concepts)
        raise UsageError(f"--reference {given}: no concept {name} is evaluated.{hint} Evaluated: {_names(concepts)}.")
    return slug


def _names(concepts: Mapping[str, Concept]) -> str:
    return ", ".join(concept.name for concept in concepts.values())
