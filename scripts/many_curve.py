"""The picture of docs/emoji.md and docs/leaderboard.md: leakage and retention against the number of erased things."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # not pyplot: it holds state and may open windows

from sd_unlearn.metrics.statistics import wilson

# Method -> colour (of Okabe and Ito 2008, distinguishable by color-blind readers) and marker.
STYLE = {
    "pu": ("#0072B2", "D"),
    "least_squares": ("#009E73", "s"),
    "sum": ("#7F7F7F", "x"),
    "one_by_one": ("#CC79A7", "v"),
    "uce": ("#E69F00", "o"),
    "rece-3": ("#D55E00", "^"),
}
Point = tuple[int, float, tuple[float, float], float]  # things, leakage, its interval, retention


def point_of(record: Mapping[str, Any]) -> Point:
    """Means over the erased things, and over what is retained, from a record of many_concepts.py."""
    leaks = list(record["leakage"].values())
    hits, n = sum(value * count for value, count in leaks), sum(count for _, count in leaks)
    kept = statistics.fmean(value for value, _ in record["retention"].values())
    return record["count"], hits / n, wilson(round(hits), n), kept


def single(records: Sequence[Mapping[str, Any]]) -> Point | None:
    """The same of things that were erased one at a time, from records of leaderboard.py; None without any."""
    rows = [record["evaluation"]["rows"] for record in records if "evaluation" in record]
    if not rows:
        return None
    leaks = {
        str(number): [row["leakage direct"]["value"], row["leakage direct"]["n"]] for number, row in enumerate(rows)
    }
    kept = {str(number): [row["retention kept"]["value"], 0] for number, row in enumerate(rows)}
    return point_of({"count": 1, "leakage": leaks, "retention": kept})


def draw(points: Mapping[str, Sequence[Point]], titles: Mapping[str, str], file: Path) -> None:
    """Write the PNG. points: of each method in STYLE."""
    figure = Figure(figsize=(8, 3.2), dpi=150, layout="constrained")
    leakage, retention = figure.subplots(1, 2)
    for method, (color, marker) in STYLE.items():
        if own := sorted(points.get(method, ())):
            counts, shares = [count for count, *_ in own], [100 * share for _, share, _, _ in own]
            below = [max(0.0, 100 * (share - low)) for _, share, (low, _), _ in own]
            above = [max(0.0, 100 * (high - share)) for _, share, (_, high), _ in own]
            line = {"color": color, "marker": marker, "linewidth": 1.2, "markersize": 5}
            leakage.errorbar(counts, shares, (below, above), capsize=2, label=titles[method], **line)
            retention.plot(counts, [100 * kept for *_, kept in own], **line)
    for panel, title in ((leakage, "erased things that still show, %"), (retention, "everything else retained, %")):
        panel.set_xscale("log")
        panel.set_xticks([1, 2, 5, 10, 50, 100], ["1", "2", "5", "10", "50", "100"])
        panel.set_xticks([], minor=True)
        panel.set_xlabel("erased things")
        panel.set_title(title, fontsize=10)
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(file, metadata={"Software": None})
