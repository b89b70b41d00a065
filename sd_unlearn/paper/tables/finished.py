"""Finished runs of the paper's experiments as they lie on disk: read, and copied without their weights and pictures.

Imports no torch. A run's folder is <anywhere>/<experiment>/<variant>/ and holds results.json once it is finished; the
copies that a repository can hold are <anywhere>/<experiment>/<variant>.json. Both are read alike. Runs of text-to-image
models have their record in paper.json, beside the results.json of `evaluate`.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_unlearn.errors import UsageError
from sd_unlearn.io.files import read_json, write_text
from sd_unlearn.io.run_folder import CONFIG, RESULTS
from sd_unlearn.paper.experiments import NAMES
from sd_unlearn.results import Row

SCHEMA_VERSION = 1
KIND = "paper"
RECORDS = (RESULTS, "paper.json")
OBJECTIVES = ("unsupervised", "supervised", "pu", "pnu")
ARMS = OBJECTIVES[:3]  # of the main tables
RATE, SHARE, FID = "non_sensitive_rate", "share", "fid-"  # FID: how the names of the distances begin
RERUN = "Delete it and run sd-unlearn paper run again."
NAMED_AT_MOST = 5  # runs that are not finished


@dataclass(frozen=True)
class PaperRun:
    """One finished run: one training with one seed, and what was counted on its pictures."""

    path: Path  # of the file it was read from
    record: dict[str, Any]  # as it lies in the file
    rows: dict[tuple[str, str], Row]  # by metric and group

    @property
    def experiment(self) -> str:
        return self.record["experiment"]

    @property
    def size(self) -> str:
        return self.record["size"]

    @property
    def seed(self) -> int:
        return self.record["seed"]

    @property
    def settings(self) -> dict[str, Any]:
        return self.record["settings"]

    @property
    def objective(self) -> str:
        return self.settings["objective"]

    @property
    def variant(self) -> str:
        """The name of its folder, or of its file where that is a copy."""
        return self.path.parent.name if self.path.name in RECORDS else self.path.stem

    @property
    def beta(self) -> float | None:
        """The share of sensitive images that the risk went by; the last one where it was estimated on the way."""
        estimates = self.settings.get("betas")
        return estimates[-1]["beta"] if estimates else self.settings.get("beta")

    def value(self, metric: str, group: str = "all") -> float | None:
        row = self.rows.get((metric, group))
        return row.value if row else None


def read_runs(folder: Path) -> list[PaperRun]:
    """Every finished run under a folder, in the order of their paths. Files of other kinds are passed over.

    A damaged file is named on stderr and left out, so that it hides no other run; runs that are not finished are
    counted there.

    Raises:
        UsageError: there is no such folder.
    """
    if not folder.is_dir():
        raise UsageError(none_found(folder))
    runs, known = [], set()
    for file in sorted(folder.rglob("*.json")):
        try:
            found = _read_run(file)
        except UsageError as error:
            print(f"Left out: {error}", file=sys.stderr)
            known.add(file.parent)
        else:
            runs += [found] if found else []
            known |= {file.parent} if found else set()
    if waiting := _unfinished(folder, known):
        names = ", ".join(waiting[:NAMED_AT_MOST]) + (", ..." if len(waiting) > NAMED_AT_MOST else "")
        print(f"Not finished, so not in the tables: {len(waiting)} ({names}).", file=sys.stderr)
    return runs


def collect(runs: Path, target: Path, found: Sequence[PaperRun] | None = None) -> list[Path]:
    """Copy the record of every finished run to target/<experiment>/<variant>.json, and nothing else of it.

    found: what read_runs has read from `runs`, where that is done already. Returns the copies.

    Raises:
        UnlearnError: when the target cannot be written.
        UsageError: no finished run, one folder inside the other, or two runs that would get the same name.
    """
    here, there = runs.resolve(), target.resolve()
    if here.is_relative_to(there) or there.is_relative_to(here):
        raise UsageError(f"--collect {target} and --runs {runs} lie in one another: runs would be read twice.")
    found = read_runs(runs) if found is None else found
    if not found:
        raise UsageError(none_found(runs))
    copies: dict[Path, PaperRun] = {}
    for run in found:
        copy = target / run.experiment / f"{run.variant}.json"
        if copy in copies:
            raise UsageError(f"{copies[copy].path} and {run.path} would both be {copy}. Rename one's folder.")
        copies[copy] = run
    for copy, run in copies.items():
        write_text(copy, run.path.read_text(encoding="utf-8"))
    return list(copies)


def none_found(folder: Path) -> str:
    """That there is nothing to tell of, and how to get something."""
    return (
        f"--runs {folder} holds no finished run of a paper's experiment. "
        "Make one: sd-unlearn paper run mnist5k-even --objective pu."
    )


def _unfinished(folder: Path, known: set[Path]) -> list[str]:
    """Folders of runs that were started and have no record, as <experiment>/<variant>; known: those that have one."""
    started = (config.parent for config in folder.rglob(CONFIG) if config.parent not in known)
    absolute = (place.resolve() for place in started)
    return sorted(f"{place.parent.name}/{place.name}" for place in absolute if place.parent.name in NAMES)


def _read_run(file: Path) -> PaperRun | None:
    """None for a file that is not of this kind.

    Raises:
        UsageError: it should be, and cannot be read as such.
    """
    ours = file.name in RECORDS or file.parent.name in NAMES
    try:
        record = read_json(file)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}.") from None
    except UsageError:
        if ours:
            raise
        return None
    if not isinstance(record, dict) or record.get("kind") != KIND:
        return None
    if why := _fault(record):
        raise UsageError(f"{file}: {why}. {RERUN}")
    return PaperRun(file, record, _rows(record["rows"]))


def _rows(raw: Iterable[dict[str, Any]]) -> dict[tuple[str, str], Row]:
    """By metric and group; of two rows of the same name the first counts."""
    rows: dict[tuple[str, str], Row] = {}
    for item in raw:
        row = Row.from_dict({"subject": "", **item})
        rows.setdefault((row.metric, row.group), row)
    return rows


# -- what a file must hold --


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number_or_null(value: Any) -> bool:
    return value is None or _number(value)


def _kind(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: value is None or isinstance(value, kinds)


_SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "objective": (lambda value: value in OBJECTIVES, f"one of {', '.join(OBJECTIVES)}"),
    "beta": (_number_or_null, "a number or null"),
    "eta": (_number_or_null, "a number or null"),
    "contamination": (_number_or_null, "a number or null"),
    "num_negative": (_number_or_null, "a number or null"),
    "max_ratio": (_number_or_null, "a number or null"),
    "correction": (_kind(str), "text or null"),
    "beta_source": (_kind(str), "text or null"),
    "conditional": (_kind(bool), "true, false or null"),
    "betas": (
        lambda value: (
            not value or (isinstance(value, list) and isinstance(value[-1], dict) and _number(value[-1].get("beta")))
        ),
        "a list that ends with a beta, or null",
    ),
    "missing": (
        lambda value: value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)),
        "a list of classes or null",
    ),
}

_PARTS = {
    "experiment": str,
    "size": str,
    "seed": int,
    "settings": dict,
    "rows": list,
    "counts": dict,
    "cost": dict,
    "classifier": dict,
}


def _fault(record: dict[str, Any]) -> str | None:
    """What is wrong with a record, or None."""
    if record.get("schema_version") != SCHEMA_VERSION:
        return f"schema_version is {record.get('schema_version')!r}, this version reads {SCHEMA_VERSION}"
    for key, kind in _PARTS.items():
        if not isinstance(record.get(key), kind):
            return f'"{key}" is missing or not a {kind.__name__}'
    for key in ("experiment", "size"):  # both become names of files
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", record[key]):
            return f'"{key}" is {record[key]!r}; it must be a name of small letters, digits and hyphens'
    for key, (check, wanted) in _SETTINGS.items():
        if not check(record["settings"].get(key)):
            return f"settings.{key} is {record['settings'].get(key)!r}; it must be {wanted}"
    faults = (f"rows[{i}] {why}" for i, row in enumerate(record["rows"]) if (why := _row_fault(row)))
    return next(faults, None)


def _row_fault(row: Any) -> str | None:
    if not (isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("metric", "group"))):
        return "needs metric and group as text"
    if "value" not in row or not all(_number_or_null(row.get(key)) for key in ("value", "low", "high")):
        return "needs a finite number or null as value, low and high"
    if not isinstance(row.get("n"), int):
        return "needs a whole number as n"
    is_share = row["metric"] in (RATE, SHARE) and row["value"] is not None
    return f"has {row['value']} as a share; it must lie in [0, 1]" if is_share and not 0 <= row["value"] <= 1 else None
