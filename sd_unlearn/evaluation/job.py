"""What an evaluation is asked to do: LoRAs and folders of pictures, on concepts, checked before anything loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd_unlearn.config.checks import check_evaluate
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.data.concept import Concept, Prompt, load_concept
from sd_unlearn.data.prompt_sets import load_prompt_set
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation import fail_if
from sd_unlearn.evaluation.generate import Drawn
from sd_unlearn.evaluation.image_folders import Ready, read_ready, split_name
from sd_unlearn.evaluation.loras import Lora, names_of, open_lora, open_run
from sd_unlearn.evaluation.prompts import TIERS, Shot, Tier, counts_of, plan
from sd_unlearn.io.files import check_writable, read_yaml
from sd_unlearn.io.run_folder import CONFIG, POSITIVE
from sd_unlearn.metrics.registry import Asking, check
from sd_unlearn.models.base import recorded_source
from sd_unlearn.models.source import DIGITS, Source, find_base
from sd_unlearn.results import BASE

OUTPUT = Path("runs/evaluation")
_TRAINING = ("objective", "beta", "beta_source", "rank", "lora_alpha", "correction", "caption_mode", "target", "push")


@dataclass(frozen=True)
class Subject:
    """A LoRA at a strength, or a folder of pictures, and the concepts it is judged on."""

    id: str
    name: str
    concepts: tuple[str, ...]
    drawn: Drawn | None = None
    ready: dict[str, Ready] = field(default_factory=dict)  # by concept

    def describe(self) -> dict[str, Any]:
        """As results.json lists it."""
        if self.drawn is None or self.drawn.lora is None:
            return {
                "id": self.id,
                "name": self.name,
                "what": "images",
                "strength": None,
                "sha256": "",
                "forgets": None,
                "training": None,
                "cost": None,
            }
        lora = self.drawn.lora
        training = {k: lora.training.get(k) for k in _TRAINING} if lora.training else None
        cost = lora.training.get("cost")
        if training is not None:
            training["steps"] = (cost or {}).get("steps")
        return {
            "id": self.id,
            "name": self.name,
            "what": "lora",
            "strength": self.drawn.strength,
            "sha256": lora.sha256,
            "forgets": lora.concept.slug if lora.concept else None,
            "training": training,
            "cost": cost,
        }


@dataclass(frozen=True)
class Task:
    """An evaluation, checked as far as that is possible before anything heavy loads."""

    config: EvaluateConfig
    concepts: dict[str, Concept]
    subjects: list[Subject]
    plans: dict[str, list[Shot]]
    source: Source
    base_named: bool  # by the command, so that it may be another than the LoRAs were trained on
    tier: str
    output: Path
    loras: list[Lora]

    @property
    def draws(self) -> bool:
        """Whether the base is needed: for LoRAs, and for folders whose pictures are those of the plan."""
        return any(s.drawn or any(ready.planned for ready in s.ready.values()) for s in self.subjects)

    @property
    def zero_terminal_snr(self) -> bool:
        return any(lora.zero_terminal_snr for lora in self.loras)


def prepare(config: EvaluateConfig) -> Task:
    """What is to be judged on what, checked; nothing heavy is loaded.

    Raises:
        UsageError, UnlearnError
    """
    check_evaluate(config)
    for text in config.fail_if:
        fail_if.parse(text)
    loras = [open_run(config.run)] if config.run is not None else []
    loras += [open_lora(given) for given in config.lora]
    concepts = _concepts(config, loras)
    source, base_named = _source(config, loras, concepts)
    tier_name = config.tier or ("digits" if source.name == DIGITS else "quick")
    tier = counts_of(TIERS[tier_name], config.num_images, config.num_keep_images, config.groups or None)
    further = [Prompt(text) for text in load_prompt_set(config.prompt_set)] if config.prompt_set else []
    plans = {slug: plan(concept, tier, config.seed, further) for slug, concept in concepts.items()}
    for slug, shots in plans.items():
        if not shots:
            raise UsageError(f"No picture is asked for of {slug}: its file has no prompts in the groups asked for.")
    subjects = _subjects(config, loras, concepts, plans, tier)
    output = config.output_dir or (config.run if config.run and not config.lora and not config.images else OUTPUT)
    check_writable(output, "--output_dir")
    for concept in concepts.values():
        check(asking_of(config, concept, loras, tier_name))
    return Task(config, concepts, subjects, plans, source, base_named, tier_name, output, loras)


def _concepts(config: EvaluateConfig, loras: Sequence[Lora]) -> dict[str, Concept]:
    if not loras and not config.images:
        raise UsageError(
            "Nothing to judge: name a run folder (--run runs/seven), LoRAs (--lora A B) or folders of pictures "
            "(--images)."
        )
    if config.concept:
        return {concept.slug: concept for concept in map(load_concept, config.concept)}
    if config.images:
        raise UsageError("--images needs --concept: the pictures do not say what should be gone from them.")
    found: dict[str, Concept] = {}
    for lora in loras:
        if lora.concept is None:
            raise UsageError(f"--lora {lora.path} does not say what it forgets; name it with --concept.")
        known = found.setdefault(lora.concept.slug, lora.concept)
        if _evaluated(known) != _evaluated(lora.concept):
            raise UsageError(
                f"{lora.path} was trained with another concept file for {lora.concept.slug} than the LoRAs before it. "
                "Judge all on one file: --concept."
            )
    return found


def _evaluated(concept: Concept) -> tuple[Any, ...]:
    """What of a concept decides its evaluation."""
    return (
        concept.name,
        concept.caption,
        concept.generic,
        concept.kind,
        concept.label,
        concept.alternatives,
        concept.evaluate,
    )


def _source(config: EvaluateConfig, loras: Sequence[Lora], concepts: dict[str, Concept]) -> tuple[Source, bool]:
    """The base, and whether the command named it rather than the LoRAs."""
    if config.pretrained_model_name_or_path is not None:
        return find_base(config), True
    names = {lora.base_name: lora for lora in loras if lora.base_name}
    if len(names) > 1:
        raise UsageError(
            f"The LoRAs are of different bases ({', '.join(map(str, names))}); evaluate each base's by themselves, or "
            "name one with --pretrained_model_name_or_path."
        )
    if len({lora.zero_terminal_snr for lora in loras} - {None}) > 1:
        raise UsageError(
            "Some of the LoRAs were trained with --zero_terminal_snr and some without; evaluate them apart."
        )
    if records := [lora.training["base"] for lora in loras if lora.is_run]:
        return recorded_source(records[0], config.allow_pickle), False
    return find_base(config, next(iter(names), None) or next(iter(concepts.values())).base), False


def _subjects(
    config: EvaluateConfig,
    loras: Sequence[Lora],
    concepts: dict[str, Concept],
    plans: dict[str, list[Shot]],
    tier: Tier,
) -> list[Subject]:
    strengths = list(dict.fromkeys(config.strengths or tier.strengths))
    subjects = []
    for lora, name in zip(loras, names_of(loras), strict=True):
        mine = tuple(concepts) if config.concept or lora.concept is None else (lora.concept.slug,)
        for strength in strengths:
            identity = name if strengths == [1.0] else f"{name} at {strength:g}"
            subjects.append(Subject(identity, name, mine, Drawn(lora, float(strength))))
    for given in config.images:
        ready = {
            slug: read_ready(given, concept, plans[slug], alone=len(concepts) == 1)
            for slug, concept in concepts.items()
        }
        name = next(iter(ready.values())).name
        if name == BASE or name in {subject.id for subject in subjects}:
            raise UsageError(f"--images {given}: the name {name} is taken; give another, as in mine={given}.")
        subjects.append(Subject(name, name, tuple(concepts), None, ready))
    return subjects


def asking_of(config: EvaluateConfig, concept: Concept, loras: Sequence[Lora], tier: str) -> Asking:
    return Asking(concept, config, _reference(config, concept, loras), tier)


def _reference(config: EvaluateConfig, concept: Concept, loras: Sequence[Lora]) -> Path | None:
    """The folder of the person's pictures: named, or a run's own positives."""
    for given in config.reference:
        name, folder = split_name(given, "--reference")
        if name in (None, concept.slug, concept.name):
            return folder
    for lora in loras:
        if lora.is_run and lora.concept == concept and (lora.path / CONFIG).is_file():
            data = read_yaml(lora.path / CONFIG, "--run").get("data_dir")
            if data and (Path(data) / POSITIVE).is_dir():
                return Path(data) / POSITIVE
    return None
