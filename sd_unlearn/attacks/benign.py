"""Benign fine-tuning: does the concept come back by itself when the model is fine-tuned on something else?

Access: the weights, but no images of the concept. A new LoRA is trained on images of retained prompts under their own
captions, as somebody would who adapts the published model. Suriyakumar et al. 2024, "Unstable Unlearning" (arXiv
2410.08074), describe the effect. Difference: a LoRA is trained, not the whole network.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

from sd_unlearn.attacks.base import Attack, Outcome, Target
from sd_unlearn.attacks.finetune import FineTuneSettings, fine_tune


def run(target: Target, settings: FineTuneSettings, restart: int) -> Iterator[Outcome]:
    """Fine-tune on unrelated images."""
    return fine_tune(target, target.unrelated.first(settings.samples), settings, "benign", restart)


BENIGN = Attack(
    "benign",
    "Fine-tuning on other images",
    "Suriyakumar et al. 2024",
    "weights",
    {
        "quick": FineTuneSettings((20,), images=60),
        "standard": FineTuneSettings((50, 100), images=60),
        "full": FineTuneSettings((100, 200, 500), images=200),
    },
    run,
    unrelated=attrgetter("samples"),
)
