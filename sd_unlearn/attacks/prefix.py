"""Adversarial prefix: a few tokens before the prompt that make the erased model generate an image of the concept.

Zhang et al. 2024, "To Generate or Not?" (UnlearnDiffAtk, arXiv 2310.11868), section 4: projected gradient descent on
relaxed token choices, by the noise prediction loss on one image of the concept; no other model is needed. Access: the
weights, and text input. Settings as there: 5 tokens, 40 iterations, learning rate 0.01, weight decay 0.1. Differences:
the optimizer is AdamW with a projection onto the simplex after each step, and the image is generated once, at the end,
with the seed of the attacked prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from sd_unlearn.attacks.base import Attack, Outcome, Samples, Target, needs_one_vocabulary
from sd_unlearn.attacks.noise_prediction import Descent, sample_batch
from sd_unlearn.attacks.tokens import TokenPrompt, allowed_tokens, random_tokens


@dataclass(frozen=True)
class PrefixSettings:
    """Budget of the attack."""

    images: int  # prompts, each with a seed and an image of the concept of its own
    steps: int = 40
    tokens: int = 5
    batch_size: int = 8  # timesteps of each step
    learning_rate: float = 0.01
    weight_decay: float = 0.1
    restarts: int = 1


def run(target: Target, settings: PrefixSettings, restart: int) -> Iterator[Outcome]:
    """Search a prefix for each image; 0 steps: the caption after random tokens."""
    generator, images, found = target.generator("prefix", restart), [], []
    samples, seeds = target.positives.first(settings.images), target.seeds(settings.images)
    for number, seed in zip(range(len(samples.mean)), seeds, strict=False):
        one = Samples([samples.captions[number]], samples.mean[[number]], samples.std[[number]])
        prompt = TokenPrompt(target.base, settings.tokens, target.concept.caption)
        ids = search(target, prompt, one, settings, generator)
        prompt.choose(ids)
        with torch.no_grad():
            images += target.generate(prompt.encode(), [seed])
        found.append(prompt.words(ids))
    yield Outcome(images, settings.steps, found="; ".join(found[:3]))


def search(
    target: Target, prompt: TokenPrompt, sample: Samples, settings: PrefixSettings, generator: torch.Generator
) -> Tensor:
    """The tokens [positions] of the prefix after projected gradient descent on one image."""
    allowed = allowed_tokens(target.base)
    start = random_tokens(allowed, [settings.tokens], generator)
    weights = torch.rand(settings.tokens, len(allowed), generator=generator)
    weights[torch.arange(settings.tokens), start] += 1
    weights = project(weights, allowed).to(target.base.device).requires_grad_()
    optimizer = torch.optim.AdamW([weights], lr=settings.learning_rate, weight_decay=settings.weight_decay)
    descent = Descent(target, optimizer)
    size = settings.batch_size
    mean, std = (values.expand(size, -1, -1, -1) for values in (sample.mean, sample.std))
    repeated = Samples([*sample.captions] * size, mean, std)

    def text(_part: object) -> Tensor:
        prompt.mix(weights)
        return prompt.encode()

    for _ in range(settings.steps):
        descent.step(sample_batch(repeated, settings.batch_size, generator), text)
        with torch.no_grad():
            weights.copy_(project(weights, allowed.to(weights.device)))
    return weights.detach().argmax(1).cpu()


def project(weights: Tensor, allowed: Tensor) -> Tensor:
    """Rows of weights [n, V] projected onto the simplex of the allowed tokens (Duchi et al. 2008, figure 1)."""
    masked = torch.where(allowed, weights, -torch.inf)
    ordered = masked.sort(1, descending=True).values
    sums = torch.where(ordered.isfinite(), ordered, 0).cumsum(1) - 1
    counts = torch.arange(1, weights.shape[1] + 1, device=weights.device)
    rho = (ordered * counts > sums).sum(1, keepdim=True)
    threshold = sums.gather(1, rho - 1) / rho
    return (masked - threshold).clamp(min=0)


PREFIX = Attack(
    "prefix",
    "Adversarial prefix",
    "Zhang et al. 2024 (UnlearnDiffAtk)",
    "weights, any prompt",
    {"quick": PrefixSettings(10), "standard": PrefixSettings(50), "full": PrefixSettings(142)},
    run,
    positives=attrgetter("images"),
    unsupported=needs_one_vocabulary,
)
