"""Which pictures an evaluation asks for: prompts of each group, how many, from which seeds."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sd_unlearn.data.concept import Concept, Prompt
from sd_unlearn.errors import UsageError, suggest
from sd_unlearn.io.files import slugify, write_text
from sd_unlearn.metrics.base import ASKED, KEPT, Shots
from sd_unlearn.seeds import EVALUATE_SEEDS, image_seed

GROUPS = (*ASKED, *KEPT)


@dataclass(frozen=True)
class Tier:
    """Pictures of each group. `alike` and `general` are shared out over their prompts, or are of each prompt."""

    direct: int
    held_out: int
    generic: int
    alike: int
    general: int
    of_each_prompt: bool = False
    strengths: tuple[float, ...] = (1.0,)


CURVE = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
TIERS = {
    "digits": Tier(200, 200, 200, 100, 100, of_each_prompt=True),
    "quick": Tier(100, 0, 0, 100, 100),
    "standard": Tier(500, 500, 500, 500, 1000, strengths=CURVE),
    "full": Tier(2500, 2500, 2500, 2500, 10000, strengths=CURVE),
}


@dataclass(frozen=True)
class Shot:
    """One picture of an evaluation and its file under a folder of pictures."""

    group: str
    prompt: Prompt
    seed: int
    number: int = 0  # which of the evaluation's seeds it is of

    @property
    def file_name(self) -> str:
        digest = hashlib.sha256(self.prompt.text.encode()).hexdigest()[:8]
        return f"{slugify(self.prompt.text)[:48]}-{digest}-{self.seed}.png"


def counts_of(tier: Tier, num_images: int | None, num_keep_images: int | None, groups: Sequence[str] | None) -> Tier:
    """A tier with the counts and groups that were asked for in its place.

    Raises:
        UsageError: a group that does not exist.
    """
    for group in groups or ():
        if group not in GROUPS:
            raise UsageError(f'--groups "{group}" is none of {", ".join(GROUPS)}.{suggest(group, GROUPS)}')
    if num_images is not None:
        tier = dataclasses.replace(tier, direct=num_images, held_out=num_images, generic=num_images)
    if num_keep_images is not None:
        tier = dataclasses.replace(tier, alike=num_keep_images, general=num_keep_images, of_each_prompt=True)
    if groups is not None:
        unasked: dict[str, Any] = {group: 0 for group in GROUPS if group not in groups}
        for group in groups:
            if getattr(tier, group) == 0:  # asked for by name, though the tier leaves it out
                unasked[group] = tier.direct
        tier = dataclasses.replace(tier, **unasked)
    return tier


def prompts_of(concept: Concept, group: str) -> list[Prompt]:
    """The prompts of an evaluation group; of `generic` the concept's generic prompt."""
    return [Prompt(concept.generic)] if group == "generic" else concept.prompts(group)


def plan(concept: Concept, tier: Tier, seeds: Sequence[int], further: Sequence[Prompt] = ()) -> list[Shot]:
    """Every picture to draw, for each seed. further: prompts that ask for the concept beside the direct ones."""
    shots = []
    for number, seed in enumerate(seeds):
        for group in GROUPS:
            prompts = prompts_of(concept, group) + (list(further) if group == "direct" else [])
            total = getattr(tier, group)
            each = tier.of_each_prompt and group in KEPT
            for i in range(total * len(prompts) if each else total if prompts else 0):
                # Of each prompt one after the other, else shared out in turns: a prompt's n-th picture is the same.
                prompt, nth = (
                    (prompts[i // total], i % total) if each else (prompts[i % len(prompts)], i // len(prompts))
                )
                shots.append(Shot(group, prompt, image_seed(EVALUATE_SEEDS, seed, prompt.text, nth), number))
    return shots


def as_shots(concept: Concept, shots: Sequence[Shot]) -> Shots:
    """The same as arrays."""
    return Shots(
        concept,
        np.array([shot.group for shot in shots], dtype=str),
        tuple(shot.prompt for shot in shots),
        np.array([shot.number for shot in shots], dtype=np.int64),
    )


def write_plan(path: Path, plans: Mapping[str, Sequence[Shot]]) -> None:
    """What another program must draw for `--images` to be compared picture by picture: a JSONL line a picture."""
    import json

    lines: dict[str, dict[str, Any]] = {}
    for slug, shots in plans.items():
        for shot in shots:
            lines.setdefault(
                shot.file_name,
                {
                    "file_name": shot.file_name,
                    "text": shot.prompt.text,
                    "seed": shot.seed,
                    "group": shot.group,
                    "concept": slug,
                },
            )
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines.values()))
