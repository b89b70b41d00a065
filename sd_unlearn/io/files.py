"""Files: written through a temporary name, read with errors that name them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from sd_unlearn.errors import UnlearnError, UsageError, reason, suggest


def slugify(name: str) -> str:
    """A file name from any concept name: letters, digits and hyphens, never empty, never a path."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60].strip("-")
    return slug or f"concept-{zlib.crc32(name.encode()):08x}"


def write_text(path: Path, text: str) -> None:
    """As write_bytes, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        UnlearnError: when the place cannot be written.
    """
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise UnlearnError(f"Cannot write {path}: {reason(error)}. Choose another folder.") from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Lend a temporary name beside `path` for a file or a folder, and give it the final name when the block ends.

    A reader never sees half of it: the content reaches the disk (fsync) before the name does. A file or folder that was
    there before is replaced; when the block raises, it stays and the temporary one is removed.

    Raises:
        OSError: the place cannot be written.
    """
    temporary, former = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for file in sorted(temporary.rglob("*")) if temporary.is_dir() else [temporary]:
            if file.is_file():
                _sync(file)
        if path.is_dir():  # a folder cannot be renamed onto another one
            path.replace(former)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        for left in (temporary, former):
            shutil.rmtree(left) if left.is_dir() else _unlink(left)


def _sync(path: Path) -> None:
    """fsync a file or folder; a file system that cannot sync folders is not an error."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(opened)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def check_writable(folder: Path, option: str) -> None:
    """Refuse, creating nothing, a folder that could not be made or written.

    Raises:
        UsageError: naming the option.
    """
    nearest = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UsageError(f"{option} {folder} cannot be written: {nearest} is no folder you may write to. Name another.")


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UsageError: when it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist.") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON ({error}). Delete it and run the stage again.") from None


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    lines = (json.dumps(dataclasses.asdict(r), ensure_ascii=False) for r in records)
    write_text(path, "".join(line + "\n" for line in lines))


def read_jsonl_lines(path: Path) -> dict[int, dict[str, Any]]:
    """Line number, from 1, -> object of a JSONL file; blank lines passed over.

    Raises:
        UsageError: naming the line that is not a JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON strings may hold U+2028 and U+0085
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from None
    records = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path} line {number} is not JSON ({reason(error)}). Mend or delete the line.") from None
        if not isinstance(record, dict):
            raise UsageError(f"{path} line {number} is not a JSON object. Mend or delete the line.")
        records[number] = record
    return records


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, as read_jsonl_lines."""
    return list(read_jsonl_lines(path).values())


def file_sha256(*files: Path) -> str:
    """SHA-256 of what files hold, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as data:
            while block := data.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def read_yaml(path: Path, option: str) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        UsageError: when the file is missing, not YAML or not a mapping; names `option`.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{option} {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{option} {path} must hold keys and values, not {type(data).__name__}.")
    return data


def check_keys(data: dict[str, Any], known: set[str], where: str) -> None:
    """Refuse the first unknown key, with the nearest known one.

    Raises:
        UsageError
    """
    for key in data:
        if key not in known:
            raise UsageError(
                f'{where}: unknown key "{key}".{suggest(str(key), known)} Known: {", ".join(sorted(known))}.'
            )
