"""One process at a time writes into a folder: locks that name their holder, and what killed processes leave behind."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sd_unlearn.errors import UnlearnError, reason
from sd_unlearn.io.files import host_id, remove, restore
from sd_unlearn.launch import process_rank

LOCK, HOLDER = ".sd-unlearn.lock", ".sd-unlearn.holder.json"


@contextmanager
def locked(folder: Path, option: str, wait: float = 0) -> Iterator[None]:
    """Hold the lock of a folder, which is created if it is missing and removed again if it stays empty.

    The system releases the lock when a process dies, so the locks of killed processes are taken over. The processes of
    a distributed launch share the lock, which the first of them holds.

    option: which names the folder; wait: seconds to wait for another process, -1 without limit.

    Raises:
        UnlearnError: another process holds the lock; names it.
    """
    if process_rank() > 0:
        yield
        return
    created = _make(folder, option)
    lock = FileLock(folder / LOCK)
    try:
        _acquire(lock, folder, option, wait)
        try:
            _write_holder(folder)
            yield
        finally:
            for name in (HOLDER, LOCK):
                with contextlib.suppress(OSError):
                    (folder / name).unlink()
            lock.release()
    finally:
        for new in reversed(created):
            with contextlib.suppress(OSError):  # not empty
                new.rmdir()


def _make(folder: Path, option: str) -> list[Path]:
    """Create a folder. Returns the folders that did not exist before, outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnlearnError(f"{option} {folder} cannot be created: {reason(error)}. Choose another.") from error
    return missing[::-1]


def _acquire(lock: FileLock, folder: Path, option: str, wait: float) -> None:
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise
            print(f"{option} {folder} is in use by {holder_of(folder)}. Waiting.", file=sys.stderr)
            lock.acquire(timeout=wait)
    except Timeout:
        raise UnlearnError(
            f"{option} {folder} is in use by {holder_of(folder)}. Wait until it has finished, or choose another folder."
        ) from None
    except OSError as error:
        raise UnlearnError(f"{option} {folder} cannot be locked: {reason(error)}. Choose another.") from error


def _write_holder(folder: Path) -> None:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": command,
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with contextlib.suppress(OSError):  # the lock holds without it
        (folder / HOLDER).write_text(json.dumps(holder), encoding="utf-8")


def holder_of(folder: Path) -> str:
    """The process that holds the lock of a folder, in words."""
    try:
        holder = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} ({holder['command']}), since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


_LEFTOVER = re.compile(r"\.(.+)\.(\d+)@([0-9a-f]+)\.(tmp|old)", re.DOTALL)  # the temporary names of atomic_path


def remove_leftovers(folder: Path, names: Sequence[str] = ("*",)) -> None:
    """Remove the temporary files and folders that killed processes left in a folder; not in its subfolders.

    Only the temporary names of atomic_path whose process ran on this machine and no longer runs, and those of this
    process, which must not be writing into the folder. If a process was killed while it replaced a folder, the former
    folder gets its name back.

    names: patterns of the final names.
    """
    for path in sorted(folder.glob(".*")) if folder.is_dir() else []:
        match = _LEFTOVER.fullmatch(path.name)
        if not match or not any(fnmatch.fnmatchcase(match[1], name) for name in names):
            continue
        process = int(match[2])
        if match[3] != host_id() or (process != os.getpid() and is_alive(process)):
            continue
        if match[4] == "old":
            restore(folder / match[1], path)
        else:
            remove(path)


def is_alive(pid: int) -> bool:
    """Whether a process with this id runs on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it belongs to another user
        return True
    return True
