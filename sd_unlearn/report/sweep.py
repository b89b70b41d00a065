"""The report of a sweep: sweep.json's content -> sweep.html (one file), sweep.md and sweep.csv. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd_unlearn.io.files import write_text
from sd_unlearn.io.schema import validate
from sd_unlearn.report.before_after import Outcome as Shown
from sd_unlearn.report.before_after import PairCard, Shot, embed_cards
from sd_unlearn.report.csv_table import rows_csv
from sd_unlearn.report.factors import Outcome, advise
from sd_unlearn.report.formatting import GONE, value_text
from sd_unlearn.report.jinja import environment
from sd_unlearn.report.lines import KEPT, Line, lines_of, pick, presence
from sd_unlearn.report.metric_names import explanations, group_name, metric_name
from sd_unlearn.report.reproduce import base_record
from sd_unlearn.report.scatter import Mark, scatter_chart
from sd_unlearn.results import BASE, Problem, Row

SCHEMA_VERSION = 1
SWEEP, HTML, MARKDOWN, TABLE = "sweep.json", "sweep.html", "sweep.md", "sweep.csv"
SHOWN = ("leakage", "nudity", "clean_replacement", "retention", "drift")
COLUMNS = (
    ("leakage", "direct"),
    ("leakage", "held_out"),
    ("leakage", "generic"),
    ("clean_replacement", "direct"),
    ("retention", "alike"),
    ("retention", "general"),
    ("drift", "kept"),
)
LIMITS = (
    "Each point is one training with one seed. Its bars cover the random choice of images, not what another training "
    "seed would have given.",
    "All points are evaluated on the same prompts and seeds, so chance that they share is not visible between them.",
    "The detector is a program and makes errors; the results.json of each run names it.",
)


def write(output: Path, record: dict[str, Any]) -> Path:
    """Write sweep.html, sweep.md and sweep.csv into a sweep's folder. Returns the path of sweep.html.

    record: the content of sweep.json (docs/results.md).

    Raises:
        UnlearnError: the folder cannot be written.
    """
    rows = [validate(tuple[Row, ...], run["rows"], f"{SWEEP} runs[{i}]") for i, run in enumerate(record["runs"])]
    cards = _cards(output, record)
    tiny = all(shot.image.tiny for card in cards for shot in card.shots if shot.image)
    content = context(record, rows) | {"cards": cards, "tiny": tiny}
    page = environment(escape=True).get_template("sweep.html.j2").render(content)
    text = environment(escape=False).get_template("sweep.md.j2").render(content)
    settings = ("factor", "beta", "push")
    table = [
        ({k: run[k] for k in settings}, row) for run, found in zip(record["runs"], rows, strict=True) for row in found
    ]
    write_text(output / TABLE, rows_csv(table, settings))  # everything is rendered before the first file is replaced
    write_text(output / MARKDOWN, text)
    write_text(output / HTML, page)
    return output / HTML


def context(record: dict[str, Any], rows: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Everything the templates show. rows: of each run."""
    lines = [lines_of(found, record.get("kind", "")) for found in rows]
    outcomes = [
        Outcome(run["factor"], x, [Problem(**problem) for problem in run.get("problems", ())])
        for run, x in zip(record["runs"], lines, strict=True)
    ]
    labels = [outcome.label for outcome in outcomes]
    leakage, retention = [presence(x) for x in lines], [pick(x, "retention", *KEPT) for x in lines]
    marks = [
        Mark(label, kept.lora, leak.lora)
        for label, leak, kept in zip(labels, leakage, retention, strict=True)
        if leak and kept and leak.lora and kept.lora
    ]
    chart = scatter_chart(marks)
    in_chart = {point["label"] for point in chart["points"]} if chart else set()
    cells = [[_cell(x, *column) for column in COLUMNS] for x in lines]
    base = next((line.base for line in leakage if line), None)
    return {
        "record": record,
        "base": base_record(record["base"]),
        "advice": advise(outcomes),
        "outcomes": outcomes,
        "gone": GONE,
        "chart": chart,
        "left_out": [label for label in labels if label not in in_chart],
        "kept_group": next((group_name(line.group) for line in retention if line), ""),
        "base_leakage": value_text(base) if base else "",
        "n": next((line.n for line in leakage if line), "0"),
        "scaled": describe_factors(record),
        "columns": [(metric_name(metric), group_name(group)) for metric, group in COLUMNS],
        "base_cells": [_base(column) for column in zip(*cells, strict=True)],
        "table": list(zip(record["runs"], cells, strict=True)),
        "limits": LIMITS,
        "terms": explanations(line.metric for x in lines for line in x),
    }


def _cards(output: Path, record: dict[str, Any]) -> list[PairCard]:
    """The images of each prompt and seed: the base's, then those of each factor."""
    cards = []
    for picture in record.get("pictures", ()):
        card = PairCard(
            record["concept"], picture["group"], picture["prompt"], picture["seed"], picture.get("expected", "")
        )
        card.shots.append(Shot(BASE, picture["base"], picture["base_read"], ()))
        for shot in picture["shots"]:
            outcome: Shown = "leak" if shot["leak"] else "lost" if shot["lost"] else "good"
            label = f"× {shot['factor']:g}"
            card.shots.append(Shot(label, shot["image"], shot["read"], (), outcome, name=label))
        cards.append(card)
    embed_cards(output, cards, blur_faces=False)
    return cards


def describe_factors(record: dict[str, Any]) -> str:
    """What a factor multiplies, in a sentence."""
    beta = f"beta, {record['beta']:g} ({record['beta_source']})"
    if record["target"] == "teacher":
        return (
            f"A factor multiplies {beta}, and the push, {record['push']:g}. With a teacher, the push determines how "
            "strongly the concept is forgotten, and beta only the sign of a bracket."
        )
    return f"A factor multiplies {beta}, which alone determines how strongly the concept is forgotten."


def _cell(lines: Sequence[Line], metric: str, group: str) -> Line | None:
    """Leakage is that of the detector that gives the verdict: for nudity, the share of nude images."""
    return presence(lines, group) if metric == "leakage" else pick(lines, metric, group)


def _base(column: tuple[Line | None, ...]) -> Row | None:
    """The base's value, which is the same in every run."""
    return next((line.base for line in column if line and line.base), None)
