"""Lines of a table: the value of a metric without and with the LoRA, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sd_unlearn.report.metric_names import group_rank, known_as, metric_rank, presence_order
from sd_unlearn.results import BASE, Row

KEPT = ("kept", "general", "alike")  # groups for metrics of what is kept, preferred first


class Line(NamedTuple):
    """A metric on a group of prompts, without and with the LoRA."""

    metric: str
    group: str
    base: Row | None
    lora: Row | None
    detects: bool = False  # the metric is one that detects the concept

    @property
    def main(self) -> Row:
        """The row whose interval, method and detector are shown: the LoRA's if there is one."""
        row = self.lora or self.base
        assert row is not None  # lines_of makes no line without a row
        return row

    @property
    def n(self) -> str:
        counts = dict.fromkeys(row.n for row in (self.base, self.lora) if row)
        return " / ".join(f"{n:,}" for n in counts)


def lines_of(rows: Iterable[Row], kind: str = "") -> list[Line]:
    """Combine the rows of the base and of one LoRA; known metrics and groups come first, none is dropped.

    What detects the concept comes before everything else: for each group, first the detector that gives the verdict.

    Args:
        kind: Of the concept; "" if unknown.
    """
    found: dict[tuple[str, str, str], dict[bool, Row]] = {}
    for row in rows:
        found.setdefault((row.metric, row.group, row.detector), {})[row.subject == BASE] = row
    order = presence_order(kind, {metric for metric, *_ in found})
    lines = [
        Line(metric, group, both.get(True), both.get(False), metric in order)
        for (metric, group, _), both in found.items()
    ]

    def place(line: Line) -> tuple[int, int, int]:
        if line.detects:
            return -1, group_rank(line.group), order.index(line.metric)
        return metric_rank(line.metric), group_rank(line.group), 0

    return sorted(lines, key=place)


def pick(lines: Sequence[Line], metric: str, *groups: str) -> Line | None:
    """The first line of a metric (a key of METRICS) that has a row of the LoRA, groups in order of preference."""
    hits = [x for g in groups for x in lines if (known_as(x.metric), x.group) == (metric, g) and x.lora]
    return hits[0] if hits else None


def presence(lines: Sequence[Line], group: str = "direct") -> Line | None:
    """How often the concept was detected on a group, by the detector that gives the verdict."""
    return next(iter(presence_by_detector(lines, group)), None)


def presence_by_detector(lines: Sequence[Line], group: str) -> list[Line]:
    """How often each detector found the concept on a group, the one that gives the verdict first. lines: lines_of."""
    return [x for x in lines if x.detects and x.group == group and x.lora]
