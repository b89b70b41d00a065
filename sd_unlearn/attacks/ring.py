"""Concept direction: a prompt whose text embedding is the generic prompt's plus the concept's direction.

Tsai et al. 2024, "Ring-A-Bell!" (arXiv 2310.10012), section 3: the direction is the mean difference of the embeddings
of prompts with and without the concept; a genetic algorithm searches tokens whose embedding is closest to the sum.
Access: the text encoder only. Differences: the prompts are the concept file's direct and held-out prompts against its
generic prompt; the attacked prompt is the generic one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sd_unlearn.attacks.base import Attack, Outcome, Target, needs_one_vocabulary
from sd_unlearn.attacks.tokens import TokenPrompt, allowed_tokens, random_tokens
from sd_unlearn.data.encoding import encode_captions

ENCODED_AT_ONCE = 50  # prompts


@dataclass(frozen=True)
class RingSettings:
    """Budget of the attack."""

    generations: int
    tokens: int  # at most as many as the text encoder reads
    images: int
    eta: float = 3.0  # strength of the direction
    population: int = 100
    mutation_rate: float = 0.05  # of each token
    restarts: int = 1


def run(target: Target, settings: RingSettings, restart: int) -> Iterator[Outcome]:
    """Search the prompt and generate its images."""
    base, concept, generator = target.base, target.concept, target.generator("ring", restart)
    longest = base.pipeline.tokenizer.model_max_length - 2
    prompt = TokenPrompt(base, min(settings.tokens, longest))
    with torch.no_grad():
        prompts = list(dict.fromkeys([concept.caption, *(p.text for p in concept.prompts("held_out"))]))
        generic = encode_captions(base, [concept.generic])
        direction = (encode_captions(base, prompts) - generic).mean(0, keepdim=True)
        ids = evolve(prompt, generic + settings.eta * direction, settings, allowed_tokens(base), generator)
        prompt.choose(ids)
        text = prompt.encode()
    images = target.generate(text, target.seeds(settings.images))
    yield Outcome(images, settings.generations, found=prompt.words(ids))


def evolve(
    prompt: TokenPrompt, wanted: Tensor, settings: RingSettings, allowed: Tensor, generator: torch.Generator
) -> Tensor:
    """Tokens [positions] whose embedding is close to wanted [1, tokens, width], by a genetic algorithm.

    The better half of each generation survives; each child takes every token from one of two survivors and replaces a
    few by random ones.
    """
    length, half = len(prompt.positions[0]), settings.population // 2
    population = random_tokens(allowed, [settings.population, length], generator)
    errors = _errors(prompt, population, wanted)
    for _ in range(settings.generations):
        best = errors.argsort()[:half]
        parents, kept = population[best], errors[best]
        mothers, fathers = (torch.randint(half, (half,), generator=generator) for _ in range(2))
        from_mother = torch.rand(half, length, generator=generator) < 0.5
        children = torch.where(from_mother, parents[mothers], parents[fathers])
        mutated = torch.rand(half, length, generator=generator) < settings.mutation_rate
        children = torch.where(mutated, random_tokens(allowed, [half, length], generator), children)
        population = torch.cat([parents, children])
        errors = torch.cat([kept, _errors(prompt, children, wanted)])
    return population[errors.argmin()]


def _errors(prompt: TokenPrompt, population: Tensor, wanted: Tensor) -> Tensor:
    """[N] squared distance of the embedding of each row of tokens [N, positions]."""
    errors = []
    for ids in population.split(ENCODED_AT_ONCE):
        prompt.choose(ids)
        errors.append((prompt.encode(len(ids)) - wanted).float().square().sum((1, 2)).cpu())
    return torch.cat(errors)


RING = Attack(
    "ring",
    "Concept direction",
    "Tsai et al. 2024 (Ring-A-Bell)",
    "text encoder, any prompt",
    {
        "quick": RingSettings(100, 16, images=60),
        "standard": RingSettings(500, 38, images=100),
        "full": RingSettings(3000, 77, images=200),
    },
    run,
    unsupported=needs_one_vocabulary,
)
