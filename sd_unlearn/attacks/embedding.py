"""Learned token embeddings, on which the attacks `token` and `soft` are built.

Textual inversion (Gal et al. 2023, arXiv 2208.01618, equation 2) turned into an attack (Pham et al. 2024,
"Circumventing Concept Erasure Methods", arXiv 2308.01508): only embeddings are trained, on images of the concept, by
noise prediction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sd_unlearn.attacks.base import Outcome, Target
from sd_unlearn.attacks.noise_prediction import Descent, sample_batch
from sd_unlearn.models.learned_prompt import LearnedPrompt


@dataclass(frozen=True)
class EmbeddingSettings:
    """Budget of an attack that learns embeddings."""

    steps: int
    restarts: int
    images: int  # to judge, of each restart
    positives: int = 25  # the attacker's images of the concept
    batch_size: int = 25
    learning_rate: float = 1.0  # of Adam, in units of the root mean square of the encoder's embeddings


BUDGETS = {  # of one learned token and of a whole learned prompt, so that they can be compared
    "quick": EmbeddingSettings(steps=400, restarts=1, images=60),
    "standard": EmbeddingSettings(steps=1000, restarts=2, images=100),
    "full": EmbeddingSettings(steps=5000, restarts=4, images=200),
}


def learn(
    target: Target, prompt: LearnedPrompt, settings: EmbeddingSettings, generator: torch.Generator
) -> Iterator[Outcome]:
    """Train the prompt's vectors to predict the noise of images of the concept; yields the images at the end."""
    samples = target.positives.first(settings.positives)
    descent = Descent(target, prompt.optimizer(settings.learning_rate))
    for _ in range(settings.steps):
        descent.step(sample_batch(samples, settings.batch_size, generator), lambda _: prompt.encode())
    with torch.no_grad():
        text = prompt.encode()
    yield Outcome(target.generate(text, target.seeds(settings.images)), settings.steps)
