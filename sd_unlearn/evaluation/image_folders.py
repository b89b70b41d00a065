"""Folders of existing images of any method (--images): which prompt each image belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sd_unlearn.data.concept import Concept, Prompt
from sd_unlearn.data.metadata import check_group, find_metadata, image_finder, normalize, read_rows, row_name
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation.prompts import GROUPS, ImageSpec, group_prompts
from sd_unlearn.io.images import image_files
from sd_unlearn.io.run_folder import METADATA


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder for one concept."""

    name: str
    folder: Path
    specs: list[ImageSpec]
    paths: list[Path]
    planned: bool  # the images are those of the plan, in its order, and are compared pair by pair


def split_name(given: str, option: str) -> tuple[str | None, Path]:
    """(name, folder) of an option written as [name=]folder.

    Raises:
        UsageError: the folder does not exist.
    """
    name, equals, rest = given.partition("=")
    named = bool(equals) and not Path(given).is_dir()
    folder = Path(rest if named else given)
    if not folder.is_dir():
        raise UsageError(f"{option} {given}: {folder} is not a folder.")
    return (name if named else None), folder


def read_image_folder(
    given: str, concept: Concept, planned: Sequence[ImageSpec], only_concept: bool = True
) -> ImageFolder:
    """The images of a folder of --images.

    If the folder has files named as in the plan, its images are those of the plan; missing ones count as unreadable.
    Otherwise a metadata file gives the prompt of each image, or the subfolder (direct/, held_out/, ...) its group.

    Args:
        planned: The plan of the concept.
        only_concept: Whether a single concept is evaluated. If not, metadata must give the concept of each image.

    Raises:
        UsageError: no folder, no images in one of these forms, or incomplete metadata.
    """
    name, folder = split_name(given, "--images")
    name = name or folder.resolve().name
    paths = [folder / spec.file_name for spec in planned]
    if any(path.is_file() for path in paths):
        existing = sum(path.is_file() for path in paths)
        if 2 * existing < len(paths):  # images that were never generated would count as unlearned
            raise UsageError(
                f"--images {folder} holds {existing:,} of the {len(paths):,} images of the plan. Evaluate these: "
                "--groups, --num_images, --num_keep_images; or generate the rest of --write_plan."
            )
        return ImageFolder(name, folder, list(planned), paths, planned=True)
    if metadata := find_metadata(folder):
        images = _by_metadata(metadata, concept, only_concept)
    elif only_concept or not any((folder / group).is_dir() for group in GROUPS):
        images = _by_subfolder(folder, concept)
    else:
        raise UsageError(
            f"--images {folder}: subfolders do not tell which of several concepts an image belongs to. Evaluate one "
            f"--concept at a time, or add a {METADATA} with file_name, text, group and concept."
        )
    if not images:
        raise UsageError(
            f"--images {folder}: no images with known prompts. Name them as in --write_plan, add a {METADATA} "
            f"(file_name, text, group), or sort them into subfolders {', '.join(GROUPS)}."
        )
    return ImageFolder(name, folder, [spec for spec, _ in images], [path for _, path in images], planned=False)


def _by_metadata(file: Path, concept: Concept, only_concept: bool) -> list[tuple[ImageSpec, Path]]:
    known = {prompt.text: (group, prompt) for group in reversed(GROUPS) for prompt in group_prompts(concept, group)}
    find, images, counted = image_finder(file.parent), [], set[tuple[str, Path]]()
    for number, row in read_rows(file).items():
        where, text, name = row_name(file, number), row.get("text", row.get("prompt")), row.get("file_name")
        if not isinstance(name, str) or not isinstance(text, str):
            raise UsageError(f"{where} needs file_name and text.")
        if not only_concept and "concept" not in row:
            raise UsageError(f"{where} needs a concept, because several concepts are evaluated.")
        if row.get("concept", concept.slug) != concept.slug:
            continue
        group = check_group(row.get("group"), GROUPS, where) or (known[text][0] if text in known else None)
        if group is None:
            raise UsageError(
                f'{where}: "{text}" is not a prompt of the concept file. Add the group, one of {", ".join(GROUPS)}.'
            )
        inside = normalize(name)
        if inside is None:
            raise UsageError(f"{where}: file_name {name} is not inside {file.parent}. Move the image there.")
        prompt = known[text][1] if text in known and known[text][0] == group else Prompt(text)
        seed = str(row.get("seed"))
        spec = ImageSpec(group, prompt, int(seed) if seed.isdecimal() and len(seed) < 20 else number)
        path = find(name) or file.parent / inside  # a missing image counts as unreadable
        if (group, path.resolve()) in counted:
            raise UsageError(f"{where}: {name} is listed twice as {group} and would be counted twice. Remove a line.")
        counted.add((group, path.resolve()))
        images.append((spec, path))
    return images


def _by_subfolder(folder: Path, concept: Concept) -> list[tuple[ImageSpec, Path]]:
    images = []
    for group in GROUPS:
        files = image_files(folder / group, recursive=True)
        prompts = group_prompts(concept, group)
        # With several prompts in a group the image's prompt is unknown, and so is what it should show.
        prompt = prompts[0] if len(prompts) == 1 else Prompt("")
        images += [(ImageSpec(group, prompt, number), path) for number, path in enumerate(files)]
    return images
