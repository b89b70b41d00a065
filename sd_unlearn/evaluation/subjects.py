"""What an evaluation compares with the base: LoRAs at strengths, safety guidance, folders of existing images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol, TypeVar

from sd_unlearn.choices import SafetyPreset
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.data.concept import Concept
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation.image_folders import ImageFolder, read_image_folder
from sd_unlearn.evaluation.loras import Lora, ModelVariant, unique_names
from sd_unlearn.evaluation.prompts import ImageSpec, Tier
from sd_unlearn.models.safe_guidance import PRESETS, Safety, check_safe_guidance
from sd_unlearn.models.sampling import resolve_sampler
from sd_unlearn.models.source import Source
from sd_unlearn.results import BASE, FLOOR

_TRAINING = ("objective", "beta", "beta_source", "rank", "lora_alpha", "correction", "caption_mode", "target", "push")


@dataclass(frozen=True)
class Subject:
    """What is compared with the base: a LoRA at a strength, safety guidance, or a folder of existing images."""

    id: str
    name: str
    concepts: tuple[str, ...]  # slugs of the concepts it is evaluated on
    variant: ModelVariant | None = None  # None: existing images
    folders: dict[str, ImageFolder] = field(default_factory=dict)  # of existing images, by concept

    @property
    def strength(self) -> float | None:
        """Of a LoRA."""
        return self.variant.strength if self.variant and self.variant.lora else None

    def describe(self) -> dict[str, Any]:
        """Its entry in results.json."""
        entry: dict[str, Any] = {"id": self.id, "name": self.name}
        if self.variant is None or self.variant.lora is None:
            empty = {"strength": None, "sha256": "", "forgets": None, "training": None, "cost": None}
            entry |= {"what": "images", **empty}
            if self.variant and self.variant.safety:
                entry |= {"forgets": self.concepts[0], "sld": self.variant.safety.describe()}
            return entry
        lora = self.variant.lora
        training = {k: lora.training.get(k) for k in _TRAINING} if lora.training else None
        cost = lora.training.get("cost")
        if training is not None:
            training["steps"] = (cost or {}).get("steps")
        slugs = [concept.slug for concept in lora.concepts]
        return {
            **entry,
            "what": "lora",
            "strength": self.variant.strength,
            "sha256": lora.sha256,
            "forgets": slugs[0] if len(slugs) == 1 else None,
            **({"forgets_together": slugs} if len(slugs) > 1 else {}),
            "training": training,
            "cost": cost,
        }


class _AtStrength(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def strength(self) -> float | None: ...


_S = TypeVar("_S", bound=_AtStrength)


def main_subjects(subjects: Iterable[_S]) -> list[_S]:
    """What is compared with each other and checked: each LoRA at strength 1, else at its highest, and all others."""
    found, strengths = list(subjects), dict[str, list[float]]()
    for subject in found:
        if subject.strength is not None:
            strengths.setdefault(subject.name, []).append(subject.strength)
    main = {name: 1 if 1 in values else max(values) for name, values in strengths.items()}
    return [subject for subject in found if subject.strength in (None, main.get(subject.name))]


def resolve_subjects(
    config: EvaluateConfig,
    loras: Sequence[Lora],
    concepts: dict[str, Concept],
    plans: dict[str, list[ImageSpec]],
    tier: Tier,
) -> list[Subject]:
    """The subjects of an evaluation.

    Raises:
        UsageError: an image folder does not fit, or a name is used twice.
    """
    strengths = list(dict.fromkeys(config.strengths or tier.strengths))
    subjects = []
    for lora, name in zip(loras, unique_names(loras), strict=True):
        slugs = tuple(concepts) if config.concept or not lora.concepts else tuple(c.slug for c in lora.concepts)
        for strength in strengths:
            subject_id = name if strengths == [1.0] else f"{name} at {strength:g}"
            subjects.append(Subject(subject_id, name, slugs, ModelVariant(lora, float(strength))))
    for subject in _safe_subjects(config.sld, concepts):
        if subject.id in {other.id for other in subjects}:
            raise UsageError(f"--sld: a LoRA is called {subject.id}, too. Rename its folder or file.")
        subjects.append(subject)
    for given in config.images:
        folders = {
            slug: read_image_folder(given, concept, plans[slug], only_concept=len(concepts) == 1)
            for slug, concept in concepts.items()
        }
        name = next(iter(folders.values())).name
        if name in (BASE, FLOOR, *(subject.id for subject in subjects)):
            folder = next(iter(folders.values())).folder
            raise UsageError(f"--images {given}: the name {name} is already used. Give another, as in mine={folder}.")
        subjects.append(Subject(name, name, tuple(concepts), None, folders))
    return subjects


def _safe_subjects(presets: Sequence[SafetyPreset], concepts: dict[str, Concept]) -> list[Subject]:
    """The base with safety guidance away from each concept: a subject for each preset and concept."""
    subjects = []
    for preset, (slug, concept) in product(dict.fromkeys(presets), concepts.items()):
        name = f"sld-{preset}" if len(concepts) == 1 else f"sld-{preset} {slug}"
        safety = Safety(preset, concept.name, PRESETS[preset])
        subjects.append(Subject(name, name, (slug,), ModelVariant(safety=safety)))
    return subjects


def check_guidance(config: EvaluateConfig, source: Source) -> None:
    """Refuse safety guidance that cannot act: without classifier-free guidance, or with warm-up until the last step.

    Raises:
        UsageError
    """
    if config.sld and source.kind:
        check_safe_guidance(source.kind, source.name)
    sampler = resolve_sampler(config, source)
    if config.sld and sampler.guidance_scale <= 1:
        raise UsageError(
            f"--sld {' '.join(config.sld)} needs --guidance_scale above 1; it is {sampler.guidance_scale:g}."
        )
    for preset in config.sld:
        warmup = PRESETS[preset].warmup_steps
        if warmup >= sampler.steps:
            raise UsageError(
                f"--sld {preset} only acts after {warmup} sampling steps, and --num_inference_steps is "
                f"{sampler.steps}. Give more steps, or a preset that acts earlier (max acts at once)."
            )
