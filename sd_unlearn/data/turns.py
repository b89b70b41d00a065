"""Training on several concepts: each step serves one of them, in turn, so that a batch does not grow with their number.

A step of a concept is the step of a training on it alone: its captions, its positives and the unlabeled images of its
generic prompt, and the keep images, which none of the concepts covers. Every bracket is therefore complete within a
step, and its sign is decided over the whole batch, as for one concept. Imports torch only for the steps themselves, so
that `train` can refuse what a concept lacks at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sd_unlearn.data.concept import Concept, normalized
from sd_unlearn.data.dataset import UNUSED, Example

if TYPE_CHECKING:
    from sd_unlearn.data.batch import Batch
    from sd_unlearn.data.batches import StratifiedBatches

SEED_STEP = 1_000_003  # between the samplers of two concepts


@dataclass(frozen=True)
class Turn:
    """What a step that serves one concept trains on."""

    concept: Concept
    examples: Sequence[Example]  # all of the training, in its order; UNUSED those that are not for this concept
    betas: tuple[float, ...]  # share of each set of positives among the unlabeled images


def make_turns(concept: Concept, examples: Sequence[Example], betas: Sequence[float]) -> list[Turn]:
    """The turn of each concept; of one alone all examples as they are.

    betas: of each set of positives, that is of each of several concepts.
    """
    parts = concept.parts
    if len(parts) == 1:
        return [Turn(concept, examples, tuple(betas))]
    return [
        Turn(part, [_seen(example, number, parts) for example in examples], (beta,))
        for number, (part, beta) in enumerate(zip(parts, betas, strict=True))
    ]


def _seen(example: Example, number: int, parts: Sequence[Concept]) -> Example:
    """An example as a step of the concept with this number takes it."""
    if example.is_positive:
        return replace(example, positive_set=0, group="positive" if example.positive_set == number else UNUSED)
    if example.group in ("generic", "negative") and not example.own_caption:
        return replace(example, caption=parts[number].generic)  # by default, of every concept
    if example.group not in ("generic", "mixed_in"):
        return example
    prompts = [normalized(part.generic if example.group == "generic" else part.caption) for part in parts]
    caption = normalized(example.caption)
    is_of_another = caption in prompts and caption != prompts[number]
    return replace(example, group=UNUSED) if is_of_another else example


class InTurn:
    """Endless steps of several samplers, one for each concept: every round serves each once, in a new order."""

    def __init__(self, batches: Sequence[StratifiedBatches], seed: int) -> None:
        from sd_unlearn.data.batches import Cycle

        self.batches, self.order = batches, Cycle(len(batches), seed)

    @property
    def images_per_step(self) -> int:
        """Over all processes."""
        return max(batches.images_per_step for batches in self.batches)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            (turn,) = self.order.take(1)
            yield replace(next(iter(self.batches[turn])), turn=turn)

    def state_dict(self) -> dict[str, Any]:
        """The state of all samplers; load_state_dict makes the next step the one that would have followed."""
        order = (list(self.order.left), self.order.generator.get_state())
        return {"order": order, "concepts": [batches.state_dict() for batches in self.batches]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        from sd_unlearn.data.batches import sampler_state

        state = sampler_state(state)
        if len(state.get("concepts", ())) != len(self.batches):
            return  # of other concepts, with --force_resume
        left, generator = state["order"]
        self.order.left = list(left)
        self.order.generator.set_state(generator)
        for batches, own in zip(self.batches, state["concepts"], strict=True):
            batches.load_state_dict(own)
