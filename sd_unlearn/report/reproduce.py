"""How to reproduce a report: commands, seeds, versions and hashes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_unlearn.data.concept import Concept
from sd_unlearn.io import run_folder
from sd_unlearn.io.paths import public_name
from sd_unlearn.report.cases import Case
from sd_unlearn.results import Results

_OBJECTIVE = ("objective", "correction", "caption_mode", "beta", "beta_source")


def commands(folder: Path, case: Case, seed: int, concept: Concept | None) -> list[str]:
    """The commands that repeat a run from its own config and with the options of its evaluation.

    If the evaluation's options were not recorded, it is repeated with the same number of images.
    """
    trained, evaluated = (folder / run_folder.CONFIG).is_file(), (folder / run_folder.EVALUATION).is_file()
    if evaluated and not trained:
        return commands_of_evaluation(folder)
    shown, place = _shown(folder), _quote(_copy(folder))
    target = place if trained else _quote(shown)
    if evaluated:
        evaluate = (
            f"sd-unlearn evaluate --config {_quote(shown / run_folder.EVALUATION)} --run {place} --output_dir {place}"
        )
    else:
        evaluate = f"sd-unlearn evaluate --run {target}{_counts(case, concept)} --seed {seed}"
    config = _quote(shown / run_folder.CONFIG)
    train = [f"sd-unlearn train --config {config} --output_dir {place}"] if trained else []
    return [*train, evaluate, f"sd-unlearn report --run {target}"]


def _counts(case: Case, concept: Concept | None) -> str:
    """The options that repeat an evaluation's number of images."""
    counts = {(row.metric, row.group): row.n for row in case.rows}
    images, kept = counts.get(("leakage", "direct")), counts.get(("drift", "kept"))
    options = f" --num_images {images}" if images else ""
    prompts = len(concept.prompts("alike") + concept.prompts("general")) if concept else 0
    if kept and prompts and kept % prompts == 0:
        options += f" --num_keep_images {kept // prompts}"
    return options


def commands_of_evaluation(folder: Path) -> list[str]:
    """The commands that repeat an evaluation of several LoRAs from its own record."""
    if not (folder / run_folder.EVALUATION).is_file():
        return [f"sd-unlearn report --run {_quote(_shown(folder))}"]
    options = _shown(folder) / run_folder.EVALUATION
    copy = _quote(_copy(folder))
    return [
        f"sd-unlearn evaluate --config {_quote(options)} --output_dir {copy}",
        f"sd-unlearn report --run {copy}",
    ]


def _copy(folder: Path) -> Path:
    """The folder for the repeated run, as the page shows it."""
    name = f"{folder.resolve().name}-again"
    if folder.is_absolute():
        return Path(name)
    return folder.with_name(name) if folder.name.strip(".") else folder / ".." / name  # `--run .` has no name


def _quote(path: Path) -> str:
    return shlex.quote(path.as_posix())


def _shown(folder: Path) -> Path:
    """The run folder as the page shows it: an absolute path by its name, because the page may be published."""
    return Path(folder.name) if folder.is_absolute() else folder


def base_record(*records: Mapping[str, Any] | None) -> dict[str, str]:
    """Name, kind, resolution and SHA-256 of the base as texts, from records of which later ones win; "" if unknown."""
    merged = {key: value for record in records for key, value in (record or {}).items() if value is not None}
    return {key: public_name(str(merged.get(key, ""))) for key in ("name", "kind", "resolution", "sha256")}


def run_record(results: Results, case: Case | None, training: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Settings, seeds, versions and hashes as (label, text); what was not recorded is left out.

    case: the LoRA, if there is only one; training: its training.json, or empty.
    """
    settings = {**training, **(case.subject.training or {} if case else {})}
    ranges = {"training": _mapping(training, "seeds").get("train"), "evaluation": results.seeds.evaluate}
    seeds = {k: f"[{v[0]}, {v[1]})" for k, v in ranges.items() if isinstance(v, list | tuple) and len(v) == 2}
    given = ", ".join(map(str, results.seeds.seeds)) or None
    others = {s.sha256: s for s in results.compared if s.sha256} if case is None else {}
    entries = [
        ("Tier", results.tier),
        ("Sampler", _listed(results.sampler)),
        ("Objective", _listed({key: settings.get(key) for key in _OBJECTIVE})),
        ("LoRA", _listed({key: settings.get(key) for key in ("rank", "lora_alpha")})),
        ("Seeds", _listed(seeds | {"seed": given})),
        ("Base sha256", base_record(_mapping(training, "base"), results.base)["sha256"]),
        ("LoRA sha256", case.subject.sha256 if case else ""),
        *((f"{subject.name} sha256", subject.sha256) for subject in others.values()),
        *((f"{concept.name}, concept sha256", concept.sha256) for concept in results.concepts),
        ("Config sha256", training.get("config_sha256")),
        ("Commit", training.get("commit")),
        ("Versions", _listed({"sd-unlearn": results.version or None, **_mapping(training, "versions")})),
    ]
    return [(label, str(text)) for label, text in entries if text]


def _mapping(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A nested object of a record; empty if it is missing or something else."""
    value = record.get(key)
    return value if isinstance(value, Mapping) else {}


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
