"""How a table's cells are written: figures with their deviation or interval, settings, Markdown. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sd_unlearn.paper.tables.finished import RATE, SHARE
from sd_unlearn.paper.tables.groups import Figure, Group, varying
from sd_unlearn.report.formatting import number
from sd_unlearn.results import Row

NONE = "–"
NAMES_OF = {"unsupervised": "Unsupervised", "supervised": "Supervised", "pu": "PU (proposed)", "pnu": "PNU"}
AXES = {
    "correction": "Correction",
    "beta": "Beta",
    "eta": "Eta",
    "conditional": "Conditional",
    "missing": "Labels missing of",
    "contamination": "Contamination",
    "num_negative": "Labeled normal",
    "max_ratio": "Bound",
}


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"

    return "\n".join([line(head), "|" + " --- |" * len(head), *(line(cells) for cells in lines)])


def label_of(arms: Sequence[Group], among: Sequence[Sequence[Group]]) -> str:
    """An experiment's name, with the settings that tell it from others of the same name."""
    alike = [g for other in among for g in other if g.experiment == arms[0].experiment and g.size == arms[0].size]
    context = {name: value for group in arms for name, value in group.context.items()}
    return ", ".join([arms[0].experiment, *(f"{name} {said(context.get(name))}" for name in varying(alike))])


def axis(group: Group, name: str) -> str:
    """The value of an axis as a table shows it; a dash where it has no meaning."""
    if name not in group.axes or (name == "eta" and not group.axes["num_negative"]):
        return NONE
    value = group.axes[name]
    if name == "beta" and isinstance(value, str):
        return value if (beta := group.beta()) is None else f"{beta:.3f} ({value})"
    if name == "contamination":
        share = group.mean_of("settings", name)
        return NONE if share is None else f"{share:.3f}"
    if name == "max_ratio":
        return said(value) if value else "none"
    if name == "missing":
        return ", ".join(value) or "none"
    return said(value)


def said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(said, value)) or "none"
    return NONE if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def percent(figure: Figure) -> str:
    return number(figure.mean, Row(RATE, "all", "", figure.mean, figure.n, interval="wilson"))


def rate(group: Group | None) -> str:
    figure = group and group.figure(RATE)
    if not figure:
        return NONE
    if figure.sd is not None:
        return f"{figure.mean:.3f} ({figure.sd:.3f})"
    known = figure.low is not None and figure.high is not None
    return f"{figure.mean:.3f}" + (f" [{figure.low:.3f}, {figure.high:.3f}]" if known else "")


def leakage(group: Group) -> str:
    figure = group.leakage()
    return percent(figure) if figure else NONE


def fid_of(group: Group | None, name: str) -> str:
    figure = group and group.figure(name)
    if not figure:
        return NONE
    return distance(figure) + (f" ({figure.sd:.{_digits(figure)}f})" if figure.sd is not None else "")


def distance(figure: Figure) -> str:
    return f"{figure.mean:.{_digits(figure)}f}"


def _digits(figure: Figure) -> int:
    return 1 if figure.mean >= 100 else 2 if figure.mean >= 1 else 3


def drawn(group: Group, label: str) -> str:
    figure = group.figure(SHARE, label)
    return percent(figure) if figure else NONE


def seeds(group: Group | None) -> str:
    return str(len(group.runs)) if group else NONE


def images(group: Group | None) -> str:
    figure = group and group.figure(RATE)
    return f"{figure.n:,}" if figure else NONE


def seconds(group: Group | None) -> str:
    seconds = group.mean_of("cost", "seconds") if group else None
    return NONE if seconds is None else f"{seconds:,.0f}"


def each(cells: Iterable[str]) -> str:
    """One word for the arms that agree, else each of them."""
    found = list(cells)
    words = {cell for cell in found if cell != NONE} or {NONE}
    return words.pop() if len(words) == 1 else " / ".join(found)
