"""Report: results.json -> report.html (one file, pictures inside), report.md and results.csv. Imports no torch."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import math
import re
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sd_unlearn import records
from sd_unlearn.checks import read_yaml
from sd_unlearn.concept import Concept, read_concept
from sd_unlearn.config import ReportConfig
from sd_unlearn.errors import UsageError
from sd_unlearn.templates import figures, pictures
from sd_unlearn.templates.figures import GROUPS, METRICS, lines, shown, span, verdict

SCHEMA_VERSION = 1
HTML, MARKDOWN, TABLE = "report.html", "report.md", "results.csv"
TEMPLATES = Path(__file__).parent / "templates"
REQUIRED = {"concept": str, "caption": str, "generic": str, "base": dict, "rows": list}
OPTIONAL = {"pairs": list, "skipped": list, "cost": dict, "training": dict, "sampler": dict, "seeds": dict}
TEXTS = ("created", "run", "version", "detector", "adapter_sha256")
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


def read_results(path: Path) -> dict[str, Any]:
    """The checked content of a results.json, given itself or its run folder.

    Raises:
        UsageError: missing, not JSON, another schema_version, or a key or row that is not as it must be.
    """
    file = path if path.name == records.RESULTS else path / records.RESULTS
    if not file.parent.is_dir():
        raise UsageError(f"--run {file.parent} does not exist. Give the run folder of a finished evaluation.")
    if not file.is_file():
        raise UsageError(
            f"--run {file.parent} has no {records.RESULTS}. Run sd-unlearn evaluate --run {file.parent} first."
        )
    results, again = records.read_json(file), f"Run sd-unlearn evaluate --run {file.parent} again."
    version = results.get("schema_version") if isinstance(results, dict) else None
    if version != SCHEMA_VERSION:
        raise UsageError(f"{file}: schema_version is {version!r}, this version reads {SCHEMA_VERSION}. {again}")
    for key in TEXTS:
        results[key] = str(results.get(key) or "")
    if why := _shape_fault(results):
        raise UsageError(f"{file}: {why}. {again}")
    return results


def _shape_fault(results: dict[str, Any]) -> str | None:
    """What is wrong with the keys, rows or pairs, or None; fills in the optional keys."""
    for key, kind in REQUIRED.items():
        if not isinstance(results.get(key), kind):
            return f'"{key}" is missing or not a {kind.__name__}'
    for key, kind in OPTIONAL.items():
        if not isinstance(results.setdefault(key, kind()), kind):
            return f'"{key}" is not a {kind.__name__}'
    faults = [(f"{key}[{i}]", fault(item)) for key, fault in FAULTS for i, item in enumerate(results[key])]
    return next((f"{where} {why}" for where, why in faults if why), None)


def _row_fault(row: Any) -> str | None:
    if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in ("metric", "group", "subject")):
        return "needs metric, group and subject"
    if row["subject"] not in ("base", "lora"):
        return f'has subject "{row["subject"]}"; it must be base or lora'
    if not all(isinstance(row.get(k), int | float | None) for k in ("value", "low", "high")) or "value" not in row:
        return "needs a number as value (and numbers or null as low and high)"
    return None if isinstance(row.get("n"), int) else "needs a whole number as n"


def _pair_fault(pair: Any) -> str | None:
    good = isinstance(pair, dict) and all(isinstance(pair.get(k), str) for k in ("prompt", "group", "base", "lora"))
    return None if good else "needs prompt, group, base and lora"


FAULTS = (("rows", _row_fault), ("pairs", _pair_fault))


def format_table(results: dict[str, Any]) -> str:
    """The figures as an aligned table for a terminal, the verdict first."""
    head = ("metric", "group", "base", "lora", "95 % interval", "n")
    body = [(x.metric, x.group, shown(x.base), shown(x.lora), span(x.main), x.n) for x in lines(results)]
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    table = [
        "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in [head, *body]
    ]
    table.insert(1, "  ".join("-" * w for w in widths))
    word, text = verdict(results)
    skipped = [f"{len(results['skipped'])} picture(s) could not be judged; see skipped in results.json."] * bool(
        results.get("skipped")
    )
    return "\n".join([f"{results['concept']}: {word}. {text}", "", *table, *skipped])


def run(config: ReportConfig) -> Path:
    """Write report.html, report.md and results.csv into the run folder, each whole or not at all.

    Returns:
        Path of report.html.

    Raises:
        UsageError: no --run, no such folder, no or damaged results.json or other file of the run.
        UnlearnError: when the folder cannot be written.
    """
    if config.run is None:
        raise UsageError("--run is missing: name the run folder of a finished evaluation, e.g. --run runs/seven.")
    folder = Path(config.run)
    results = read_results(folder)
    seen = context(folder, results)
    page = environment(escape=True).get_template("report.html.j2").render(seen)
    text = environment(escape=False).get_template("report.md.j2").render(seen)
    records.write_text(folder / TABLE, table_csv(results))  # everything is rendered before the first file is replaced
    records.write_text(folder / MARKDOWN, text)
    records.write_text(folder / HTML, page)
    return folder / HTML


def context(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Everything the templates show; nothing of it depends on when the report is written.

    Raises:
        UsageError: when a file of the run is there but damaged; names it.
    """
    training = _optional(folder / records.TRAINING, records.read_json) or {}
    log = _optional(folder / records.METRICS, records.read_jsonl) or []
    concept: Concept | None = _optional(folder / records.CONCEPT, read_concept)
    settings = _optional(folder / records.CONFIG, lambda path: read_yaml(path, "--run")) or {}
    if not isinstance(training, dict):
        raise UsageError(f"{folder / records.TRAINING} is not a JSON object. Run sd-unlearn train again.")
    results["cost"] = results["cost"] or training.get("cost") or {}
    found = lines(results)
    beta = results["training"].get("beta", training.get("beta"))
    beta = beta if isinstance(beta, int | float) and 0 < beta < 1 else None
    base = {"name": "", "kind": "", "resolution": None, "sha256": "", **(training.get("base") or {}), **results["base"]}
    word, text = verdict(results)
    return {
        "name": concept.name if concept else results["concept"],
        "concept": concept,
        "results": results,
        "training": training,
        "settings": settings,
        "base": base,
        "word": word,
        "verdict": text,
        "answers": figures.answers(results, found),
        "lines": found,
        "full": max([1.0, *_shares(found)]),
        "pair_groups": pictures.pair_groups(results, folder),
        "curves": _curves(log, beta),
        "beta": beta,
        "preview": _preview(folder),
        "commands": commands(folder, results, concept),
        "facts": record(results, training),
        "limits": LIMITS,
        "METRICS": METRICS,
        "GROUPS": GROUPS,
        "gone": figures.GONE,
    }


