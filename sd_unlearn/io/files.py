"""Write files: whole or not at all, synced to disk, with the permissions of the umask."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sd_unlearn.errors import UnlearnError, UsageError, reason


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


def host_id() -> str:
    """Eight characters that tell this machine from others which write to the same storage.

    Containers count as machines of their own, because their process ids say nothing to each other, not even if they
    share a host name.
    """
    try:
        process_ids = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux
        process_ids = 0
    return hashlib.sha256(f"{socket.gethostname()} {process_ids}".encode()).hexdigest()[:8]


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, for a file or a folder, and rename it to `path` when the block ends.

    Readers never see partial content: it is synced to disk before the rename. An existing file is replaced by a file
    and a folder by a folder; if the block raises, it stays and the temporary one is removed. The permissions are those
    of the umask, whatever the writer of the temporary file has set. Threads must not write the same path at once.

    Raises:
        OSError: the file or folder cannot be written, or a folder is in the place of a file.
    """
    temporary, former = (path.with_name(f".{path.name}.{os.getpid()}@{host_id()}.{end}") for end in ("tmp", "old"))
    remove(temporary)  # left by a killed process that had the same id
    restore(path, former)
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
        temporary.replace(path)
        _sync(path.parent)
    finally:
        restore(path, former)
        remove(temporary)


def restore(path: Path, former: Path) -> None:
    """Give the former folder its name back if nothing has replaced it; otherwise remove it, if there is one."""
    if os.path.lexists(path):
        remove(former)
    elif os.path.lexists(former):
        with contextlib.suppress(OSError):  # it stays, see lock.remove_leftovers
            former.replace(path)


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


def timestamp() -> str:
    """The time in UTC, as records have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())


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
