"""Soft prompt: every token embedding of the prompt is learned, also those of the end token and the padding.

Access: the weights and the text encoder's input. Textual inversion (Gal et al. 2023) of the whole prompt instead of one
token, as Pham et al. 2024 (arXiv 2308.01508) use it to circumvent erasure. Differences: all tokens of the caption are
learned, not one new token, and everything after the start token, because the network attends to the padding too (of a
language model: the tokens of the caption and of the chat template). The first restart begins at the caption, the others
at the caption plus noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

from sd_unlearn.attacks.base import Attack, Outcome, Target
from sd_unlearn.attacks.embedding import BUDGETS, EmbeddingSettings, learn
from sd_unlearn.models.learned_prompt import LearnedPrompt, learned_positions


def run(target: Target, settings: EmbeddingSettings, restart: int) -> Iterator[Outcome]:
    """Learn the caption's embeddings; 0 steps: the caption itself."""
    caption, generator = target.concept.caption, target.generator("soft", restart)
    prompt = LearnedPrompt(target.base, caption, learned_positions(target.base, caption))
    if restart:
        prompt.add_noise(generator)
    return learn(target, prompt, settings, generator)


SOFT = Attack(
    "soft",
    "Learned prompt",
    "Pham et al. 2024",
    "weights, any text embedding",
    BUDGETS,
    run,
    positives=attrgetter("positives"),
)
