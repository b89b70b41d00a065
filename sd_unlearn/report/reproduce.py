"""How to reproduce a report: commands, seeds, versions and hashes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_unlearn.data.concept import Concept
from sd_unlearn.io import run_folder
from sd_unlearn.io.paths import public_name
from sd_unlearn.io.reading import read_yaml
from sd_unlearn.report.cases import Case
from sd_unlearn.results import Results

_OBJECTIVE = ("objective", "correction", "caption_mode", "beta", "beta_source")


def commands(folder: Path, case: Case, seed: int, concept: Concept | None) -> list[str]:
    """The commands that repeat a run from its own config and with the options of its evaluation.

    If the evaluation's options were not recorded, it is repeated with the same number of images.
    """
    if (folder / run_folder.EVALUATION).is_file():
        return commands_of_evaluation(folder)
    trained = _train(folder)
    target = _quote(_copy(folder) if trained else _shown(folder))
    evaluate = f"sd-unlearn evaluate --run {target}{_counts(case, concept)} --seed {seed}"
    return [*trained, evaluate, f"sd-unlearn report --run {target}"]


def _train(folder: Path) -> list[str]:
    """The command that repeats the training, or the fusing of LoRAs, into a copy; none without the run's options."""
    if not (folder / run_folder.CONFIG).is_file():
        return []
    command = "fuse" if "lora" in read_yaml(folder / run_folder.CONFIG, "--run") else "train"
    config = _shown(folder) / run_folder.CONFIG
    return [f"sd-unlearn {command} --config {_quote(config)} --output_dir {_quote(_copy(folder))}"]


def _counts(case: Case, concept: Concept | None) -> str:
    """The options that repeat an evaluation's number of images."""
    counts = {(row.metric, row.group): row.n for row in case.rows}
    images, kept = counts.get(("leakage", "direct")), counts.get(("drift", "kept"))
    options = f" --num_images {images}" if images else ""
    prompts = len({p.text for p in concept.prompts("alike") + concept.prompts("general")}) if concept else 0
    if kept and prompts and kept % prompts == 0:
        options += f" --num_keep_images {kept // prompts}"
    return options


def commands_of_evaluation(folder: Path) -> list[str]:
    """The commands that repeat an evaluation from its own record, and the training of the run that it evaluated."""
    if not (folder / run_folder.EVALUATION).is_file():
        return [f"sd-unlearn report --run {_quote(_shown(folder))}"]
    options, copy, trained = _shown(folder) / run_folder.EVALUATION, _quote(_copy(folder)), _train(folder)
    run = f" --run {copy}" if trained else ""
    return [
        *trained,
        f"sd-unlearn evaluate --config {_quote(options)}{run} --output_dir {copy}",
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
