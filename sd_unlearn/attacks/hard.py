"""Hard prompt: free tokens instead of the prompt, found by gradient through the nearest token embeddings.

Chin et al. 2024, "Prompting4Debugging" (P4D, arXiv 2309.06135), section 3, with the optimization of Wen et al. 2023
(arXiv 2302.03668): continuous embeddings are trained, each forward pass uses the nearest tokens. Access: the weights,
and text input. Difference: the loss is the noise prediction on images of the concept, where P4D compares with the
prediction of the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from sd_unlearn.attacks.base import Attack, Outcome, Target, needs_one_vocabulary
from sd_unlearn.attacks.noise_prediction import Descent, sample_batch
from sd_unlearn.attacks.tokens import TokenPrompt, allowed_tokens, nearest, random_tokens


@dataclass(frozen=True)
class HardSettings:
    """Budget of the attack."""

    steps: int
    images: int
    restarts: int = 1
    tokens: int = 16
    positives: int = 25
    batch_size: int = 25
    learning_rate: float = 0.1  # of AdamW, in units of the root mean square of the encoder's embeddings


def run(target: Target, settings: HardSettings, restart: int) -> Iterator[Outcome]:
    """Search a prompt of free tokens."""
    generator, base = target.generator("hard", restart), target.base
    prompt, allowed = TokenPrompt(base, settings.tokens), allowed_tokens(base)
    table = prompt.tables[0]
    ids = random_tokens(allowed, [len(prompt.positions[0])], generator)
    free = table[ids.to(table.device)].clone().requires_grad_()
    descent = Descent(target, torch.optim.AdamW([free], lr=settings.learning_rate * prompt.scales[0]))
    samples = target.positives.first(settings.positives)

    def text(_part: object) -> Tensor:
        prompt.choose(nearest(free.detach(), table, allowed))
        prompt.vectors[0] = prompt.vectors[0] + free - free.detach()  # the tokens' value, the gradient of `free`
        return prompt.encode()

    for _ in range(settings.steps):
        descent.step(sample_batch(samples, settings.batch_size, generator), text)
    ids = nearest(free.detach(), table, allowed)
    prompt.choose(ids)
    with torch.no_grad():
        found = prompt.encode()
    yield Outcome(target.generate(found, target.seeds(settings.images)), settings.steps, found=prompt.words(ids))


HARD = Attack(
    "hard",
    "Free tokens",
    "Chin et al. 2024 (P4D)",
    "weights, any prompt",
    {
        "quick": HardSettings(100, images=60),
        "standard": HardSettings(1000, images=100),
        "full": HardSettings(3000, images=200),
    },
    run,
    positives=attrgetter("positives"),
    unsupported=needs_one_vocabulary,
)
