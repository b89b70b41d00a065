"""Metric values as people read them: numbers with units, digits and intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

from sd_unlearn.report.metric_names import METRICS, known_as
from sd_unlearn.results import Row

NONE = "–"
GONE = 0.05  # a concept is gone when the whole interval of its leakage lies at or below this
LARGEST = 1e15  # magnitude of a value that is printed or drawn; larger ones are treated as unknown
WITHOUT = "without the LoRA"


def finite(value: Any) -> TypeGuard[float]:
    """Whether a value is a number that can be printed and drawn."""
    return isinstance(value, int | float) and abs(value) <= LARGEST  # False for nan


def is_rate(row: Row) -> bool:
    """Whether the value is a share; an unknown metric is one if its interval is that of a proportion."""
    known = METRICS.get(known_as(row.metric))
    return (known is not None and known.is_rate) or row.interval == "wilson"


def number(value: float | None, row: Row) -> str:
    """A value in the unit of a row's metric, with as many digits as n supports; an en dash for none."""
    if not finite(value):
        return NONE
    if not is_rate(row):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    share, digits = round(100 * value, 6), 1 if row.n >= 100 else 0  # a mean of 0.05 may be 0.05 + 1e-17
    # 99.97 % must not be printed as 100 %, nor 5.03 % as 5 %, the limit of a verdict: only exact values may be
    exact = (0, 100, 100 * GONE)
    while digits < 4 and share not in exact and round(share, digits) in exact:
        digits += 1
    return f"{share:.{digits}f} %"


def value_text(row: Row | None) -> str:
    """The value of a row; an en dash without one."""
    return number(row.value, row) if row else NONE


def interval_text(row: Row | None) -> str:
    """The 95 % interval of a row; an en dash without one."""
    if row is None or row.low is None or row.high is None:
        return NONE
    low, high = number(row.low, row), number(row.high, row)
    return f"{low.removesuffix(' %')}–{high}"


def sentence(row: Row | None, before: Row | None = None, without: str = WITHOUT) -> str:
    """'1.0 % (95 % interval 0.2–3.0 %), without the LoRA 96.0 %'."""
    if row is None:
        return "not measured"
    interval = interval_text(row)
    text = f"{value_text(row)} (no interval)" if interval == NONE else f"{value_text(row)} (95 % interval {interval})"
    return f"{text}, {without} {value_text(before)}" if before else text


def per_seed(row: Row | None) -> str:
    """The value of each seed, if there are several; else nothing."""
    if row is None or not row.seeds or len(row.seeds) < 2:
        return ""
    return "by seed " + ", ".join(number(value, row) for value in row.seeds)


def listed(names: Sequence[str]) -> str:
    """“a”, “b” and “c”."""
    quoted = [f"“{name}”" for name in names]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]]) if len(quoted) > 1 else "".join(quoted)


def duration(seconds: float) -> str:
    """41 s, 12 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
