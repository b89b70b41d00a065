"""The plan of an evaluation: which prompts, how many images of each, with which seeds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sd_unlearn.config.options import MAX_IMAGES
from sd_unlearn.data.concept import Concept, Prompt
from sd_unlearn.errors import UsageError, suggest
from sd_unlearn.io.files import write_text
from sd_unlearn.io.paths import slugify
from sd_unlearn.io.reading import read_jsonl
from sd_unlearn.metrics.base import CONCEPT_GROUPS, KEEP_GROUPS, PromptedImages
from sd_unlearn.models.source import DIGITS, DIGITS_SD3, EMOJI
from sd_unlearn.seeds import EVALUATE_SEEDS, image_seed

GROUPS = (*CONCEPT_GROUPS, *KEEP_GROUPS)


@dataclass(frozen=True)
class Tier:
    """Number of images of each prompt group; with `of_each_prompt`, of each prompt of the keep groups."""

    direct: int
    held_out: int
    generic: int
    alike: int
    general: int
    of_each_prompt: bool = False
    strengths: tuple[float, ...] = (1.0,)


BASE_TIERS = {DIGITS: "digits", DIGITS_SD3: "digits", EMOJI: "emoji"}  # the default tiers of bundled bases
CURVE = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
TIERS = {
    "digits": Tier(200, 200, 200, 100, 100, of_each_prompt=True),
    "emoji": Tier(100, 100, 200, 20, 4, of_each_prompt=True),
    "quick": Tier(100, 0, 0, 100, 100),
    "standard": Tier(500, 500, 500, 500, 1000, strengths=CURVE),
    "full": Tier(2500, 2500, 2500, 2500, 10000, strengths=CURVE),
}


@dataclass(frozen=True)
class ImageSpec:
    """What one evaluated image shows: prompt group, prompt and seed."""

    group: str
    prompt: Prompt
    seed: int
    number: int = 0  # index of the evaluation seed

    @property
    def file_name(self) -> str:
        digest = hashlib.sha256(self.prompt.text.encode()).hexdigest()[:8]
        return f"{slugify(self.prompt.text)[:48]}-{digest}-{self.seed}.png"


def override_counts(tier: Tier, num_images: int | None, num_keep_images: int | None, groups: Sequence[str]) -> Tier:
    """The tier with the counts and groups of the command line; no groups: the tier's.

    Raises:
        UsageError: unknown group.
    """
    for group in groups:
        if group not in GROUPS:
            raise UsageError(f'--groups "{group}" is not one of {", ".join(GROUPS)}.{suggest(group, GROUPS)}')
    if num_images is not None:
        tier = dataclasses.replace(tier, direct=num_images, held_out=num_images, generic=num_images)
    if num_keep_images is not None:
        tier = dataclasses.replace(tier, alike=num_keep_images, general=num_keep_images, of_each_prompt=True)
    if groups:
        counts: dict[str, Any] = {group: 0 for group in GROUPS if group not in groups}
        for group in groups:
            if getattr(tier, group) == 0:  # given in --groups, but not part of the tier
                counts[group] = tier.direct
        tier = dataclasses.replace(tier, **counts)
    return tier


def group_prompts(concept: Concept, group: str) -> list[Prompt]:
    """The prompts of a prompt group; `generic` has the concept's generic prompt."""
    return [Prompt(concept.generic)] if group == "generic" else concept.prompts(group)


