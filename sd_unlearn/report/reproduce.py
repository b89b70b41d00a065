"""How to reproduce a report: commands, seeds, versions and hashes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sd_unlearn.io import run_folder
from sd_unlearn.io.paths import public_name
from sd_unlearn.io.reading import read_yaml
from sd_unlearn.report.cases import Case
from sd_unlearn.results import BASE, FLOOR, AttackEntry, Results

_OBJECTIVE = ("objective", "correction", "caption_mode", "beta", "beta_source")


def commands(folder: Path, attacks: Sequence[AttackEntry] = ()) -> list[str]:
    """The commands that repeat the training of a run, the evaluation in its folder and the attacks on it, into a copy.

    attacks: those of results.json. Attacks on anything but the folder's own run are not listed: which LoRAs `attack`
    was given is not recorded.
    """
    trained, copy = _train(folder), _quote(_copy(folder))
    found = list(trained)
    if (folder / run_folder.EVALUATION).is_file():
        run = f" --run {copy}" if trained else ""
        options = _quote(_shown(folder) / run_folder.EVALUATION)
        found.append(f"sd-unlearn evaluate --config {options}{run} --output_dir {copy}")
    if trained:
        found += [f"sd-unlearn attack --run {copy} {options}" for options in _options(attacks)]
    return [*found, f"sd-unlearn report --run {copy if found else _quote(_shown(folder))}"]


def _options(attacks: Sequence[AttackEntry]) -> list[str]:
    """The options of each command that carried out some of the attacks on a LoRA."""
    names: dict[tuple[str, int], dict[str, None]] = {}
    for entry in attacks:
        if entry.subject not in (BASE, FLOOR):
            names.setdefault((entry.budget, entry.seed), {})[entry.attack] = None
    return [f"--attacks {' '.join(of)} --budget {budget} --seed {seed}" for (budget, seed), of in names.items()]


def _train(folder: Path) -> list[str]:
    """The command that repeats the training, or the fusing of LoRAs, into a copy; none without the run's options."""
    if not (folder / run_folder.CONFIG).is_file():
        return []
    command = "fuse" if "lora" in read_yaml(folder / run_folder.CONFIG, "--run") else "train"
    config = _shown(folder) / run_folder.CONFIG
    return [f"sd-unlearn {command} --config {_quote(config)} --output_dir {_quote(_copy(folder))}"]


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
