"""calibration.json: the strengths at which a LoRA erases and retains enough (docs/using.md). Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sd_unlearn.errors import UsageError
from sd_unlearn.io.reading import read_json
from sd_unlearn.io.run_folder import CALIBRATION, TRAINING
from sd_unlearn.io.schema import OPEN, validate


@dataclass(frozen=True)
class Point:
    """What was measured at one strength. Shares in [0, 1]; None: unknown."""

    __pydantic_config__ = OPEN

    strength: float
    leakage: float | None  # of the prompt group and detector with the highest upper end
    leakage_low: float | None
    leakage_high: float | None
    leakage_n: int
    retention: float | None  # of the detector with the lowest value
    retention_low: float | None
    retention_high: float | None
    retention_n: int
    erases: bool  # leakage_high is below the accepted leakage, and the images can be used
    retains: bool  # retention is above the accepted one
    problems: tuple[str, ...] = ()  # why the images cannot be used


@dataclass(frozen=True)
class Calibration:
    """The content of calibration.json."""

    __pydantic_config__ = OPEN

    schema_version: int
    concept: str  # slug
    sha256: str  # of the LoRA's weights
    leakage: float  # accepted: the upper end of the 95 % interval must be below
    retention: float  # accepted: the value must be above
    smallest: float | None  # the smallest strength that erases; None: no tried strength does
    largest: float | None  # the largest strength that retains; None: no tried strength does
    strength: float | None  # the smallest tried strength that does both; None: no tried strength does
    message: str  # the outcome in words
    points: tuple[Point, ...]  # by strength
    base_sha256: str = ""  # of the base that it was measured on
    exceptions: tuple[float, ...] = ()  # strengths that contradict the assumption that more erases more, retains less


def describe(calibration: Calibration) -> list[str]:
    """The tried strengths as lines of a table, then the outcome."""
    lines = ["strength   leakage (95 % interval)      retention (95 % interval)    erases  retains"]
    for point in calibration.points:
        leakage = _value(point.leakage, point.leakage_low, point.leakage_high)
        retention = _value(point.retention, point.retention_low, point.retention_high)
        erases, retains = ("yes" if is_so else "no" for is_so in (point.erases, point.retains))
        lines.append(f"{point.strength:>8g}   {leakage:<27}  {retention:<27}  {erases:<6}  {retains}")
        lines += [f"{'':>11}{problem}" for problem in point.problems]
    return [*lines, "", calibration.message]


def _value(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "unknown"
    interval = f" ({100 * low:.1f} to {100 * high:.1f} %)" if low is not None and high is not None else ""
    return f"{100 * value:.1f} %{interval}"


def read_calibration(folder: Path, sha256: str, concept: str) -> Calibration | None:
    """The calibration of these weights in a folder. concept: the slug of what they erase, one or several together.

    None if there is none, it is damaged, or it is of other weights, of another base than that of the folder's run, or
    of another concept: that of one among several says nothing of the others.
    """
    try:
        found = validate(Calibration, read_json(folder / CALIBRATION), str(folder / CALIBRATION))
        base = read_json(folder / TRAINING)["base"].get("sha256") if (folder / TRAINING).is_file() else None
    except UsageError:
        return None
    same_base = not base or found.base_sha256 in ("", base)
    return found if (found.sha256, found.concept) == (sha256, concept) and same_base else None
