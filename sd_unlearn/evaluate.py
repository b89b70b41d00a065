"""The same seeds with and without the LoRA -> results.json: what is gone, what stayed, how sure (docs/results.md)."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sd_unlearn import __version__
from sd_unlearn.base import Base, choose_precision, load_base, sampling_of, use_zero_terminal_snr
from sd_unlearn.checks import check_positive
from sd_unlearn.concept import Concept, Prompt, read_concept
from sd_unlearn.config import EvaluateConfig
from sd_unlearn.errors import UsageError
from sd_unlearn.metrics.judge import Judge, Reading, make_judge
from sd_unlearn.metrics.rows import ASKED, measure
from sd_unlearn.records import (
    CONCEPT,
    EVALUATE_SEEDS,
    IMAGE_DIR,
    RESULTS,
    TRAINING,
    Pair,
    image_seed,
    read_json,
    slugify,
    weights_sha256,
    write_json,
)
from sd_unlearn.render import ImageRequest, Sampler, draw_missing
from sd_unlearn.student import load_run

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Shot:
    """One prompt and seed of the evaluation and its file under a folder of images."""

    group: str
    prompt: Prompt
    seed: int

    @property
    def file_name(self) -> str:
        digest = hashlib.sha256(self.prompt.text.encode()).hexdigest()[:8]
        return f"{slugify(self.prompt.text)[:48]}-{digest}-{self.seed}.png"


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a run; writes results.json into its folder and returns it. Images already drawn are not drawn again.

    Raises:
        UsageError: no such run, a run of another base, values that cannot be meant.
    """
    folder, training, concept = open_run(config)
    name = training["base"]["name"]
    judge = make_judge(concept, config.clip_model, config.clip_pretrained)
    shots = plan(concept, config)
    default = sampling_of(name)
    sampler = Sampler(default.steps, default.guidance_scale, default.batch_size, None)
    images = _draw_both(config, folder, training, name, shots, sampler)
    readings = {subject: _read(judge, places) for subject, places in images.items()}
    groups = np.array([shot.group for shot in shots])
    expected = [shot.prompt.expect for shot in shots]
    rows = measure(concept, judge.name, groups, expected, readings["base"], readings["lora"])
    settings = ("beta", "beta_source", "rank", "lora_alpha", "correction", "caption_mode", "target", "push")
    results = {
        "schema_version": SCHEMA_VERSION, "concept": concept.slug, "caption": concept.caption,
        "generic": concept.generic, "kind": concept.kind, "base": training["base"],
        "run": folder.name, "adapter_sha256": weights_sha256(folder),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()), "version": __version__,
        "sampler": {"name": "DDIM", "steps": sampler.steps, "guidance_scale": sampler.guidance_scale,
                    "zero_terminal_snr": training.get("zero_terminal_snr", False)},
        "seeds": {"evaluate": list(EVALUATE_SEEDS), "seed": config.seed}, "detector": judge.name,
        "cost": training["cost"],
        "training": {k: training[k] for k in settings} | {"steps": training["cost"]["steps"]},
        "rows": [asdict(row) for row in rows],
        "pairs": [asdict(p) for p in pick_pairs(config, folder, concept, shots, images, readings)], "skipped": [],
    }  # fmt: skip
    write_json(folder / RESULTS, results)
    return results


def open_run(config: EvaluateConfig) -> tuple[Path, dict[str, Any], Concept]:
    """The run's folder, its training record and its concept, checked before a model loads.

    Raises:
        UsageError
    """
    if config.run is None:
        raise UsageError("--run is missing: name a run folder, e.g. --run runs/seven.")
    if not config.run.is_dir():
        raise UsageError(f"--run {config.run} is no folder. Train first: sd-unlearn train --concept NAME.")
    if not (config.run / TRAINING).is_file():
        raise UsageError(
            f"--run {config.run} holds no finished training ({TRAINING} is missing). Run sd-unlearn train first."
        )
    check_positive(config, ("num_images", "num_keep_images"))
    return config.run, read_json(config.run / TRAINING), read_concept(config.run / CONCEPT)


