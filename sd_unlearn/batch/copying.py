"""Copy finished runs and the table of a job list to a folder or an fsspec URL (s3://, gs://, memory://, ...)."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

from sd_unlearn.batch.plan import Job, Plan
from sd_unlearn.batch.record import status_of
from sd_unlearn.errors import UnlearnError, UsageError, reason
from sd_unlearn.io.run_folder import CHECKPOINT_DIR


class Target(NamedTuple):
    """A folder of an fsspec file system."""

    url: str
    system: Any
    path: str


def open_target(url: str) -> Target:
    """The folder that copy_to names, once a small file could be written into it.

    Raises:
        UsageError: no such kind of URL, the package for it is not installed, or nothing can be written there.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:
        raise UsageError(
            f"copy_to {url}: {reason(error)}. Give a folder or an fsspec URL, e.g. s3://bucket/runs."
        ) from None
    check = f"{path}/.sd-unlearn-check"
    try:
        system.makedirs(path, exist_ok=True)
        system.pipe_file(check, b"sd-unlearn")
    except Exception as error:  # of the package for the URL: of a server, credentials, ...
        raise UsageError(f"copy_to {url} cannot be written: {reason(error)}. Correct it, or leave it out.") from error
    with contextlib.suppress(Exception):  # some storage can only be added to
        system.rm_file(check)
    return Target(url, system, path)


def copy_job(plan: Plan, job: Job, target: Target) -> None:
    """Copy the run folder of a job whose tasks are all done, without its checkpoints.

    Raises:
        UnlearnError: a file cannot be copied.
    """
    if job.run and all(status_of(plan.folder_of(task)) == "done" for task in job.tasks.values()):
        _copy(job.run, f"{target.path}/{job.run.name}", target)


def copy_list(plan: Plan, target: Target) -> None:
    """Copy the table and the comparison of a job list."""
    _copy(plan.own_folder, f"{target.path}/lists/{plan.own_folder.name}", target)


def _copy(folder: Path, place: str, target: Target) -> None:
    """Copy the files of a folder that are missing there or have another size, but no hidden files."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if (
            not path.is_file()
            or name.parts[0] in (CHECKPOINT_DIR, "cache")
            or any(part.startswith(".") for part in name.parts)
        ):
            continue
        to = f"{place}/{name.as_posix()}"
        try:
            if not target.system.exists(to) or target.system.size(to) != path.stat().st_size or path.suffix != ".png":
                target.system.makedirs(to.rpartition("/")[0], exist_ok=True)
                target.system.put_file(str(path), to)
        except Exception as error:  # of the package for the URL
            raise UnlearnError(f"copy_to {target.url}: {to} cannot be written: {reason(error)}.") from error
