"""Metadata files of image folders: metadata.jsonl, .csv or .parquet, as in Hugging Face's imagefolder format."""

from __future__ import annotations

import posixpath
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from sd_unlearn.errors import UsageError, install_command, reason, suggest
from sd_unlearn.io.images import image_files
from sd_unlearn.io.reading import read_csv_lines, read_jsonl_lines
from sd_unlearn.io.run_folder import METADATA
from sd_unlearn.io.schema import STRICT, validate

METADATA_FILES = (METADATA, "metadata.csv", "metadata.parquet")


@dataclass(frozen=True)
class ImageCaption:
    """One line of a metadata file; other columns are ignored."""

    __pydantic_config__ = STRICT

    file_name: str
    text: str  # the caption; may be empty
    group: str | None = None  # None or empty: the folder's default


def find_metadata(folder: Path) -> Path | None:
    """The metadata file of a folder, or None.

    Raises:
        UsageError: there are several.
    """
    found = [folder / name for name in METADATA_FILES if (folder / name).is_file()]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UsageError(f"{folder} holds several metadata files: {names}. Keep one of them.")
    return found[0] if found else None


def read_rows(path: Path) -> dict[int, dict[str, Any]]:
    """Number -> columns of each row of a metadata file. Numbers are lines, from 1; in Parquet files they are rows.

    Raises:
        UsageError: the file or a row, which is named, cannot be read; pyarrow is missing.
    """
    readers = {".jsonl": read_jsonl_lines, ".csv": _read_csv, ".parquet": _read_parquet}
    return readers[path.suffix](path)


def read_metadata(folder: Path, option: str = "--data_dir") -> dict[int, ImageCaption]:
    """Number -> row of a folder's metadata file; empty if there is none.

    Raises:
        UsageError: see `read_rows`, or a row without file name or caption; names `option`, file and row.
    """
    try:
        path = find_metadata(folder)
        rows = read_rows(path) if path else {}
    except UsageError as error:
        raise UsageError(f"{option}: {error}") from None
    known = ImageCaption.__dataclass_fields__
    return {
        number: validate(ImageCaption, {k: row[k] for k in known if k in row}, f"{option}: {row_name(path, number)}")
        for number, row in rows.items()
    }


def row_name(path: Path | None, number: int) -> str:
    """'FILE line 3' for messages."""
    return f"{path} {'row' if path and path.suffix == '.parquet' else 'line'} {number}"


def _read_csv(path: Path) -> dict[int, dict[str, Any]]:
    columns, rows = read_csv_lines(path)
    if "file_name" not in columns:
        raise UsageError(
            f"{path} has the columns {', '.join(columns) or '(none)'}. It needs file_name and text in its first line, "
            "separated by commas."
        )
    return rows


def _read_parquet(path: Path) -> dict[int, dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UsageError(f"{path} needs pyarrow: {install_command('parquet')}, or save it as metadata.csv.") from None
    try:
        return dict(enumerate(parquet.read_table(path).to_pylist(), 1))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UsageError(f"{path} is not valid Parquet ({reason(error)}). Write it again.") from None


def image_finder(folder: Path) -> Callable[[str], Path | None]:
    """A function: file_name of a metadata row -> the image that it names, in `folder` or a folder inside it, or None.

    `./x.png`, `sub\\x.png` and either Unicode form of an accented letter are accepted; names that lead out of the
    folder are not.
    """
    names = cache(lambda parent: {path.name for path in image_files(parent)})  # listed once per folder

    def find(file_name: str) -> Path | None:
        plain = normalize(file_name)
        forms = (unicodedata.normalize(form, plain) for form in ("NFC", "NFD")) if plain else ()
        as_given = file_name if ".." not in PurePath(file_name).parts else None
        paths = [folder / name for name in dict.fromkeys((as_given, plain, *forms)) if plain and name]
        return next((path for path in paths if path.name in names(path.parent)), None)

    return find


def normalize(file_name: str) -> str | None:
    """A relative path with forward slashes and without `.` and `..`; None for one that leads out of its folder."""
    plain = posixpath.normpath(file_name.replace("\\", "/"))
    return None if plain in (".", "..") or plain.startswith(("/", "../")) or "\0" in plain else plain


def check_group(group: Any, known: Sequence[str], where: str) -> str | None:
    """The group that a metadata row gives; None if it is missing or empty.

    Raises:
        UsageError: the group is unknown; starts with `where`.
    """
    if group is None or group == "":
        return None
    if group not in known:
        raise UsageError(f'{where}: unknown group "{group}".{suggest(str(group), known)} Known: {", ".join(known)}.')
    return str(group)