def plan(concept: Concept, config: EvaluateConfig) -> list[Shot]:
    """Every picture to draw: num_images a concept group, num_keep_images a prompt that must stay."""
    shots = []
    for group in ASKED:
        prompts = [Prompt(concept.generic)] if group == "generic" else concept.prompts(group)
        if not prompts:
            continue
        for i in range(config.num_images):  # shared out evenly over the group's prompts
            prompt = prompts[i % len(prompts)]
            shots.append(Shot(group, prompt, image_seed(EVALUATE_SEEDS, config.seed, prompt.text, i // len(prompts))))
    for group in ("alike", "general"):
        for prompt in concept.prompts(group):
            for i in range(config.num_keep_images):
                shots.append(Shot(group, prompt, image_seed(EVALUATE_SEEDS, config.seed, prompt.text, i)))
    return shots


def _draw_both(
    config: EvaluateConfig, folder: Path, training: dict[str, Any], name: str, shots: list[Shot], sampler: Sampler
) -> dict[str, list[Path]]:
    """Draw what is missing with and without the LoRA; base images are kept in the cache that all runs share.

    Both are drawn with the schedule that the LoRA was trained on.
    """
    zero_snr = training.get("zero_terminal_snr", False)
    setting = f"{sampler.steps}-steps-guidance-{sampler.guidance_scale:g}" + "-zero-snr" * zero_snr
    places = {
        "base": config.cache_dir / f"{slugify(name)}-{training['base']['sha256'][:12]}" / setting,
        "lora": folder / IMAGE_DIR / f"lora-{weights_sha256(folder)[:12]}" / setting,
    }
    loaded: list[Base] = []

    def get_base() -> Base:
        if not loaded:
            loaded.append(load_base(name, choose_precision("no")))
            if loaded[0].sha256 != training["base"]["sha256"]:
                raise UsageError(
                    f"--run {folder} was trained on another version of {name}: its weights have changed since."
                )
            if zero_snr:
                use_zero_terminal_snr(loaded[0])
        return loaded[0]

    attached: list[bool] = []

    def get_lora() -> Base:
        base = get_base()
        if not attached:
            load_run(base, folder)
            attached.append(True)
        return base

    ordered = sorted(set(shots), key=lambda s: (s.prompt.text, shots.index(s)))
    for subject, loader in (("base", get_base), ("lora", get_lora)):
        requests = [ImageRequest(places[subject] / s.file_name, s.prompt.text, s.seed) for s in ordered]
        draw_missing(loader, requests, sampler, f"draw {subject}")
    return {subject: [place / s.file_name for s in shots] for subject, place in places.items()}


def _read(judge: Judge, paths: list[Path]) -> Reading:
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    return judge.read(images)


def pick_pairs(
    config: EvaluateConfig, folder: Path, concept: Concept, shots: list[Shot], images: dict[str, list[Path]],
    readings: dict[str, Reading],
) -> list[Pair]:  # fmt: skip
    """Pictures for the report: some of each group, spread over its prompts, and up to as many further leaks."""
    label = concept.label or concept.name
    leaks = readings["lora"].shows(label)
    pairs: list[Pair] = []
    shown = folder / IMAGE_DIR
    for group in (*ASKED, "alike", "general"):
        members = [i for i, s in enumerate(shots) if s.group == group]
        stride = max(1, len(members) // max(1, config.num_pairs))
        chosen = members[::stride][: config.num_pairs]
        if group in ASKED:
            chosen += [i for i in members if leaks[i] and i not in chosen][: config.num_pairs]
        for i in chosen:
            names = {}
            for subject, paths in images.items():
                target = shown / subject / paths[i].name
                target.parent.mkdir(parents=True, exist_ok=True)
                _link(paths[i], target)
                names[subject] = str(target.relative_to(folder))
            shot = shots[i]
            pairs.append(Pair(
                shot.prompt.text, group, shot.seed, names["base"], names["lora"], " ".join(shot.prompt.expect),
                readings["base"].words(i), readings["lora"].words(i), bool(leaks[i]) and group in ASKED,
            ))  # fmt: skip
    return pairs


def _link(source: Path, target: Path) -> None:
    """A copy under the run folder, so that a run can be moved; written whole."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(target)
