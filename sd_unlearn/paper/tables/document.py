"""Markdown documents with marked tables: <!-- table: NAME --> ... <!-- end: NAME -->."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from sd_unlearn.errors import UsageError, reason
from sd_unlearn.io.files import write_text

_START = re.compile(r"<!-- table: (\S+) -->")
_PNG_LINK = re.compile(r"!\[[^\]]*\]\(([^)\s]+\.png)\)")


def markers(path: Path, known: Iterable[str]) -> list[str]:
    """The names of the tables that a document has markers for, in their order. known: listed in the error.

    Raises:
        UsageError: the document cannot be read or has no markers.
    """
    if names := _START.findall(_read(path)):
        return names
    raise UsageError(
        f"--update {path} has no place for a table. Add <!-- table: main --> and <!-- end: main --> on lines of their "
        f"own. Tables: {', '.join(known)}."
    )


def shown_images(path: Path) -> list[Path]:
    """The PNG files that a document shows."""
    return [path.parent / link for link in _PNG_LINK.findall(_read(path))]


def update_document(path: Path, tables: dict[str, str]) -> None:
    """Replace the text between the markers of each table.

    Raises:
        UnlearnError: the document cannot be written.
        UsageError: the document cannot be read, or a marker is missing, duplicated or out of order.
    """
    text = before = _read(path)
    for name, table in tables.items():
        start, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
        for marker in (start, end):
            if (count := text.count(marker)) != 1:
                raise UsageError(f"--update {path} has {marker} {count} times; it must be there once.")
        first, last = text.index(start) + len(start), text.index(end)
        if last < first or _START.search(text, first, last):
            raise UsageError(f"--update {path}: {end} must follow {start} before any other table starts.")
        text = f"{text[:first]}\n\n{table.strip()}\n\n{text[last:]}"
    if text != before:
        write_text(path, text)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--update {path} cannot be read: {reason(error)}. Choose a Markdown document.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"--update {path} is not UTF-8 text ({reason(error)}). Save it as UTF-8.") from None
