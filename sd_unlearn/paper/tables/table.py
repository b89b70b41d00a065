"""`paper table`: what the finished runs found, as Markdown, CSV and plots, and put into a document. No torch."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sd_unlearn.errors import UsageError, suggest
from sd_unlearn.io.files import check_writable, write_bytes, write_text
from sd_unlearn.paper.tables import plots
from sd_unlearn.paper.tables.finished import PaperRun, collect, none_found, read_runs
from sd_unlearn.paper.tables.groups import PLAIN, Figure, Group, grouped
from sd_unlearn.paper.tables.views import LEGEND, TITLES, table_of

__all__ = ["PaperRun", "collect", "document", "markers", "read_runs", "run", "update_document"]

MARKDOWN, RUNS, GROUPS, TABLES = "table.md", "runs.csv", "groups.csv", "tables"


def run(runs: Path, output: Path | None = None, update: Path | None = None, target: Path | None = None) -> str:
    """The tables of every finished run under a folder, as Markdown.

    output: a folder for table.md, runs.csv (a line a run), groups.csv (a line for runs that differ in their seed alone)
    and the plots as PNG; None: runs/tables, unless there is something else to do. update: a Markdown document whose
    marked tables are replaced, see `update_document`, and those of the plots that it shows; a marker names a view, e.g.
    "beta", or a view of one experiment, e.g. "beta:mnist5k-even". target: where to `collect`.

    Raises:
        UnlearnError: something cannot be written.
        UsageError: no finished run, matplotlib missing for `output`, or a document with no or unknown markers; and as
            `collect`.
    """
    if output:
        plots.check_available()
    elif not (update or target):
        output = runs / TABLES
    wanted = markers(update) if update else []
    found = read_runs(runs)
    if not found:
        raise UsageError(none_found(runs))
    if output:
        check_writable(output, "--output_dir")
    groups = grouped(found)
    text = document(groups)
    if target:
        collect(runs, target, found)
    if update:
        update_document(update, _blocks(groups, wanted, update))
        _renew_plots(update, groups)
    if output:
        _write(output, runs, found, groups, text)
    return text


def document(groups: Sequence[Group]) -> str:
    """All views that have something to show, each under its heading."""
    tables = [(title, table_of(name, groups)) for name, title in TITLES.items()]
    parts = [f"## {title}\n\n{table}" for title, table in tables if table]
    return "\n\n".join(["# What the runs of the paper's experiments found", LEGEND, *parts]) + "\n"


def _write(output: Path, folder: Path, runs: Sequence[PaperRun], groups: Sequence[Group], text: str) -> None:
    drawn = _drawn(groups)  # everything is made before the first file is replaced
    for name, (_, png) in drawn.items():
        write_bytes(output / name, png)
    write_text(output / RUNS, _csv(_run_line(run, folder) for run in runs))
    write_text(output / GROUPS, _csv(_group_line(group) for group in groups))
    pictures = [f"![{title}]({name})" for name, (title, _) in drawn.items()]
    parts = [text.rstrip("\n"), *(["## Plots", *pictures] if pictures else [])]
    write_text(output / MARKDOWN, "\n\n".join(parts) + "\n")


def _drawn(groups: Sequence[Group]) -> dict[str, tuple[str, bytes]]:
    """The plots as plots.draw has them; none, which is said, without matplotlib."""
    try:
        return plots.draw(groups)
    except UsageError as error:
        print(f"No plots: {error}", file=sys.stderr)
        return {}


# -- a document with tables in it --

_START = re.compile(r"<!-- table: (\S+) -->")
_PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+\.png)\)")


def markers(path: Path) -> list[str]:
    """The names of the tables that a document has a place for, in their order.

    Raises:
        UsageError: there is no such document, or it has a place for none.
    """
    if names := _START.findall(_read(path)):
        return names
    raise UsageError(
        f"--update {path} has no place for a table. Put <!-- table: main --> and <!-- end: main --> on lines of their "
        f"own where it shall stand. Tables: {', '.join(TITLES)}."
    )


def update_document(path: Path, markdown_blocks: dict[str, str]) -> None:
    """Replace what stands between <!-- table: NAME --> and <!-- end: NAME --> in a Markdown document.

    Raises:
        UnlearnError: the document cannot be written.
        UsageError: there is no such document, or a marker is missing, twice there or out of order; names it.
    """
    text = before = _read(path)
    for name, block in markdown_blocks.items():
        start, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
        for marker in (start, end):
            if (times := text.count(marker)) != 1:
                raise UsageError(f"--update {path} has {marker} {times} times; it must be there once.")
        first, last = text.index(start) + len(start), text.index(end)
        if last < first or _START.search(text, first, last):
            raise UsageError(f"--update {path}: {end} must follow {start} before any other table starts.")
        text = f"{text[:first]}\n\n{block.strip()}\n\n{text[last:]}"
    if text != before:
        write_text(path, text)


def _renew_plots(path: Path, groups: Sequence[Group]) -> None:
    """Draw again those pictures of a document that have the name of a plot."""
    shown = [path.parent / link for link in _PICTURE.findall(_read(path))]
    shown = [picture for picture in shown if picture.name.startswith(plots.PREFIXES)]
    drawn = _drawn(groups) if shown else {}
    for picture in shown:
        if picture.name in drawn:
            write_bytes(picture, drawn[picture.name][1])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--update {path} cannot be read: {error.strerror}. Name a Markdown document.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"--update {path} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from None


def _blocks(groups: Sequence[Group], wanted: Sequence[str], path: Path) -> dict[str, str]:
    """The tables that a document asks for. One that no run has anything for is left as it is, and that is said."""
    blocks, given = {}, set()
    for name in wanted:
        view, _, experiment = name.partition(":")
        if view not in TITLES:
            raise UsageError(f'--update {path}: table "{name}" is unknown.{suggest(view, TITLES)} Known: {_known()}.')
        table = table_of(view, [group for group in groups if experiment in ("", group.experiment)])
        given.add(view)
        if table:
            blocks[name] = table
        else:
            print(f"{path}: no run has anything for <!-- table: {name} -->; left as it is.", file=sys.stderr)
    unplaced = [name for name in TITLES if name not in given and table_of(name, groups)]
    if unplaced:
        print(f"{path} has no place for: {', '.join(unplaced)}.", file=sys.stderr)
    return blocks


def _known() -> str:
    return f"{', '.join(TITLES)}, each also of one experiment, e.g. beta:mnist5k-even"


# -- CSV --


def _csv(lines: Iterable[dict[str, Any]]) -> str:
    """Lines of any keys as one table, columns in the order in which they first come; null is an empty cell."""
    found = list(lines)
    names = list(dict.fromkeys(name for line in found for name in line))
    memory = io.StringIO()
    writer = csv.DictWriter(memory, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {k: ";".join(map(str, v)) if isinstance(v, list | tuple) else v for k, v in x.items()} for x in found
    )
    return memory.getvalue()


def _run_line(run: PaperRun, folder: Path) -> dict[str, Any]:
    """Everything of a run that is a figure or a setting, values unrounded."""
    record = run.record
    rows: dict[str, Any] = {}
    for (metric, group), row in run.rows.items():
        name = metric if group == "all" else f"{metric}_{group}"
        rows |= {name: row.value, f"{name}_low": row.low, f"{name}_high": row.high, f"{name}_n": row.n}
    parts = {f"{part}_{k}": v for part in ("counts", "cost", "classifier") for k, v in record.get(part, {}).items()}
    settings = {k: v for k, v in run.settings.items() if k != "betas"} | {"beta": run.beta}
    return {
        "file": run.path.relative_to(folder).as_posix(),
        "experiment": run.experiment,
        "size": run.size,
        "seed": run.seed,
        **settings,
        **rows,
        **parts,
        **{name: record.get(name) for name in ("data_sha256", "weights_sha256", "version", "commit", "created")},
    }


def _group_line(group: Group) -> dict[str, Any]:
    """What the tables are made of, values unrounded."""
    line: dict[str, Any] = {"experiment": group.experiment, "size": group.size, "objective": group.objective}
    line |= {name: group.axes.get(name) for name in PLAIN} | {"beta_source": ""}
    if "beta" in group.axes:
        source = group.axes["beta"] if isinstance(group.axes["beta"], str) else "fixed"
        line |= {"beta": group.beta(), "beta_source": source}
    line["contamination"] = group.mean_of("settings", "contamination")
    line |= group.context | {"seeds": [run.seed for run in group.runs]}
    metrics = dict.fromkeys(key for run in group.runs for key in run.rows)
    figures = {m if g == "all" else f"{m}_{g}": group.figure(m, g) for m, g in metrics}
    for name, figure in ({"leakage": group.leakage()} | figures).items():
        line |= _figure(name, figure)
    return line | {"training_seconds": group.mean_of("cost", "seconds")}


def _figure(name: str, figure: Figure | None) -> dict[str, Any]:
    if figure is None:
        return {}
    return {
        f"{name}_mean": figure.mean,
        f"{name}_sd": figure.sd,
        f"{name}_low": figure.low,
        f"{name}_high": figure.high,
        f"{name}_n": figure.n,
        f"{name}_seeds": figure.seeds,
    }
