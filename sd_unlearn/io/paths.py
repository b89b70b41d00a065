"""Names of files: from concept names, inside a folder, and as published files may show them."""

from __future__ import annotations

import os
import re
import unicodedata
import zlib
from pathlib import Path

_FOLDERS = re.compile(r"(?<![\w./:~])~?/(?:[^/\s]+/)+")  # those of an absolute path
WEIGHTS_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def slugify(name: str) -> str:
    """A file name from any text: 1 to 60 lower-case letters, digits and hyphens."""
    return _latin(name) or f"concept-{_crc(name)}"


def concept_slug(name: str) -> str:
    """The slug of a concept's name, which ends in a hash if `slugify` would drop letters or digits of other scripts."""
    if all(c.isascii() or not c.isalnum() for c in unicodedata.normalize("NFKD", name)):
        return slugify(name)
    return f"{_latin(name)[:51].strip('-') or 'concept'}-{_crc(folded(name))}"


def folded(name: str) -> str:
    """A concept's name without differences in case, white space, hyphens and underscores."""
    return re.sub(r"[\s_-]", "", unicodedata.normalize("NFKC", name)).casefold()


def _latin(name: str) -> str:
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60].strip("-")


def _crc(name: str) -> str:
    return f"{zlib.crc32(name.encode(errors='surrogatepass')):08x}"


def path_inside(folder: Path, relative: str) -> Path | None:
    """The path of a file of a folder; None if it lies outside, also by a link in the folder, or does not exist."""
    if not relative or os.path.isabs(relative):
        return None
    try:
        root, path = folder.resolve(), (folder / relative).resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # missing; a loop of links; a NUL character
        return None
    return path if path.is_relative_to(root) else None


def public_name(name: str) -> str:
    """A name or path for published files: of a path that would show the user's folders only the last part."""
    path = Path(name)
    is_private = path.is_absolute() or name.startswith(("~", "..")) or path.suffix in WEIGHTS_SUFFIXES
    return path.name if is_private and path.name else name


def public_text(text: str, place: str) -> str:
    """A message about a file or folder for published files: of absolute paths only the last part.

    place: the path as it was given; it may hold spaces, at which other paths end.
    """
    for path in (os.path.abspath(place), str(Path(place))):
        text = text.replace(path, public_name(path))
    return _FOLDERS.sub("", text)
