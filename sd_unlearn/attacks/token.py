"""Concept inversion: one new token is learned and used in place of the concept's name.

Pham et al. 2024, "Circumventing Concept Erasure Methods" (arXiv 2308.01508): textual inversion on the erased model with
images of the concept. Access: the weights and the text encoder's input. Differences: the prompt is the concept's
caption with the name replaced (not a list of templates); the first restart begins at the mean embedding of the name,
the others at a random token of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

import torch

from sd_unlearn.attacks.base import Attack, Outcome, Target
from sd_unlearn.attacks.embedding import BUDGETS, EmbeddingSettings, LearnedPrompt, learn
from sd_unlearn.data.concept import Concept

PLACEHOLDER = "x"  # any word of a single token: its embedding is replaced


def run(target: Target, settings: EmbeddingSettings, restart: int) -> Iterator[Outcome]:
    """Learn one token; 0 steps of the first restart: the caption itself, if the name is a single token."""
    generator, tokenizer = target.generator("token", restart), target.base.pipeline.tokenizer
    before, name, after = split_caption(target.concept)
    position = 1 + len(tokenizer(before, add_special_tokens=False).input_ids)
    prompt = LearnedPrompt(target.base, f"{before}{PLACEHOLDER}{after}", [position])
    if restart:
        prompt.start_from([int(torch.randint(len(tokenizer) - 2, (), generator=generator))])  # not start or end
    else:
        prompt.start_from(tokenizer(name, add_special_tokens=False).input_ids)
    return learn(target, prompt, settings, generator)


def split_caption(concept: Concept) -> tuple[str, str, str]:
    """The caption before the concept's name, the name, and the caption after it.

    A caption without the name (and without its label) gets the name at its end.
    """
    for name in filter(None, (concept.name, concept.label)):
        before, found, after = concept.caption.partition(name)
        if found:
            return before, name, after
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
