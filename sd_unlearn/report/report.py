"""Report: results.json -> report.html (one file, pictures inside), report.md, results.csv. Imports no torch."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from pathlib import Path
from typing import Any

from sd_unlearn.config.base import ReportConfig
from sd_unlearn.config.checks import check_positive
from sd_unlearn.data.concept import Concept, read_concept
from sd_unlearn.errors import UsageError
from sd_unlearn.io import run_folder
from sd_unlearn.io.files import read_json, read_jsonl, read_yaml, write_text
from sd_unlearn.report import (
    before_after,
    certificate,
    charts,
    compare,
    formatting,
    images,
    metric_cards,
    reproduce,
    training_curves,
)
from sd_unlearn.report.cases import Case, cases_of
from sd_unlearn.report.formatting import shown, span
from sd_unlearn.report.headline import answers
from sd_unlearn.report.jinja import environment, script
from sd_unlearn.results import Row, read_results

HTML, MARKDOWN, TABLE, CERTIFICATE = "report.html", "report.md", "results.csv", "certificate.html"
LIMITS = (
    "The forgetting lives in the LoRA. At weight 0, or without the file, the base draws the concept as before: "
    "this is no safeguard against whoever holds the base.",
    "The judge is a program with errors of its own. It read the base's pictures too, so compare the two columns "
    "rather than trust one figure.",
    "Only the prompts listed were tried. Other words, pictures as input, or prompts searched on purpose may bring "
    "the concept back.",
    "An interval covers the chance of which pictures were drawn. It covers neither the judge's errors nor what another "
    "training seed would have given.",
    "The figures hold for this base, sampler and guidance; other bases and other LoRAs loaded beside this one were "
    "not tried.",
)
OF_MANY = (
    "A LoRA picked because it looks best among many here will look a little worse on new pictures; judge the one you "
    "picked again, with another --seed.",
)


def run(config: ReportConfig) -> Path:
    """Write report.html, report.md and results.csv (and certificate.html) into the folder, each whole or not at all.

    Returns:
        Path of report.html.

    Raises:
        UsageError: no --run, no such folder, no or damaged results.json or other file of the run, no face to blur.
        UnlearnError: when the folder cannot be written.
    """
    if config.run is None:
        raise UsageError("--run is missing: name the folder of a finished evaluation, e.g. --run runs/seven.")
    check_positive(config, ("max_pairs",))
    folder = Path(config.run)
    results = read_results(folder)
    seen = context(folder, results, config)
    html, text = environment(escape=True), environment(escape=False)
    # everything is rendered before the first file is replaced
    files = {
        TABLE: table_csv(results),
        MARKDOWN: text.get_template("report.md.j2").render(seen),
        HTML: html.get_template("report.html.j2").render(seen),
    }
    if config.certificate:
        found = certificate.context(folder, results, seen["cases"])
        files = {CERTIFICATE: html.get_template("certificate.html.j2").render(found), **files}
    for name, content in files.items():
        write_text(folder / name, content)
    return folder / HTML


def context(folder: Path, results: dict[str, Any], config: ReportConfig) -> dict[str, Any]:
    """Everything the templates show; nothing of it depends on when the report is written.

    Raises:
        UsageError: when a file of the run is there but damaged, or nothing but the base was judged.
    """
    cases = cases_of(results)
    if not cases:
        raise UsageError(f"{folder / run_folder.RESULTS} judges nothing but the base: there is nothing to report.")
    one = _one(folder, cases[0]) if len(cases) == 1 else None
    found = metric_cards.cards_of(results)
    training = one["training"] if one else {}
    base = {"name": "", "kind": "", "resolution": None, "sha256": "", **(training.get("base") or {}), **results["base"]}
    word, text = (cases[0].word, cases[0].verdict) if one else compare.headline(cases)
    return {
        "title": title(cases, one),
        "one": one,
        "cases": cases,
        "results": results,
        "base": base,
        "word": word,
        "verdict": text,
        "gone": formatting.GONE,
        "full": max([1.0, *(v for case in cases for v in _shares(case.lines))]),
        "summary": compare.summary(cases),
        "table": compare.table(results, cases),
        "differences": compare.differences(results),
        "charts": charts.charts(cases),
        "pictures": before_after.shelves(results, folder, config.max_pairs, config.blur_faces),
        # nobody looked for faces on the preview, so it is left out where they must be hidden
        "preview": _preview(folder) if one and not config.blur_faces else None,
        "cards": found,
        "anchors": metric_cards.anchors(found),
        "commands": one["commands"] if one else reproduce.commands_of_many(folder),
        "facts": reproduce.record(results, cases[0].about if one else {}, training),
        "limits": LIMITS if one else LIMITS + OF_MANY,
        "script": script(),
    }


def title(cases: list[Case], one: dict[str, Any] | None) -> str:
    """What was forgotten, in a line."""
    if one and one["concept"]:
        return f"Forgetting “{one['concept'].name}”"
    names = list(dict.fromkeys(case.concept["name"] for case in cases))
    return f"Forgetting {len(names)} concepts" if len(names) > 3 else "Forgetting " + formatting.listed(names)


def _one(folder: Path, case: Case) -> dict[str, Any]:
    """What the page of a single LoRA shows besides, from the files of its run where it lies among them.

    Raises:
        UsageError: a file that is there but damaged; names it.
    """
    training = _optional(folder / run_folder.TRAINING, read_json) or {}
    log = _optional(folder / run_folder.METRICS, read_jsonl) or []
    trained: Concept | None = _optional(folder / run_folder.CONCEPT, read_concept)
    concept = trained if trained and trained.slug == case.concept["slug"] else None  # it may be judged on another
    settings = _optional(folder / run_folder.CONFIG, lambda path: read_yaml(path, "--run")) or {}
    if not isinstance(training, dict):
        raise UsageError(f"{folder / run_folder.TRAINING} is not a JSON object. Run sd-unlearn train again.")
    about = case.about
    about["cost"] = about["cost"] or training.get("cost") or {}
    beta = about["training"].get("beta", training.get("beta"))
    beta = beta if isinstance(beta, int | float) and 0 < beta < 1 else None
    return {
        "concept": concept,
        "training": training,
        "settings": settings,
        "about": about,
        "beta": beta,
        "answers": answers(about, case.lines),
        "curves": training_curves.training_charts(log, beta),
        "commands": reproduce.commands(folder, about, concept),
    }


def _optional(path: Path, read: Any) -> Any:
    return read(path) if path.is_file() else None


def _shares(found: list[formatting.Line]) -> list[float]:
    """Every share and interval end, to scale the bars: a retention may exceed 1."""
    rows = [r for x in found for r in (x.base, x.lora) if r and formatting.is_rate(r)]
    return [v for r in rows for v in (r.value, r.high) if v is not None and math.isfinite(v)]


def _preview(folder: Path) -> dict[str, Any] | None:
    """The picture of the last step, by the number in its name."""
    found = {
        int(m[1]): p
        for p in (folder / run_folder.PREVIEW_DIR).glob("step-*.png")
        if (m := re.fullmatch(r"step-(\d+)", p.stem))
    }
    if not found:
        return None
    last = max(found)
    place = str(found[last].relative_to(folder))
    image = images.picture(folder, place, images.GRID, small=images.SMALL_GRID)
    return {**image, "step": last} if image else None


def format_table(results: dict[str, Any]) -> str:
    """The figures as an aligned table for a terminal, the verdict first. results: as read_results gives it."""
    cases = cases_of(results)
    if len(cases) == 1:
        found = cases[0].lines
        body: list[tuple[str, ...]]
        head: tuple[str, ...] = ("metric", "group", "base", "lora", "95 % interval", "n")
        body = [(x.metric, x.group, shown(x.base), shown(x.lora), span(x.main), x.n) for x in found]
        first = f"{cases[0].concept['slug']}: {cases[0].word}. {cases[0].verdict}"
    else:
        head = ("concept", "lora", "leakage", "95 % interval", "base", "retention", "95 % interval", "is it gone?")
        body = [_terminal_line(case) for case in cases]
        first = ". ".join(compare.headline(cases))
    skipped = [f"{len(results['skipped'])} picture(s) could not be judged; see skipped in results.json."]
    return "\n".join([first, "", *_aligned(head, body), *(skipped if results["skipped"] else [])])


def _terminal_line(case: Case) -> tuple[str, ...]:
    gone, kept = case.gone, case.pick("retention", "kept", "general", "alike")
    leak, stayed = gone.lora if gone else None, kept.lora if kept else None
    before = shown(gone.base) if gone else "–"
    return (case.concept["slug"], case.label, shown(leak), span(leak), before, shown(stayed), span(stayed), case.word)


def _aligned(head: tuple[str, ...], body: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]

    def line(row: tuple[str, ...]) -> str:
        left = (0, 1, 7)  # names and words; figures stand to the right
        return "  ".join(
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )

    return [line(head), "  ".join("-" * w for w in widths), *(line(row) for row in body)]


def table_csv(results: dict[str, Any]) -> str:
    """One line a row, every field of Row, values unrounded; an absent interval is an empty cell."""
    names = [f.name for f in dataclasses.fields(Row)]
    memory = io.StringIO()
    writer = csv.DictWriter(memory, names, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in results["rows"]:
        seeds = row.get("seeds")
        writer.writerow({**row, "seeds": " ".join(str(s) for s in seeds) if seeds else ""})
    return memory.getvalue()
