"""`paper table`: build Markdown, CSV and plots from the records of finished runs. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_unlearn.errors import UsageError, install_command, suggest
from sd_unlearn.io.files import check_writable, write_bytes, write_text
from sd_unlearn.io.own_files import PAPER_TABLES, check_own_reports
from sd_unlearn.paper.tables.document import markers, shown_images, update_document
from sd_unlearn.paper.tables.records import FinishedRun, collect, no_runs, read_runs

if TYPE_CHECKING:
    from sd_unlearn.paper.tables.groups import Summary

MARKDOWN, RUNS, GROUPS, TABLES = "table.md", "runs.csv", "groups.csv", "tables"


def check_packages(*names: str) -> None:
    """
    Raises:
        UsageError: a package is not installed.
    """
    if missing := [name for name in names if find_spec(name) is None]:
        raise UsageError(f"The tables and plots need {' and '.join(missing)}: {install_command('paper')}.")


def build_tables(
    folder: Path, output: Path | None = None, update: Path | None = None, target: Path | None = None
) -> str:
    """Summarize every finished run under a folder. Returns the page of tables as Markdown.

    Args:
        output: Gets table.md, runs.csv (a line a run), groups.csv (a line for runs that differ only in their seed) and
            the plots as PNG; without it plots are skipped if matplotlib is missing. Default: folder/tables, unless
            `update` or `target` is given.
        update: Markdown document whose marked tables are replaced (see document.py), and those plots that it shows. A
            marker is a table's name, e.g. "beta", or that of one experiment, e.g. "beta:mnist5k-even".
        target: Gets copies of the records, see `collect`.

    Raises:
        UnlearnError: a file cannot be written.
        UsageError: no finished run, a missing package, a document with no or unknown markers, files of others in
            `output`; and as `collect`.
    """
    check_packages("pandas", *(["matplotlib"] if output else []))
    from sd_unlearn.paper.tables.groups import summarize
    from sd_unlearn.paper.tables.pages import TITLES, page

    if not (output or update or target):
        output = folder / TABLES
    wanted = markers(update, TITLES) if update else []
    runs = read_runs(folder)
    if not runs:
        raise UsageError(no_runs(folder))
    if output:
        check_writable(output, "--output_dir")
        check_own_reports(output, PAPER_TABLES, "--output_dir")
    summary = summarize(runs)
    text = page(summary)
    if target:
        collect(folder, target, runs)
    if update:
        update_document(update, _tables_for(update, wanted, summary))
        _update_plots(update, summary)
    if output:
        _write(output, folder, runs, summary, text)
    return text


def _write(output: Path, folder: Path, runs: Sequence[FinishedRun], summary: Summary, text: str) -> None:
    images = _plots(summary)  # everything is built before the first file is replaced
    for name, (_, png) in images.items():
        write_bytes(output / name, png)
    write_text(output / RUNS, _csv(_run_line(run, folder) for run in runs))
    write_text(output / GROUPS, _csv(_group_lines(summary)))
    links = [f"![{title}]({name})" for name, (title, _) in images.items()]
    write_text(output / MARKDOWN, "\n\n".join([text.rstrip("\n"), *(["## Plots", *links] if links else [])]) + "\n")


def _plots(summary: Summary) -> dict[str, tuple[str, bytes]]:
    """As plots.draw; empty, with a message, if matplotlib is missing."""
    from sd_unlearn.paper.tables import plots

    try:
        check_packages("matplotlib")
    except UsageError as error:
        print(f"No plots: {error}", file=sys.stderr)
        return {}
    return plots.draw(summary)


def _update_plots(document: Path, summary: Summary) -> None:
    from sd_unlearn.paper.tables.plots import PREFIXES

    shown = [image for image in shown_images(document) if image.name.startswith(PREFIXES)]
    images = _plots(summary) if shown else {}
    for image in shown:
        if image.name in images:
            write_bytes(image, images[image.name][1])


def _tables_for(document: Path, wanted: Sequence[str], summary: Summary) -> dict[str, str]:
    """The tables that a document has markers for. One without rows is reported and stays as it is."""
    from sd_unlearn.paper.tables.pages import TITLES, table_of

    tables, placed = {}, set()
    for name in wanted:
        kind, _, experiment = name.partition(":")
        if kind not in TITLES:
            known = f"{', '.join(TITLES)}, each also of one experiment, e.g. beta:mnist5k-even"
            raise UsageError(f'--update {document}: unknown table "{name}".{suggest(kind, TITLES)} Known: {known}.')
        placed.add(kind)
        if table := table_of(kind, summary, experiment):
            tables[name] = table
        else:
            print(f"{document}: no finished run for <!-- table: {name} -->; it is left unchanged.", file=sys.stderr)
    if unplaced := [name for name in TITLES if name not in placed and table_of(name, summary)]:
        print(f"{document} has no markers for: {', '.join(unplaced)}.", file=sys.stderr)
    return tables


# -- CSV --


def _csv(lines: Iterable[dict[str, Any]]) -> str:
    """Unrounded values; columns in the order in which they first occur, null as an empty cell."""
    import pandas as pd

    def cell(value: Any) -> Any:
        return ";".join(map(str, value)) if isinstance(value, list | tuple) else value

    table = pd.DataFrame([{name: cell(value) for name, value in line.items()} for line in lines], dtype=object)
    return table.to_csv(index=False, lineterminator="\n")


def _run_line(run: FinishedRun, folder: Path) -> dict[str, Any]:
    """Every setting and metric of a run."""
    raw = run.raw
    settings = {name: value for name, value in raw["settings"].items() if name != "betas"}
    line = {"file": run.path.relative_to(folder).as_posix(), **{k: raw[k] for k in ("experiment", "size", "seed")}}
    line |= settings | {"beta": run.beta}
    for name, row in run.metrics.items():
        line |= {name: row.value, f"{name}_low": row.low, f"{name}_high": row.high, f"{name}_n": row.n}
    line |= {f"{part}_{k}": v for part in ("counts", "cost", "classifier") for k, v in raw[part].items()}
    return line | {k: raw.get(k) for k in ("data_sha256", "weights_sha256", "version", "commit", "created")}


def _group_lines(summary: Summary) -> Iterable[dict[str, Any]]:
    """Settings, and each metric's mean, deviation and interval, of each group."""
    from pandas import DataFrame

    from sd_unlearn.paper.tables.groups import AXES

    means = DataFrame({name: summary.mean(name) for name in ("assumed_beta", "true_beta", "seconds")})
    metrics = dict(list(summary.metrics.groupby("group")))
    for index, group in summary.groups.iterrows():
        line = group[["experiment", "size", "objective", *AXES]].to_dict() | {"beta_source": ""}
        if group.beta is not None:
            source = group.beta if isinstance(group.beta, str) else "fixed"
            line |= {"beta": means.assumed_beta[index], "beta_source": source}
        line |= {
            "contamination": means.true_beta[index],
            **group.other,
            "seeds": list(summary.runs.seed[summary.runs.group == index]),
        }
        for value in metrics.get(index, DataFrame()).itertuples():
            name = value.Index[1]
            line |= {f"{name}_{column}": getattr(value, column) for column in summary.metrics}
        yield line | {"training_seconds": means.seconds[index]}
