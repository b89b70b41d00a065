"""Captions of the user's images: from a metadata file, or a text file next to the image."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from sd_unlearn.data.metadata import check_group, find_metadata, image_finder, read_metadata, row_name
from sd_unlearn.errors import UsageError, suggest
from sd_unlearn.io.images import image_files
from sd_unlearn.io.reading import read_text

# "positive" and "negative" have no effect in a metadata file: the folder decides which images are labeled.
CAPTION_SUFFIXES = (".txt", ".caption")  # in any case, in this order
GROUPS = ("generic", "mixed_in", "keep", "positive", "negative")


class Caption(NamedTuple):
    """A caption that the user gave to an image."""

    text: str  # empty if there is only white space
    group: str | None = None  # one of GROUPS, if the metadata file gives it


def read_captions(data_dir: Path, option: str = "--data_dir") -> Callable[[Path], Caption | None]:
    """A function: image of the data folder -> its own caption, or None. option: in errors.

    The first of these counts: the metadata file in the image's folder, the one in `data_dir` (with names such as
    0_unlabeled/x.png), a text file next to the image.

    Raises:
        UsageError: an invalid metadata file, or rows that match no image.
    """
    of_folder: dict[Path, dict[Path, Caption]] = {data_dir: _read_rows(data_dir, option)}
    text_files = cache(caption_files)

    def read(image: Path) -> Caption | None:
        folder = image.parent
        if folder not in of_folder:
            of_folder[folder] = _read_rows(folder, option)
        return of_folder[folder].get(image) or of_folder[data_dir].get(image) or read_text_file(image)

    def read_text_file(image: Path) -> Caption | None:
        found = text_files(image.parent)
        keys = ((name, suffix) for suffix in CAPTION_SUFFIXES for name in (image.stem, image.name))
        path = next((found[key] for key in keys if key in found), None)
        return Caption(read_text(path, option).strip().split("\n")[0].strip()) if path else None

    return read


def caption_files(folder: Path) -> dict[tuple[str, str], Path]:
    """(name, suffix in lower case) -> text file, as kohya's scripts have them: x.txt or x.png.txt is that of x.png."""
    files = (path for path in sorted(folder.iterdir()) if path.suffix.lower() in CAPTION_SUFFIXES and path.is_file())
    return {(path.stem, path.suffix.lower()): path for path in files if not path.name.startswith(".")}


def _read_rows(folder: Path, option: str) -> dict[Path, Caption]:
    """Image -> caption in a folder's metadata file.

    Raises:
        UsageError: rows that match no image, two rows of one image, an unknown group.
    """
    captions: dict[Path, Caption] = {}
    first: dict[Path, int] = {}
    unmatched: dict[int, str] = {}
    find, rows = image_finder(folder), read_metadata(folder, option)
    file = find_metadata(folder)
    for number, row in rows.items():
        where = f"{option}: {row_name(file, number)}"
        image = find(row.file_name)
        if image is None:
            unmatched[number] = row.file_name
        elif image in captions:
            raise UsageError(f"{where} names {row.file_name} again, after line {first[image]}. Keep one of them.")
        else:
            first[image] = number
            captions[image] = Caption(row.text.strip() and row.text, check_group(row.group, GROUPS, where))
    if unmatched:
        number, name = next(iter(unmatched.items()))
        count = "1 line matches" if len(unmatched) == 1 else f"{len(unmatched)} of {len(rows)} lines match"
        raise UsageError(
            f"{option}: {row_name(file, number)} names {name}, which is missing; {count} no image of {folder}."
            f"{suggest(name, [path.name for path in image_files(folder)])} Restore the file or delete the line."
        )
    return captions
