"""Read the records of finished runs from disk, and copy them without weights and images. Imports no torch, no pandas.

A run folder <anywhere>/<experiment>/<variant>/ holds results.json once the run is finished; copies for a repository are
<anywhere>/<experiment>/<variant>.json. A text-to-image run has its record in paper.json, because its results.json is
written by `evaluate`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, FiniteFloat

from sd_unlearn.errors import UsageError, reason
from sd_unlearn.io.files import write_text
from sd_unlearn.io.reading import read_json
from sd_unlearn.io.run_folder import CONFIG, RESULTS
from sd_unlearn.io.schema import OPEN, validate
from sd_unlearn.paper.experiments import NAMES

KIND = "paper"
RECORD_FILES = (RESULTS, "paper.json")
OBJECTIVES = ("unsupervised", "supervised", "pu", "pnu")
RATE, CLASS_SHARE = "non_sensitive_rate", "share"
RERUN = "Delete it and run sd-unlearn paper run again."
MAX_LISTED = 5  # unfinished runs listed by name


def _check_name(name: str) -> str:
    """A name becomes part of file names."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise ValueError(f'"{name}" must consist of lowercase letters, digits, - and _')
    return name


Name = Annotated[str, AfterValidator(_check_name)]


@dataclass(frozen=True)
class BetaEstimate:
    """One estimate of beta made during training."""

    __pydantic_config__ = OPEN

    beta: FiniteFloat


@dataclass(frozen=True)
class RecordedSettings:
    """The settings that the tables interpret; a record holds more, which are shown as they are."""

    __pydantic_config__ = OPEN

    objective: Literal["unsupervised", "supervised", "pu", "pnu"]
    beta: FiniteFloat | None = None
    eta: FiniteFloat | None = None
    contamination: FiniteFloat | None = None
    num_negative: int | None = None
    max_ratio: FiniteFloat | None = None
    correction: str | None = None
    beta_source: str | None = None
    conditional: bool | None = None
    betas: list[BetaEstimate] | None = None
    missing: list[str] | None = None


@dataclass(frozen=True)
class RecordedMetric:
    """One metric of a run with its 95 % interval."""

    __pydantic_config__ = OPEN

    metric: str
    group: str  # "all", or a class
    value: FiniteFloat | None
    n: int  # images
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None

    def __post_init__(self) -> None:
        if self.metric in (RATE, CLASS_SHARE) and self.value is not None and not 0 <= self.value <= 1:
            raise ValueError(f"has {self.value} as {self.metric}, which must lie in [0, 1]")


@dataclass(frozen=True)
class RunRecord:
    """What the tables need of a results.json or paper.json of a run."""

    __pydantic_config__ = OPEN

    schema_version: Literal[1]
    experiment: Name
    size: Name
    seed: int
    settings: RecordedSettings
    rows: list[RecordedMetric]
    counts: dict[str, Any]
    cost: dict[str, Any]
    classifier: dict[str, Any]


@dataclass(frozen=True)
class FinishedRun:
    """One finished run: one training with one seed and the metrics of its images."""

    path: Path  # of the record
    raw: dict[str, Any]  # the whole record
    record: RunRecord

    @property
    def variant(self) -> str:
        """Name of the run folder, or of the file if it is a copy."""
        return self.path.parent.name if self.path.name in RECORD_FILES else self.path.stem

    @property
    def beta(self) -> float | None:
        """The beta that the risk used; the last one if it was estimated during training."""
        estimates = self.record.settings.betas
        return estimates[-1].beta if estimates else self.record.settings.beta

    @property
    def metrics(self) -> dict[str, RecordedMetric]:
        """By name: the metric, followed by _<class> unless it covers all images. The first of equal names counts."""
        named: dict[str, RecordedMetric] = {}
        for row in self.record.rows:
            named.setdefault(row.metric if row.group == "all" else f"{row.metric}_{row.group}", row)
        return named


def read_runs(folder: Path) -> list[FinishedRun]:
    """Every finished run under a folder, ordered by path. Files of other kinds are ignored.

    A damaged record is reported on stderr and skipped; unfinished runs are counted there.

    Raises:
        UsageError: the folder does not exist.
    """
    if not folder.is_dir():
        raise UsageError(no_runs(folder))
    runs, recorded = [], set()
    for file in sorted(folder.rglob("*.json")):
        try:
            run = read_run(file)
        except UsageError as error:
            print(f"Skipped: {error}", file=sys.stderr)
            recorded.add(file.parent)
        else:
            runs += [run] if run else []
            recorded |= {file.parent} if run else set()
    if unfinished := _unfinished(folder, recorded):
        names = ", ".join(unfinished[:MAX_LISTED]) + (", ..." if len(unfinished) > MAX_LISTED else "")
        print(f"Not finished, so not in the tables: {len(unfinished)} ({names}).", file=sys.stderr)
    return runs


def read_run(file: Path) -> FinishedRun | None:
    """The run that a JSON file records; None if the file is not such a record.

    Raises:
        UsageError: the file is a damaged record, or has the place of one and is not readable JSON.
    """
    expected = file.name in RECORD_FILES or file.parent.name in NAMES
    try:
        raw = read_json(file)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {reason(error)}.") from None
    except UsageError:
        if expected:
            raise
        return None
    if not isinstance(raw, dict) or raw.get("kind") != KIND:
        return None
    return FinishedRun(file, raw, validate(RunRecord, raw, str(file), RERUN))


def collect(folder: Path, target: Path, runs: Sequence[FinishedRun]) -> list[Path]:
    """Copy the record of each run found under `folder` to target/<experiment>/<variant>.json. Returns the copies.

    Raises:
        UnlearnError: the target cannot be written.
        UsageError: no runs, one folder lies inside the other, or two runs would get the same name.
    """
    source, destination = folder.resolve(), target.resolve()
    if source.is_relative_to(destination) or destination.is_relative_to(source):
        raise UsageError(
            f"--collect {target} and --runs {folder} must not lie inside each other. Choose another folder."
        )
    if not runs:
        raise UsageError(no_runs(folder))
    copies: dict[Path, FinishedRun] = {}
    for run in runs:
        copy = target / run.record.experiment / f"{run.variant}.json"
        if copy in copies:
            raise UsageError(f"{copies[copy].path} and {run.path} would both be copied to {copy}. Rename one folder.")
        copies[copy] = run
    for copy, run in copies.items():
        write_text(copy, run.path.read_text(encoding="utf-8"))
    return list(copies)


def no_runs(folder: Path) -> str:
    """Error text for a folder without finished runs."""
    return (
        f"--runs {folder} holds no finished run of the paper's experiments. "
        "Start one with: sd-unlearn paper run mnist5k-even --objective pu."
    )


def _unfinished(folder: Path, recorded: set[Path]) -> list[str]:
    """Run folders that were started but have no record, as <experiment>/<variant>."""
    started = (config.parent.resolve() for config in folder.rglob(CONFIG) if config.parent not in recorded)
    return sorted(f"{run.parent.name}/{run.name}" for run in started if run.parent.name in NAMES)
