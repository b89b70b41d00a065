"""How to make the figures again: commands, seeds, versions and hashes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from sd_unlearn.data.concept import Concept
from sd_unlearn.io import run_folder

_OBJECTIVE = ("objective", "correction", "caption_mode", "beta", "beta_source")


def commands(folder: Path, about: dict[str, Any], concept: Concept | None) -> list[str]:
    """The commands that make this run again, from its own config and as its evaluation was asked. about: results.view.

    An evaluation that does not say what it was asked is repeated with as many pictures.
    """
    config, asking, again = folder / run_folder.CONFIG, folder / run_folder.EVALUATION, _again(folder)
    place = _quoted(again)
    if asking.is_file() and not config.is_file():
        return commands_of_many(folder)
    target = again if config.is_file() else folder
    train = f"sd-unlearn train --config {_quoted(config)} --output_dir {_quoted(again)}"
    counts = {(r["metric"], r["group"]): r["n"] for r in about["rows"]}
    asked, kept = counts.get(("leakage", "direct")), counts.get(("drift", "kept"))
    prompts = len(concept.prompts("alike") + concept.prompts("general")) if concept else 0
    evaluate = f"sd-unlearn evaluate --run {_quoted(target)}" + (f" --num_images {asked}" if asked else "")
    if kept and prompts and kept % prompts == 0:
        evaluate += f" --num_keep_images {kept // prompts}"
    evaluate += f" --seed {_first(about['seeds'].get('seeds'))}"
    if asking.is_file():
        evaluate = f"sd-unlearn evaluate --config {_quoted(asking)} --run {place} --output_dir {place}"
    return [*([train] if config.is_file() else []), evaluate, f"sd-unlearn report --run {_quoted(target)}"]


def commands_of_many(folder: Path) -> list[str]:
    """The same for an evaluation of several LoRAs, which says itself what it was asked."""
    settings = folder / run_folder.EVALUATION
    if not settings.is_file():
        return [f"sd-unlearn report --run {_quoted(folder)}"]
    again = _quoted(_again(folder))
    return [
        f"sd-unlearn evaluate --config {_quoted(settings)} --output_dir {again}",
        f"sd-unlearn report --run {again}",
    ]


def _again(folder: Path) -> Path:
    name = f"{folder.resolve().name}-again"
    return folder.with_name(name) if folder.name.strip(".") else folder / ".." / name  # --run . has no name of its own


def _first(seeds: Any) -> Any:
    return seeds[0] if isinstance(seeds, list) and seeds else 0


def _quoted(path: Path) -> str:
    return shlex.quote(path.as_posix())


def record(results: dict[str, Any], about: dict[str, Any], training: dict[str, Any]) -> list[tuple[str, str]]:
    """What was run with which seeds and versions, as label and text; what was not recorded is left out.

    about: results.view of the only LoRA, or {} where there are several; training: its training.json, or {}.
    """
    made = {**training, **about.get("training", {})}
    base = {**(training.get("base") or {}), **results["base"]}
    seeds = {"training": (training.get("seeds") or {}).get("train"), "evaluation": results["seeds"].get("evaluate")}
    ranges = {k: f"[{v[0]}, {v[1]})" for k, v in seeds.items() if isinstance(v, list) and len(v) == 2}
    given = results["seeds"].get("seeds")
    number = ", ".join(str(seed) for seed in given) if isinstance(given, list) and given else None
    subjects = [] if about else [s for s in results["subjects"] if s.get("sha256") and s["what"] != "base"]
    entries = [
        ("Tier", results["tier"]),
        ("Sampler", _listed(results["sampler"])),
        ("Objective", _listed({k: made.get(k) for k in _OBJECTIVE})),
        ("LoRA", _listed({k: made.get(k) for k in ("rank", "lora_alpha")})),
        ("Seeds", _listed(ranges | {"seed": number})),
        ("Base sha256", base.get("sha256")),
        ("LoRA sha256", about.get("adapter_sha256")),
        *((f"{s['name']} sha256", s["sha256"]) for s in {s["sha256"]: s for s in subjects}.values()),
        *((f"{c['name']}, concept sha256", c["sha256"]) for c in results["concepts"] if c.get("sha256")),
        ("Config sha256", training.get("config_sha256")),
        ("Commit", training.get("commit")),
        ("Versions", _listed({"sd-unlearn": results["version"] or None, **(training.get("versions") or {})})),
    ]
    return [(label, str(text)) for label, text in entries if text]


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items() if v is not None)
