"""Read and write files: writes are atomic, errors name the file."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from sd_unlearn.errors import UnlearnError, UsageError, reason, suggest

WEIGHTS_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
MAX_VALUES = 3_000_000  # in one YAML file, or one JSON file with surrogates
MAX_BITS = 10_000  # of an integer: Python refuses to print more than 4,300 digits
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON escapes it
_SURROGATES = re.compile("[\ud800-\udfff]")


def slugify(name: str) -> str:
    """A file name from any concept name: 1 to 60 lower-case letters, digits and hyphens."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60].strip("-")
    return slug or f"concept-{zlib.crc32(name.encode(errors='surrogatepass')):08x}"


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all.

    Raises:
        UnlearnError: the file cannot be written.
    """
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:  # a lone surrogate, e.g. from a file name that is not UTF-8
        raise UnlearnError(f"Cannot write {path}: {reason(error)}. Use UTF-8 names and texts.") from None
    write_bytes(path, data)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        UnlearnError: the file cannot be written.
    """
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise UnlearnError(f"Cannot write {path}: {reason(error)}. Choose another folder.") from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, for a file or a folder, and rename it to `path` when the block ends.

    Readers never see partial content: it is synced to disk before the rename. An existing file is replaced by a file
    and a folder by a folder; if the block raises, it stays and the temporary one is removed. The permissions are those
    of the umask, whatever the writer of the temporary file has set.

    Raises:
        OSError: the file or folder cannot be written, or a folder is in the place of a file.
    """
    temporary, former = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _check_same_kind(temporary, path)
        for file in sorted(temporary.rglob("*")) if temporary.is_dir() else [temporary]:
            if file.is_file():
                _sync(file)
        _apply_umask(temporary)
        if path.is_dir():  # a folder cannot be renamed onto another one
            path.replace(former)
        try:
            temporary.replace(path)
        except OSError:
            if former.exists():
                former.replace(path)
            raise
        _sync(path.parent)
    finally:
        for left in (temporary, former):
            remove(left)


def _check_same_kind(temporary: Path, path: Path) -> None:
    """Refuse to replace a folder by a file, which would delete everything in it, and a file by a folder."""
    if temporary.is_dir() and path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{path} is a file", str(path))
    if temporary.exists() and not temporary.is_dir() and path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{path} is a folder", str(path))


def _apply_umask(path: Path) -> None:
    """Give new files and folders the permissions that `open` and `mkdir` would. Some libraries write files as 0600."""
    mask = os.umask(0o077)
    os.umask(mask)
    for entry in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if not entry.is_symlink():
            with contextlib.suppress(PermissionError):  # on file systems without permissions
                entry.chmod((0o777 if entry.is_dir() else 0o666) & ~mask)


def _sync(path: Path) -> None:
    """fsync a file or folder. File systems that cannot sync folders are accepted."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(opened)


def remove(path: Path) -> None:
    """Remove a file, link or folder if possible."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def check_writable(folder: Path, option: str) -> None:
    """Check that a folder can be created and written, by writing a temporary file that leaves nothing behind.

    The file is created in the folder, or in the nearest of its parents that exists.

    Raises:
        UsageError: it cannot; names the option.
    """
    nearest = folder
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            folder.lstat()  # raises for names that no folder can have
        nearest = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(p))
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(b"x")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{option} {folder} cannot be written: {nearest} is not a writable folder ({reason(error)}). "
            "Choose another."
        ) from None


FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def full_disk_explained() -> Iterator[None]:
    """Turn the error of a full disk into one that says how to continue.

    Raises:
        UnlearnError
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        place = f" for {error.filename}" if error.filename else ""
        raise UnlearnError(
            f"{reason(error)}{place}. Free some disk space and run the same command again: finished files are kept."
        ) from error


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON, whole or not at all.

    Raises:
        UnlearnError: the file cannot be written.
    """
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """Write dataclass instances as JSON objects, one per line.

    Raises:
        UnlearnError: the file cannot be written.
    """
    lines = (json.dumps(dataclasses.asdict(r), ensure_ascii=False) for r in records)
    write_text(path, "".join(line + "\n" for line in lines))


def check_regular(path: Path) -> None:
    """Refuse pipes, sockets and devices: opening a pipe would wait forever, and a device need not end.

    Raises:
        OSError: it is not a file or folder, or does not exist.
        ValueError: the path contains a NUL character.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError("it is a pipe, socket or device, not a file")


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


