"""An attacked model for the tests of attacks: the tiny base with random "images" of a concept."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from sd_unlearn.attacks.base import Samples, Target
from sd_unlearn.attacks.benign import BENIGN
from sd_unlearn.attacks.completion import COMPLETION, ImageSettings
from sd_unlearn.attacks.embedding import EmbeddingSettings
from sd_unlearn.attacks.finetune import FINETUNE, FineTuneSettings
from sd_unlearn.attacks.hard import HARD, HardSettings
from sd_unlearn.attacks.inversion import INVERSION
from sd_unlearn.attacks.noise import NOISE, NoiseSettings
from sd_unlearn.attacks.prefix import PREFIX, PrefixSettings
from sd_unlearn.attacks.quantisation import QUANTISATION, QuantisationSettings
from sd_unlearn.attacks.ring import RING, RingSettings
from sd_unlearn.attacks.soft import SOFT
from sd_unlearn.attacks.strength import STRENGTH, StrengthSettings
from sd_unlearn.attacks.token import TOKEN
from sd_unlearn.data.concept import Concept
from sd_unlearn.models.base import Base
from sd_unlearn.models.kinds import channels_of
from sd_unlearn.models.sampling import Sampler

CONCEPT = Concept(
    name="seven",
    caption="a photo of the digit seven",
    generic="a photo of a digit",
    kind="digit",
    keep=["a photo of the digit {one,two}"],
)
SAMPLER = Sampler(steps=2, guidance_scale=3.0, batch_size=2)
SMALL: dict[str, Any] = {  # settings with which each attack takes well under a second
    PREFIX.name: PrefixSettings(2, steps=1, tokens=2, batch_size=2),
    HARD.name: HardSettings(1, images=2, tokens=3, batch_size=2),
    TOKEN.name: EmbeddingSettings(1, restarts=1, images=2, batch_size=2),
    SOFT.name: EmbeddingSettings(1, restarts=1, images=2, batch_size=2),
    RING.name: RingSettings(1, 3, images=2, population=4),
    NOISE.name: NoiseSettings(2, etas=(1.0, 1.5), variances=(1.0, 1.04)),
    INVERSION.name: ImageSettings(2),
    COMPLETION.name: ImageSettings(3),
    FINETUNE.name: FineTuneSettings((1, 2), images=2, samples=3, batch_size=2, rank=2, learning_rate=0.1),
    BENIGN.name: FineTuneSettings((1,), images=2, samples=2, batch_size=2, rank=2, learning_rate=0.1),
    STRENGTH.name: StrengthSettings(2, strengths=(0.9, 1.1)),
    QUANTISATION.name: QuantisationSettings(2),
}


def make_target(base: Base, concept: Concept = CONCEPT, seed: int = 0) -> Target:
    """The base itself as the attacked model, and three random latents as the attacker's images."""
    generator = torch.Generator().manual_seed(5)
    side = base.resolution // base.pipeline.vae_scale_factor
    mean = torch.randn(3, channels_of(base.pipeline.vae.config), side, side, generator=generator)
    positives = Samples([concept.caption] * 3, mean, torch.full_like(mean, 0.1))
    unrelated = Samples(
        [prompt.text for prompt in concept.keep_prompts], mean[:2].flip(3), torch.zeros(2, *mean.shape[1:])
    )
    return Target(base, concept, SAMPLER, seed, positives, unrelated, lambda strength: nullcontext())
