"""Fine-tuning: does a new LoRA on a few images of the concept bring it back, and after how many steps?

Access: the weights. Fine-tuning as a user would do it with a LoRA trainer (Hu et al. 2022), on the attacker's images
under the concept's caption. The images are judged after several numbers of steps; the attack's success is the highest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

import torch

from sd_unlearn.attacks.base import Attack, Outcome, Samples, Target
from sd_unlearn.attacks.noise_prediction import Descent, sample_batch
from sd_unlearn.config.objective import Weights
from sd_unlearn.data.encoding import encode_captions
from sd_unlearn.models import lora
from sd_unlearn.seeds import ATTACK_SEEDS


@dataclass(frozen=True)
class FineTuneSettings:
    """Budget of a fine-tuning attack."""

    steps: tuple[int, ...]  # after which images are judged, ascending; the last ends the training
    images: int
    samples: int = 20  # of the attacker's images
    batch_size: int = 20
    rank: int = 8
    learning_rate: float = 1e-3  # of AdamW, constant
    restarts: int = 1


def run(target: Target, settings: FineTuneSettings, restart: int) -> Iterator[Outcome]:
    """Fine-tune on the attacker's images of the concept."""
    return fine_tune(target, target.positives.first(settings.samples), settings, "finetune", restart)


def fine_tune(
    target: Target, samples: Samples, settings: FineTuneSettings, name: str, restart: int
) -> Iterator[Outcome]:
    """Train a new LoRA on the attacked model; yields images of the concept's caption after each number of steps.

    The network is as before when the iterator is exhausted or closed.
    """
    base, generator = target.base, target.generator(name, restart)
    text = encode_captions(base, samples.captions).cpu()
    caption = encode_captions(base, [target.concept.caption])
    network = base.network
    targets = lora.network_targets(network, "attention")
    adapter = lora.attach(network, Weights(rank=settings.rank), targets, ATTACK_SEEDS[0] + restart).to(base.device)
    try:
        parameters = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
        descent = Descent(target, torch.optim.AdamW(parameters, lr=settings.learning_rate))
        for step in range(1, settings.steps[-1] + 1):
            batch = sample_batch(samples, settings.batch_size, generator)
            descent.step(batch, lambda part: text[part.rows])
            if step in settings.steps:
                yield Outcome(target.generate(caption, target.seeds(settings.images)), step)
    finally:
        base.network = adapter.unload()
        base.network.requires_grad_(False)


FINETUNE = Attack(
    "finetune",
    "Fine-tuning on the concept",
    "Hu et al. 2022",
    "weights",
    {
        "quick": FineTuneSettings((5, 10, 20), images=60),
        "standard": FineTuneSettings((20, 40, 50, 60, 100), images=60),
        "full": FineTuneSettings((20, 40, 60, 100, 200, 500), images=200),
    },
    run,
    positives=attrgetter("samples"),
)
