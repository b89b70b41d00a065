"""Concept inversion: one new token is learned and used in place of the concept's name.

Pham et al. 2024, "Circumventing Concept Erasure Methods" (arXiv 2308.01508): textual inversion on the erased model with
images of the concept. Access: the weights and the text encoder's input. Differences: the prompt is the concept's
caption with the name replaced (not a list of templates); the first restart begins at the mean embedding of the name,
the others at a random token of the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch

from sd_unlearn.attacks.base import Attack, Outcome, Target
from sd_unlearn.attacks.embedding import BUDGETS, EmbeddingSettings, learn
from sd_unlearn.data.concept import Concept
from sd_unlearn.models.conditioning import TextConditioning
from sd_unlearn.models.learned_prompt import LearnedPrompt, prompt_ids, readers, tokenizers

PLACEHOLDER, OTHER = "x", "y"  # any words of a single token: the embedding is replaced


def run(target: Target, settings: EmbeddingSettings, restart: int) -> Iterator[Outcome]:
    """Learn one token; 0 steps of the first restart: the caption itself, if the name is a single token."""
    generator, tokenizer = target.generator("token", restart), tokenizers(target.base)[0]
    before, name, after = split_caption(target.concept)
    conditioning = target.base.conditioning
    found = [[position(own, before, after, conditioning)] for own in readers(target.base)]
    prompt = LearnedPrompt(target.base, f"{before}{PLACEHOLDER}{after}", found)
    if restart:
        number = int(torch.randint(len(tokenizer) - 2, (), generator=generator))  # not start or end
        prompt.start_from(lambda own: [number % len(own)])
    else:
        prompt.start_from(lambda own: own(name, add_special_tokens=False).input_ids)
    return learn(target, prompt, settings, generator)


def position(tokenizer: Any, before: str, after: str, conditioning: TextConditioning = TextConditioning()) -> int:
    """The position of the placeholder's token: where prompts with two different placeholders differ."""
    prompts = [prompt_ids(tokenizer, f"{before}{word}{after}", conditioning) for word in (PLACEHOLDER, OTHER)]
    return next(n for n, (one, other) in enumerate(zip(*prompts, strict=True)) if one != other)


def split_caption(concept: Concept) -> tuple[str, str, str]:
    """The caption before the concept's name, the name, and the caption after it.

    A caption without the name (and without its label) gets the name at its end.
    """
    for name in filter(None, (concept.name, concept.label)):
        if found := re.search(rf"(?<!\w){re.escape(name)}(?!\w)", concept.caption):
            return concept.caption[: found.start()], name, concept.caption[found.end() :]
    return f"{concept.caption}, ", concept.name, ""


TOKEN = Attack(
    "token",
    "Learned token",
    "Pham et al. 2024",
    "weights, any text embedding",
    BUDGETS,
    run,
    positives=attrgetter("positives"),
)
