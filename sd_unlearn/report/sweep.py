"""sweep.json's content -> sweep.html (one file), sweep.md and sweep.csv. Imports no torch."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

from sd_unlearn.io.files import write_text
from sd_unlearn.report.formatting import GROUPS, METRICS, Line, lines, pick, shown
from sd_unlearn.report.jinja import environment
from sd_unlearn.report.scatter import Mark, tradeoff
from sd_unlearn.results import Row

SCHEMA_VERSION = 1
SWEEP, HTML, MARKDOWN, TABLE = "sweep.json", "sweep.html", "sweep.md", "sweep.csv"
SHOWN = ("leakage", "clean_replacement", "retention", "drift")
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
    "Each point is one training with one seed; its bars cover the chance of which pictures were drawn, not what "
    "another training seed would have given.",
    "All points are judged on the same prompts and seeds, so what they share in luck does not show between them.",
    "The judge is a program with errors of its own; each run's results.json says which.",
)


def write(output: Path, record: dict[str, Any]) -> Path:
    """Write the three files into a sweep's folder, each whole or not at all. Returns the path of sweep.html.

    record: as sweep.json holds it, see `sweep`.

    Raises:
        UnlearnError: when the folder cannot be written.
    """
    seen = context(record)
    page = environment(escape=True).get_template("sweep.html.j2").render(seen)
    text = environment(escape=False).get_template("sweep.md.j2").render(seen)
    write_text(output / TABLE, table_csv(record))  # everything is rendered before the first file is replaced
    write_text(output / MARKDOWN, text)
    write_text(output / HTML, page)
    return output / HTML


def context(record: dict[str, Any]) -> dict[str, Any]:
    """Everything the templates show."""
    found = [lines(run) for run in record["runs"]]
    pairs = [(pick(x, "retention", "kept", "general", "alike"), pick(x, "leakage", "direct")) for x in found]
    labels = [f"× {run['factor']:g}" for run in record["runs"]]
    marks = [
        Mark(label, x.lora, y.lora)
        for label, (x, y) in zip(labels, pairs, strict=True)
        if x and y and x.lora and y.lora
    ]
    picture = tradeoff(marks)
    drawn = [point["label"] for point in picture["points"]] if picture else []
    cells = [[pick(x, *column) for column in COLUMNS] for x in found]
    before = next((y.base for _, y in pairs if y), None)
    return {
        "record": record,
        "base": {"name": "", "sha256": "", **record["base"]},
        "picture": picture,
        "left_out": [label for label in labels if label not in drawn],
        "kept_is": next((GROUPS[x.group][0] for x, _ in pairs if x), ""),
        "before": shown(before) if before else "",
        "n": next((y.n for _, y in pairs if y), "0"),
        "multiplied": multiplied(record),
        "columns": [(METRICS[metric][0], GROUPS[group][0]) for metric, group in COLUMNS],
        "base_cells": [_base(column) for column in zip(*cells, strict=True)],
        "table": list(zip(record["runs"], cells, strict=True)),
        "limits": LIMITS,
        "terms": [METRICS[metric] for metric in SHOWN],
    }


def multiplied(record: dict[str, Any]) -> str:
    """What a factor multiplies, in a sentence."""
    beta = f"beta, {record['beta']:g} ({record['beta_source']})"
    if record["target"] == "teacher":
        return (
            f"A factor multiplies {beta}, and the push, {record['push']:g}. With a teacher the push is how hard the "
            "concept is forgotten, and beta decides a bracket's sign alone."
        )
    return f"A factor multiplies {beta}, which alone decides how hard the concept is forgotten."


def _base(column: tuple[Line | None, ...]) -> Row | None:
    """The base's figure, the same in every run."""
    return next((line.base for line in column if line and line.base), None)


def table_csv(record: dict[str, Any]) -> str:
    """One line a run and row: factor, beta, push and every field of records.Row, values unrounded."""
    names = ["factor", "beta", "push", *(f.name for f in dataclasses.fields(Row))]
    memory = io.StringIO()
    writer = csv.DictWriter(memory, names, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for run in record["runs"]:
        writer.writerows({k: run[k] for k in names[:3]} | row for row in run["rows"])
    return memory.getvalue()