def read_text(path: Path, option: str = "") -> str:
    """The content of a UTF-8 file, without a byte order mark.

    Raises:
        UsageError: the file is missing, unreadable, not a regular file or not UTF-8. Names the file, after `option` if
            it is given.
    """
    name = f"{option} {path}".strip()
    try:
        check_regular(path)
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UsageError(f"{name}: {reason(error)}." if option else f"{path} does not exist.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} cannot be read: {reason(error)}.") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UsageError: the file is missing, unreadable or not JSON.
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON ({reason(error)}). Delete it and run the stage again.") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: the text is not JSON, or has an integer of thousands of digits, thousands of nested values or text
            with half a surrogate pair.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    if _SURROGATE.search(text):
        _check_plain(value)
    return value


def read_jsonl_lines(path: Path) -> dict[int, dict[str, Any]]:
    """Line number (from 1) -> object of a JSONL file. Blank lines are skipped.

    Raises:
        UsageError: the file is missing or unreadable, or a line, which is named, is not a JSON object.
    """
    records = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):  # JSON strings may contain U+2028: no splitlines
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise UsageError(f"{path} line {number} is not JSON ({reason(error)}). Fix or delete the line.") from None
        if not isinstance(record, dict):
            raise UsageError(f"{path} line {number} is not a JSON object. Fix or delete the line.")
        records[number] = record
    return records


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file.

    Raises:
        UsageError: as `read_jsonl_lines`.
    """
    return list(read_jsonl_lines(path).values())


def read_yaml(path: Path, option: str) -> dict[str, Any]:
    """The content of a YAML file that holds a mapping.

    Raises:
        UsageError: the file is missing, unreadable, not YAML or not a mapping. Names `option` and the file.
    """
    text = read_text(path, option)
    try:
        data = yaml.safe_load(text)
        _check_plain(data)
    except Exception as error:  # for odd tags (!!int "", !!bool x) PyYAML raises IndexError, KeyError and others
        raise UsageError(f"{option} {path} is not valid YAML: {reason(error)}.") from None
    if not isinstance(data, dict):
        raise UsageError(f"{option} {path} must hold keys and values, not {type(data).__name__}.")
    return data


def _check_plain(data: Any) -> None:
    """Refuse parsed values that cannot be printed or written again.

    Raises:
        ValueError: text with half a surrogate pair, an integer of thousands of digits, or more than MAX_VALUES values
            (aliases of YAML let a short file stand for billions).
    """
    left, values = [data], 0
    while left:
        value = left.pop()
        values += 1
        if values > MAX_VALUES:
            raise ValueError(f"it holds more than {MAX_VALUES:,} values")
        if isinstance(value, str) and _SURROGATES.search(value):
            raise ValueError(f"it holds the text {value[:60]!r}, which is not valid Unicode")
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise ValueError("it holds an integer of thousands of digits")
        if isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            left += value


def check_keys(data: dict[str, Any], known: set[str], where: str) -> None:
    """Check that a mapping has known keys only.

    Raises:
        UsageError: naming the first unknown key, the most similar known key and all known keys.
    """
    for key in data:
        if key not in known:
            raise UsageError(
                f'{where}: unknown key "{key}".{suggest(str(key), known)} Known: {", ".join(sorted(known))}.'
            )


def file_sha256(*files: Path) -> str:
    """SHA-256 (hexadecimal) of the concatenated content of files."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as data:
            while block := data.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
