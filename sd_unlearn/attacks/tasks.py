"""What an `attack` command must do, in tasks that are done once and kept: one restart of an attack on a model.

A task's folder is named by everything that determines its images, and appears only when it is complete. So a second
command does only what is missing, and several processes share the tasks.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_unlearn.attacks.base import Attack, Outcome, Target
from sd_unlearn.data.concept import Concept
from sd_unlearn.evaluation.generate import ImageCache
from sd_unlearn.evaluation.loras import ModelVariant
from sd_unlearn.io.files import atomic_path, write_json
from sd_unlearn.io.reading import json_sha256, read_json
from sd_unlearn.models.base import Base
from sd_unlearn.models.kinds import KINDS
from sd_unlearn.results import FailedAttack

VERSION = 2  # of the attacks' code: raise it when an attack gives other images for the same settings
RECORD = "attack.json"


@dataclass(frozen=True)
class Model:
    """An attacked model: a base, with or without a LoRA."""

    id: str  # of its subject in results.json
    variant: ModelVariant
    concepts: tuple[str, ...]  # slugs of those to bring back
    load: Callable[[], Base]  # the base
    cache: ImageCache  # of the base


@dataclass(frozen=True)
class Task:
    """One restart of an attack on one model."""

    model: Model
    concept: Concept
    attack: Attack
    settings: Any
    restart: int
    folder: Path

    @property
    def done(self) -> bool:
        return (self.folder / RECORD).is_file()

    @property
    def failure(self) -> Path:
        """A file that says why the task failed, for the first process of the command that tried it."""
        return self.folder.with_name(f"{self.folder.name}.failed")

    @property
    def failed(self) -> bool:
        return not self.done and self.failure.is_file()

    @property
    def of_attack(self) -> tuple[str, str, str]:
        """The attack that it is a restart of: concept, subject, name."""
        return self.concept.slug, self.model.id, self.attack.name


@dataclass(frozen=True)
class Tried:
    """A stored outcome."""

    restart: int
    step: int
    paths: Sequence[Path]
    trials: Sequence[int]  # of each image
    found: str


def task_folder(
    model: Model, concept: Concept, attack: Attack, settings: Any, seed: int, images: str, restart: int
) -> Path:
    """Where a task's images are kept. images: identifies the attacker's images."""
    content: dict[str, Any] = {
        "version": VERSION,
        "concept": [concept.name, concept.label, concept.caption, concept.generic],
        "prompts": [prompt.text for prompt in (*concept.keep_prompts, *concept.prompts("held_out"))],
        "settings": dataclasses.asdict(settings),
        "seed": seed,
        "images": images,
    }
    if (attack.positives(settings) or attack.unrelated(settings)) and (corrected := _corrected(model.cache)):
        content["corrected"] = corrected
    folder = model.cache.folder(model.variant)
    return folder / "attacks" / f"{attack.name}-{json_sha256(content)[:12]}" / f"restart-{restart}"


def _corrected(cache: ImageCache) -> list[str]:
    """What was wrong in earlier versions of VERSION 2, in attacks that use images, with these settings only."""
    own_timesteps = KINDS[cache.base["kind"]].is_flow and cache.sampler.resolution
    is_fp16 = cache.suffix.endswith("-fp16")  # whose gradients were rounded to zero
    return ["timesteps"] * bool(own_timesteps) + ["gradients"] * is_fp16


def carry_out(task: Task, target: Target) -> None:
    """Run a task and write its folder."""
    started, outcomes = time.monotonic(), []
    with atomic_path(task.folder) as temporary:
        temporary.mkdir(parents=True, exist_ok=True)
        for number, outcome in enumerate(task.attack.run(target, task.settings, task.restart)):
            outcomes.append(_store(outcome, temporary, number))
        write_json(temporary / RECORD, {"seconds": time.monotonic() - started, "outcomes": outcomes})


def take_failures(tasks: Sequence[Task]) -> list[FailedAttack]:
    """The attacks that failed in this command. Removes their files, so that the next command tries them again."""
    found: dict[tuple[str, str, str], FailedAttack] = {}
    for task in tasks:
        if task.failed:
            why = task.failure.read_text(encoding="utf-8")
            found.setdefault(task.of_attack, FailedAttack(*task.of_attack, why))
    for task in tasks:
        task.failure.unlink(missing_ok=True)
    return list(found.values())


def _store(outcome: Outcome, folder: Path, number: int) -> dict[str, Any]:
    """Write the images of an outcome; returns its record."""
    names = [f"{number:02d}-{index:04d}.png" for index in range(len(outcome.images))]
    for name, image in zip(names, outcome.images, strict=True):
        image.save(folder / name, format="PNG")
    trials = list(range(len(names)) if outcome.trials is None else outcome.trials)
    return {"step": outcome.step, "found": outcome.found, "images": names, "trials": trials}


def read_task(task: Task) -> tuple[list[Tried], float]:
    """The stored outcomes of a finished task, and the seconds it took."""
    record = read_json(task.folder / RECORD)
    tried = [
        Tried(task.restart, o["step"], [task.folder / name for name in o["images"]], o["trials"], o["found"])
        for o in record["outcomes"]
    ]
    return tried, record["seconds"]
