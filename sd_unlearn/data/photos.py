"""The user's images in a data folder: are they where training reads them, and what was found."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

from sd_unlearn.data.captions import CAPTION_SUFFIXES, caption_files
from sd_unlearn.errors import UsageError, counted
from sd_unlearn.io.images import image_files, is_image_file, missing_support
from sd_unlearn.io.run_folder import NEGATIVE, POSITIVE, UNLABELED

CACHE_DIR = "cache"
SEARCH_DEPTH = 3  # levels of folders in which misplaced images are looked for
# Not images, and not mentioned: captions, metadata, what file managers leave behind.
OTHER_SUFFIXES = frozenset({"", *CAPTION_SUFFIXES, ".json", ".jsonl", ".csv", ".parquet", ".md", ".npz", ".db", ".ini"})


def is_image_folder(name: str) -> bool:
    """Whether a folder of this name in a data folder is trained on."""
    return name in (UNLABELED, NEGATIVE) or name.startswith(POSITIVE)


def check_places(data_dir: Path) -> None:
    """Refuse a data folder with images where they would not be read, and others rendered instead.

    Raises:
        UsageError: says what was found where, and where images go.
    """
    if not data_dir.is_dir():
        return
    if loose := image_files(data_dir):
        raise UsageError(_refusal(data_dir, data_dir, loose))
    folders = [path for path in _folders(data_dir) if path.name != CACHE_DIR]
    for folder in (path for path in folders if is_image_folder(path.name)):
        for inner, images in _images_inside(folder, SEARCH_DEPTH):
            raise UsageError(_refusal(data_dir, inner, images))
    others = [path for path in folders if not is_image_folder(path.name)]
    has_images = any(image_files(path) for path in folders if is_image_folder(path.name))
    for folder in others:
        if meant := _similar_name(folder.name):
            images = image_files(folder) or next((found for _, found in _images_inside(folder, SEARCH_DEPTH)), [])
            if images:
                raise UsageError(
                    f"--data_dir {data_dir}: {folder.name} holds {counted(len(images), 'image')}, but a folder of this "
                    f"name is not read. Rename it to {meant}."
                )
        if not has_images:
            _refuse_elsewhere(data_dir, folder)


def _refuse_elsewhere(data_dir: Path, folder: Path) -> None:
    """Refuse images in another folder of a data folder that has none where they are read."""
    if any(is_image_folder(path.name) for path in _folders(folder)):
        raise UsageError(f"--data_dir {data_dir} holds {folder.name}/{UNLABELED} or the like: use --data_dir {folder}.")
    images = image_files(folder)
    for place, found in [(folder, images)] if images else _images_inside(folder, SEARCH_DEPTH - 1):
        raise UsageError(_refusal(data_dir, place, found))


def _similar_name(name: str) -> str | None:
    """The folder that a misspelled name stands for."""
    plain = name.casefold().replace("-", "_").replace(" ", "_")
    close = difflib.get_close_matches(plain, (UNLABELED, POSITIVE, NEGATIVE), n=1, cutoff=0.8)
    return plain if plain.startswith(POSITIVE) else next(iter(close), None)


def _folders(folder: Path) -> list[Path]:
    """The folders inside a folder, without hidden ones; none if it cannot be listed."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []


def _images_inside(folder: Path, depth: int) -> Iterator[tuple[Path, list[Path]]]:
    """The folders inside a folder that hold images, each with its images."""
    for inner in _folders(folder) if depth else ():
        if images := image_files(inner):
            yield inner, images
        yield from _images_inside(inner, depth - 1)


def _refusal(data_dir: Path, place: Path, images: Sequence[Path]) -> str:
    return (
        f"--data_dir {data_dir}: {counted(len(images), 'image')} in {place} would not be read (the first is "
        f"{images[0].name}). Move images of the concept into {data_dir / POSITIVE} and all others into "
        f"{data_dir / UNLABELED}, without further folders inside. If all of them show the concept, use --positives "
        f"{place} instead of --data_dir: the others are then generated."
    )


def split_readable(folder: Path) -> tuple[list[Path], list[Path]]:
    """The image files of a folder that can be opened here, and those that need another package."""
    files = image_files(folder)
    return [f for f in files if not missing_support(f)], [f for f in files if missing_support(f)]


def describe(data_dir: Path, own_captions: Sequence[str | None]) -> str:
    """What a folder of the user's images holds, in one line: '25 images, 20 with own captions, 3 skipped (...)'.

    Text files that are the caption of no image are named.

    own_captions: the own caption of each image that is read, or None.
    """
    given = [caption for caption in own_captions if caption is not None]
    empty = given.count("")
    text = f"{data_dir}: {len(own_captions):,} images, {len(given):,} with own captions"
    text += f" ({empty:,} empty)" if empty else ""
    folders = [folder for folder in _folders(data_dir) if is_image_folder(folder.name)]
    unused = [path for folder in folders for path in _captions_without_image(folder)]
    if unused:
        text += f", {_first_names(unused)} without an image of that name"
    return f"{text}{describe_skipped([path for folder in folders for path in _skipped(folder)])}."


def _captions_without_image(folder: Path) -> list[Path]:
    """Text files that are the caption of no image (captions.py says how they are named)."""
    names = {name for image in image_files(folder) for name in (image.stem, image.name)}
    return [path for path in caption_files(folder).values() if path.stem not in names]


def _first_names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths[:3]) + (f" and {len(paths) - 3:,} more" if len(paths) > 3 else "")


def describe_skipped(skipped: Sequence[Path]) -> str:
    """', 3 skipped (.heic needs pillow-heif)', or an empty string."""
    if not skipped:
        return ""
    reasons = dict.fromkeys(
        f"{path.suffix.lower()} {f'needs {needed}' if (needed := missing_support(path)) else 'is not supported'}"
        for path in skipped
    )
    return f", {len(skipped):,} skipped ({', '.join(reasons)})"


def _skipped(folder: Path) -> list[Path]:
    """Files that may be images but are not read."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and (missing_support(path) if is_image_file(path) else path.suffix.lower() not in OTHER_SUFFIXES)
    ]