def plan_images(
    concept: Concept,
    tier: Tier,
    seeds: Sequence[int],
    extra_prompts: Sequence[Prompt] = (),
    every_direct: bool = False,
) -> list[ImageSpec]:
    """The images to generate. A larger count adds images and keeps those of a smaller one.

    A text counts once: equal prompts of a group, or of both keep groups, would be the same images counted twice.

    Args:
        seeds: The evaluation seeds; each adds a set of images.
        extra_prompts: Added to the direct prompts.
        every_direct: At least one image of each direct prompt, also if the tier has fewer images.

    Raises:
        UsageError: more than MAX_IMAGES images.
    """
    specs: list[ImageSpec] = []
    planned, prompts_of = 0, _distinct_prompts(concept, extra_prompts)
    for number, seed in enumerate(seeds):
        for group, prompts in prompts_of.items():
            of_each_prompt, count = tier.of_each_prompt and group in KEEP_GROUPS, getattr(tier, group)
            if every_direct and group == "direct" and count:
                count = max(count, len(prompts))
            planned += count * (len(prompts) if of_each_prompt else bool(prompts))
            if planned > MAX_IMAGES:
                raise UsageError(
                    f"{concept.slug}: the evaluation has {planned:,} or more images, but at most {MAX_IMAGES:,} are "
                    "possible. Lower --num_images or --num_keep_images, or give fewer seeds."
                )
            for prompt, index in _share_out(prompts, count, of_each_prompt):
                specs.append(ImageSpec(group, prompt, image_seed(EVALUATE_SEEDS, seed, prompt.text, index), number))
    return specs


def count_used(plans: Mapping[str, Sequence[ImageSpec]], extra_prompts: Sequence[Prompt]) -> tuple[int, int]:
    """How many of the extra prompts are in the plan of every concept, and how many there are; a text counts once."""
    texts = {prompt.text for prompt in extra_prompts}
    direct = [{spec.prompt.text for spec in specs if spec.group == "direct"} for specs in plans.values()]
    return len(texts.intersection(*direct)), len(texts)


def _distinct_prompts(concept: Concept, extra_prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    """The prompts of each group: of equal ones the first, the concept's own before others and `alike` before `general`.

    A text may be in a concept group and in another group, because these are not counted together.
    """
    prompts_of, kept = {}, set[str]()
    for group in GROUPS:
        first: dict[str, Prompt] = {}
        for prompt in (*group_prompts(concept, group), *(extra_prompts if group == "direct" else ())):
            first.setdefault(prompt.text, prompt)
        if group in KEEP_GROUPS:
            first = {text: prompt for text, prompt in first.items() if text not in kept}
            kept |= set(first)
        prompts_of[group] = list(first.values())
    return prompts_of


def _share_out(prompts: Sequence[Prompt], count: int, of_each_prompt: bool) -> list[tuple[Prompt, int]]:
    """(prompt, index of the image of this prompt): `count` images of each prompt, or of all prompts in turn."""
    if of_each_prompt:
        return [(prompt, index) for prompt in prompts for index in range(count)]
    return [(prompts[i % len(prompts)], i // len(prompts)) for i in range(count if prompts else 0)]


def to_prompted_images(concept: Concept, specs: Sequence[ImageSpec]) -> PromptedImages:
    """The same as arrays, for metrics."""
    return PromptedImages(
        concept,
        np.array([spec.group for spec in specs], dtype=str),
        tuple(spec.prompt for spec in specs),
        np.array([spec.number for spec in specs], dtype=np.int64),
    )


def write_plan(path: Path, plans: Mapping[str, Sequence[ImageSpec]]) -> None:
    """Write --write_plan: one JSON line per image that another program must generate for paired comparison.

    Raises:
        UsageError: the file exists and is not such a plan.
        UnlearnError: it cannot be written.
    """
    if path.exists() and not _is_plan(path):
        raise UsageError(
            f"--write_plan {path} exists and is not a plan that sd-unlearn wrote, so it is not overwritten. Choose "
            "another name."
        )
    lines: dict[str, dict[str, Any]] = {}
    for slug, specs in plans.items():
        for spec in specs:
            line = {"file_name": spec.file_name, "text": spec.prompt.text, "seed": spec.seed, "group": spec.group}
            lines.setdefault(spec.file_name, {**line, "concept": slug})
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines.values()))


def _is_plan(path: Path) -> bool:
    """Whether a file is empty or holds what write_plan writes."""
    try:
        lines = read_jsonl(path) if path.is_file() else [{}]
    except UsageError:
        return False
    return all({"file_name", "text", "seed", "group", "concept"} == line.keys() for line in lines)
