"""Training on several concepts: each step serves one of them, in turn, so that a batch does not grow with their number.

A step of a concept is the step of a training on it alone: its captions, its positives and the unlabeled images of its
generic prompt, and the keep images, which none of the concepts covers. Every bracket is therefore complete within a
step, and its sign is decided over the whole batch, as for one concept.

Images of the generic prompt also show the other concepts: p_U = beta_k p_k + beta_o p_o + (1 - beta_k - beta_o) p_N,
with p_o the images of the others. So the others are a second set of positives in each bracket of the concept
(`risk.pu_terms`), sampled from all of their images, and what is left for the model to generate is p_N, without any of
the concepts. A concept file says how often the generic prompt shows it (generic_share); where that is unknown or zero,
there is no second set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sd_unlearn.data.batch import Batch
from sd_unlearn.data.batches import Cycle, StratifiedBatches
from sd_unlearn.data.concept import Concept, normalized
from sd_unlearn.data.dataset import Example
from sd_unlearn.data.several import share_of_others, sharing
from sd_unlearn.errors import UsageError

UNUSED = "unused"  # group of the examples that a step of a concept does not sample
SEED_STEP = 1_000_003  # between the samplers of two concepts


@dataclass(frozen=True)
class Turn:
    """What a step that serves one concept trains on."""

    concept: Concept
    examples: Sequence[Example]  # all of the training, in its order; UNUSED those that are not for this concept
    betas: tuple[float, ...]  # share of each set of positives among the unlabeled images


def make_turns(
    concept: Concept, examples: Sequence[Example], betas: Sequence[float], with_others: bool = True
) -> list[Turn]:
    """The turn of each concept; of one alone all examples as they are.

    betas: of each set of positives, that is of each of several concepts. with_others: whether the others' positives
    are a second set; only for images of the base, whose shares the concept files say.

    Raises:
        UsageError: the concepts leave nothing to generate instead.
    """
    parts = concept.parts
    if len(parts) == 1:
        return [Turn(concept, examples, tuple(betas))]
    images = Counter(example.positive_set for example in examples if example.is_positive)
    turns = []
    for number, (part, beta) in enumerate(zip(parts, betas, strict=True)):
        others = sharing(concept, part) if with_others else []
        numbers = [parts.index(other) for other in others]
        weights = _weights([other.generic_share for other in others], [images[n] for n in numbers])
        seen = _Seen(number, dict(zip(numbers, weights, strict=True)), parts)
        own = [seen(example) for example in examples]
        turns.append(Turn(part, own, _betas(part, others, own, beta)))
    return turns


def _weights(shares: Sequence[float], images: Sequence[int]) -> list[float]:
    """The weight of an image of each concept, so that each counts by its share and the mean weight is 1."""
    return [share / sum(shares) * sum(images) / count for share, count in zip(shares, images, strict=True)]


def _betas(part: Concept, others: Sequence[Concept], own: Sequence[Example], beta: float) -> tuple[float, ...]:
    if not others:
        return (beta,)
    groups = Counter(example.group for example in own)
    generic = groups["generic"] / (groups["generic"] + groups["mixed_in"])
    betas = (beta, share_of_others(part, others) * generic)
    if sum(betas) >= 1:
        raise UsageError(
            f"--beta {beta:g} of {part.name} and {betas[1]:.2g} of the other concepts add up to 1 or more. They are "
            f'shares of the images of "{part.generic}": give a smaller --beta, or leave it out.'
        )
    return betas


@dataclass(frozen=True)
class _Seen:
    """The examples as a step of one concept takes them."""

    number: int  # of the concept
    others: Mapping[int, float]  # the concepts of the second set, with the weight of their images
    parts: Sequence[Concept]

    def __call__(self, example: Example) -> Example:
        if example.is_positive:
            if example.positive_set == self.number:
                return replace(example, positive_set=0)
            if example.positive_set in self.others:
                return replace(example, positive_set=1, weight=self.others[example.positive_set])
            return replace(example, group=UNUSED)
        return replace(example, group=UNUSED) if self._is_of_another(example) else example

    def _is_of_another(self, example: Example) -> bool:
        """Whether an unlabeled image is of another concept's prompt, and not of this one's."""
        if example.group not in ("generic", "mixed_in"):
            return False
        name = "generic" if example.group == "generic" else "caption"
        prompts = [normalized(getattr(part, name)) for part in self.parts]
        caption = normalized(example.caption)
        return caption in prompts and caption != prompts[self.number]


class InTurn:
    """Endless steps of several samplers, one for each concept: every round serves each once, in a new order."""

    def __init__(self, batches: Sequence[StratifiedBatches], seed: int) -> None:
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
        left, generator = state["order"]
        self.order.left = list(left)
        self.order.generator.set_state(generator)
        for batches, own in zip(self.batches, state["concepts"], strict=True):
            batches.load_state_dict(own)