def _optional(path: Path, read: Any) -> Any:
    return read(path) if path.is_file() else None


def _shares(found: list[figures.Line]) -> list[float]:
    """Every share and interval end, to scale the bars: a retention may exceed 1."""
    rows = [r for x in found for r in (x.base, x.lora) if r and figures.is_rate(r)]
    return [v for r in rows for v in (r.value, r.high) if v is not None and math.isfinite(v)]


def _curves(log: list[dict[str, Any]], beta: float | None) -> list[dict[str, Any]]:
    risk = pictures.chart(log, ("mean_u", "mean_s"))
    ratio = pictures.chart(log, ("ratio",), target=1 / beta if beta else None)
    made = [
        ("Mean loss", "loss of unlabeled (mean_u) and concept pictures (mean_s)", risk),
        ("Ratio", "mean_s over mean_u", ratio),
    ]
    return [{"title": title, "about": about, **drawn} for title, about, drawn in made if drawn]


def _preview(folder: Path) -> dict[str, Any] | None:
    """The picture of the last step, by the number in its name."""
    found = {
        int(m[1]): p
        for p in (folder / records.PREVIEW_DIR).glob("step-*.png")
        if (m := re.fullmatch(r"step-(\d+)", p.stem))
    }
    if not found:
        return None
    last = max(found)
    image = pictures.picture(folder, str(found[last].relative_to(folder)), pictures.GRID, pictures.SMALL_GRID)
    return {**image, "step": last} if image else None


