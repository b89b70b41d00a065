"""Axes of the SVG charts: scales from values to page units, ticks, and labels that do not overlap."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

Tick = tuple[float, str]  # position in page units, label


class Area(NamedTuple):
    """A rectangle in SVG units; y grows downwards."""

    left: float
    right: float
    top: float
    bottom: float

    def overlaps(self, other: Area) -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


@dataclass(frozen=True)
class Axes:
    """Linear axes over an area: x from left to right, y upwards. The ends must differ."""

    area: Area
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        """Value -> horizontal position in SVG units."""
        low, high = self.x_range
        return round(self.area.left + (value - low) / (high - low) * (self.area.right - self.area.left), 1)

    def y(self, value: float) -> float:
        """Value -> vertical position in SVG units."""
        low, high = self.y_range
        return round(self.area.bottom - (value - low) / (high - low) * (self.area.bottom - self.area.top), 1)

    def points(self, values: Iterable[tuple[float, float]]) -> str:
        """(x, y) values -> the `points` of an SVG polyline or polygon."""
        return " ".join(f"{self.x(x)},{self.y(y)}" for x, y in values)

    def x_ticks(self, label: Callable[[float], str], count: int = 5) -> list[Tick]:
        return [(self.x(value), label(value)) for value in ticks(*self.x_range, count)]

    def y_ticks(self, label: Callable[[float], str], count: int = 5) -> list[Tick]:
        return [(self.y(value), label(value)) for value in ticks(*self.y_range, count)]


def percent(value: float) -> str:
    """0.125 -> 12.5 %."""
    return f"{100 * value:.4g} %"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) in [low, high], about `count` of them."""
    if high <= low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10, 20) if (high - low) / (step * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def spread_labels(labels: list[dict[str, Any]], area: Area, gap: float = 16) -> None:
    """Change the labels' "y" as little as necessary so that none overlaps, inside the area while they fit."""
    order = sorted(labels, key=lambda label: label["y"])
    for above, below in itertools.pairwise(order):
        below["y"] = max(below["y"], above["y"] + gap)
    limit = area.bottom
    for label in reversed(order):
        label["y"] = max(min(label["y"], limit), area.top)
        limit = label["y"] - gap
