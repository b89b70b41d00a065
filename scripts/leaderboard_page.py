"""The generated part of a page of the leaderboard: tables of concepts or, if a base has many, of groups of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from leaderboard_methods import METHODS
from leaderboard_studies import Study
from leaderboard_table import (
    Record,
    cost,
    is_known,
    mean,
    methods_table,
    percent,
    read_records,
    section,
    with_interval,
)

from sd_unlearn.io.files import write_text

START, END = "<!-- leaderboard:start -->", "<!-- leaderboard:end -->"
Records = Mapping[str, Mapping[str, Sequence[Record]]]  # method -> concept -> records of its seeds
OF_GROUPS = {  # column -> metric
    "leakage %": "leakage direct",
    "held out %": "leakage held_out",
    "generic %": "leakage generic",
    "clean %": "clean_replacement direct",
    "alike %": "retention alike",
    "general %": "retention general",
    "UA %": "ua",
    "IRA %": "ira",
    "CRA %": "cra",
    "soft %": "attack soft",
}


def mean_and_worst(of_concepts: Mapping[str, Sequence[Record]], name: str) -> str:
    """A rate with its interval; of several concepts the mean, and the worst value."""
    every = [record for records in of_concepts.values() for record in records]
    values = [value for records in of_concepts.values() if (value := mean(records, name)) is not None]
    if len(values) < 2:
        return with_interval(every, name, percent)
    worst = (max if name.startswith(("leakage", "attack")) else min)(values)
    return f"{percent(statistics.fmean(values))} (worst {percent(worst)})"


def group_section(title: str, concepts: Sequence[str], folder: Path) -> str:
    """A table of methods with means over the concepts of a group, and one of each concept's leakage and retention."""
    found: Records = {m: {c: read_records(folder, c, m) for c in concepts} for m in METHODS}
    found = {m: {c: records for c, records in of.items() if records} for m, of in found.items()}
    found = {m: of for m, of in found.items() if of}
    if not found:
        return f"### {title}\n\nNot run."
    columns = {
        title: name
        for title, name in OF_GROUPS.items()
        if any(is_known(mean_and_worst(of, name)) for of in found.values())
    }
    lines = [
        f"| method | concepts | {' | '.join([*columns, 'training', 'file'])} |",
        f"|---{'|---' * (len(columns) + 3)}|",
    ]
    for method, of_concepts in found.items():
        every = [record for records in of_concepts.values() for record in records]
        num_run = max(map(len, found.values()))
        cells = [METHODS[method].title, f"{len(of_concepts)}{f' of {num_run}' if len(of_concepts) < num_run else ''}"]
        cells += [mean_and_worst(of_concepts, name) for name in columns.values()]
        lines.append(f"| {' | '.join([*cells, cost(every, 'seconds'), cost(every, 'bytes')])} |")
    each = [f"| concept | {' | '.join(METHODS[m].title for m in found)} |", f"|---{'|---' * len(found)}|"]
    run = [concept for concept in concepts if any(concept in of for of in found.values())]
    for concept in run:
        rates = [
            " / ".join(
                with_interval(of.get(concept, ()), name, percent) for name in ("leakage direct", "retention kept")
            )
            for of in found.values()
        ]
        each.append(f"| {concept} | {' | '.join(rates)} |")
    tables = ["\n".join(lines)]
    if len(concepts) > 1:
        tables += ["Leakage / retention of each, in %, with 95 % intervals:", "\n".join(each)]
    if missing := [concept for concept in concepts if concept not in run]:
        tables.append(f"Not run yet: {', '.join(missing)}.")
    return "\n\n".join([f"### {title}", *tables])


def write_page(page: Path, study: Study, folder: Path, budget: str) -> None:
    """Replace the generated part of a page of `study`; see `replace_between`."""
    concepts = list(study.concepts)
    shown = [method for method in METHODS if any(read_records(folder, concept, method) for concept in concepts)]
    if study.tables == "concept":
        sections = [section(concept, folder, page.parent / "images") for concept in concepts]
    else:
        sections = [group_section(title, concepts, folder) for title, concepts in study.groups.items()]
    body = "\n\n".join([f"Budget `{budget}`.", *sections, "### Methods", methods_table(shown)])
    replace_between(page, START, END, body)


def replace_between(page: Path, start: str, end: str, body: str) -> None:
    """Replace what is between two markers of a page.

    Raises:
        SystemExit: there is no such page, or it lacks one of the markers.
    """
    if not page.is_file():
        raise SystemExit(f"{page} does not exist, so no tables were written; the records are kept.")
    before, found_start, rest = page.read_text(encoding="utf-8").partition(start)
    _, found_end, after = rest.partition(end)
    if not (found_start and found_end):
        raise SystemExit(f"{page} has no {start} ... {end}, between which the tables belong.")
    write_text(page, f"{before}{start}\n\n{body}\n\n{end}{after}")