def commands(folder: Path, results: dict[str, Any], concept: Concept | None) -> list[str]:
    """The commands that make this run again, from its own config and with as many pictures."""
    config, name = folder / records.CONFIG, f"{folder.resolve().name}-again"
    again = folder.with_name(name) if folder.name.strip(".") else folder / ".." / name  # --run . has no name of its own
    target = again if config.is_file() else folder
    train = f"sd-unlearn train --config {_quoted(config)} --output_dir {_quoted(again)}"
    counts = {(r["metric"], r["group"]): r["n"] for r in results["rows"]}
    asked, kept = counts.get(("leakage", "direct")), counts.get(("drift", "kept"))
    prompts = len(concept.prompts("alike") + concept.prompts("general")) if concept else 0
    evaluate = f"sd-unlearn evaluate --run {_quoted(target)}" + (f" --num_images {asked}" if asked else "")
    if kept and prompts and kept % prompts == 0:
        evaluate += f" --num_keep_images {kept // prompts}"
    evaluate += f" --seed {results['seeds'].get('seed', 0)}"
    return [*([train] if config.is_file() else []), evaluate, f"sd-unlearn report --run {_quoted(target)}"]


def _quoted(path: Path) -> str:
    return shlex.quote(path.as_posix())


def record(results: dict[str, Any], training: dict[str, Any]) -> list[tuple[str, str]]:
    """What was run with which seeds and versions, as label and text; what was not recorded is left out."""
    made = {**training, **results["training"]}
    base = {**(training.get("base") or {}), **results["base"]}
    seeds = {"training": (training.get("seeds") or {}).get("train"), "evaluation": results["seeds"].get("evaluate")}
    entries = [
        ("Sampler", _listed(results["sampler"])),
        ("Objective", _listed({k: made.get(k) for k in ("correction", "caption_mode", "beta", "beta_source")})),
        ("LoRA", _listed({k: made.get(k) for k in ("rank", "lora_alpha")})),
        (
            "Seeds",
            _listed(
                {k: f"[{v[0]}, {v[1]})" for k, v in seeds.items() if isinstance(v, list) and len(v) == 2}
                | {"seed": results["seeds"].get("seed")}
            ),
        ),
        ("Judge", results.get("detector")),
        ("Base sha256", base.get("sha256")),
        ("LoRA sha256", results.get("adapter_sha256")),
        ("Config sha256", training.get("config_sha256")),
        ("Commit", training.get("commit")),
        ("Versions", _listed({"sd-unlearn": results.get("version"), **(training.get("versions") or {})})),
    ]
    return [(label, str(text)) for label, text in entries if text]


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items() if v is not None)


def table_csv(results: dict[str, Any]) -> str:
    """One line a row, every field of records.Row, values unrounded; an absent interval is an empty cell."""
    names = [f.name for f in dataclasses.fields(records.Row)]
    memory = io.StringIO()
    writer = csv.DictWriter(memory, names, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(results["rows"])
    return memory.getvalue()


def environment(escape: bool) -> Environment:
    """Jinja with the report's filters; in HTML every text is escaped, in Markdown the templates do it with `md`."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(
        shown=shown, span=span, is_rate=figures.is_rate, md=_markdown, unbroken=_unbroken, opened=_opened
    )
    made.tests["finite"] = lambda value: value is not None and math.isfinite(value)
    return made


def _markdown(text: Any) -> str:
    """Any text as one inert piece of a Markdown line or table cell."""
    plain = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", plain)


def _unbroken(text: Any) -> Markup:
    """A number stays on one line with its unit, and an interval with both its ends."""
    glue = r"(?<=\d) (?=%|s\b|h\b|min\b|MB\b|GB\b)|(?<=n) (?==)|(?<==) (?=\d)"
    joined = re.sub(glue, "\u00a0", str(Markup.escape(text)))
    return Markup(re.sub(r"(?<=\d)–(?=\d)", "\u2060–\u2060", joined))


def _opened(text: str) -> str:
    """A sentence with its first letter large and every other one as it was."""
    return text[:1].upper() + text[1:]
