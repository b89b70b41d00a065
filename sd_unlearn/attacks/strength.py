"""Strength: is the concept back when the LoRA is applied a little weaker or stronger than trained?

Access: how the LoRA is applied, as every user of an interface has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sd_unlearn.attacks.base import Attack, Outcome, Target
from sd_unlearn.data.encoding import encode_captions


@dataclass(frozen=True)
class StrengthSettings:
    """Budget of the attack."""

    images: int
    strengths: tuple[float, ...] = (0.8, 0.9, 1.1)
    restarts: int = 1


def run(target: Target, settings: StrengthSettings, restart: int) -> Iterator[Outcome]:
    """Images of the caption at each strength; step is the strength's number, from 1."""
    caption, seeds = target.concept.caption, target.seeds(settings.images)
    for number, strength in enumerate(settings.strengths, 1):
        with target.applied(strength):
            images = target.generate(encode_captions(target.base, [caption]), seeds)
        yield Outcome(images, number, found=f"strength {strength:g}")


STRENGTH = Attack(
    "strength",
    "Other LoRA strength",
    "",
    "strength of the LoRA",
    {"quick": StrengthSettings(60), "standard": StrengthSettings(100), "full": StrengthSettings(200)},
    run,
    applies_lora=True,
)
