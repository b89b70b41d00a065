"""How a step's batch is divided among caption groups and kinds of images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Literal

from sd_unlearn.choices import CaptionMode, ObjectiveName
from sd_unlearn.config.batching import effective_batch_size
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.dataset import has_negatives, positive_sets
from sd_unlearn.errors import UsageError
from sd_unlearn.launch import process_count

MOST_PARAPHRASES = 4  # in a step

# The caption of a caption group; None: each image has its own. Several take turns, one a step.
GroupCaption = str | tuple[str, ...] | None


@dataclass(frozen=True)
class Layout:
    """How many images of each kind a step's batch holds: per caption group, and of keep images."""

    positive: int  # of each set of positives
    unlabeled: int
    keep: int
    negative: int = 0
    sets: int = 1

    @classmethod
    def of(cls, batch_size: int, groups: int, has_keep: bool, sets: int = 1, negatives: bool = False) -> Layout:
        """A batch of 25 % positives and 35 % unlabeled images, divided among the caption groups, and keep images.

        Without keep images the rest is unlabeled; without positives, their quarter is. Positives are divided among
        their sets, and negatives get half of the unlabeled images' share. Every caption group has at least one image of
        each kind, and a step at least one keep image.

        Raises:
            UsageError: the batch is too small for that.
        """
        kinds = sets + 1 + negatives

        def divide(size: int) -> Layout | None:
            """The layout of a step of this size, None if it is too small."""
            positive = max(1, int(0.25 * size / groups / sets)) if sets else 0
            share = int((0.35 if sets else 0.6) * size / groups)
            unlabeled = share if has_keep else size // groups - sets * positive
            negative = max(1, unlabeled // 2) if negatives else 0
            unlabeled = max(1, unlabeled - negative)
            layout = cls(positive, unlabeled, 0, negative, sets)
            left = size - layout.total(groups)
            return replace(layout, keep=left if has_keep else 0) if left >= has_keep else None

        if layout := divide(batch_size):
            return layout
        enough = next(size for size in count(batch_size + 1) if divide(size))
        keep = " and a keep image" if has_keep else ""
        raise UsageError(
            f"--effective_batch_size {batch_size} is too small: a step needs at least {enough} images, one of each "
            f"kind ({kinds}) in each caption group ({groups}, set by --caption_mode and paraphrases){keep}."
        )

    @classmethod
    def of_baseline(
        cls, batch_size: int, groups: int, has_keep: bool, sets: int, images: Literal["positive", "unlabeled"]
    ) -> Layout:
        """Of a batch, 60 % images of one kind, divided among caption groups and sets; the rest keep images, as with pu.

        Raises:
            UsageError: the batch is too small for that.
        """
        if batch_size < groups * sets + has_keep:
            raise UsageError(
                f"--effective_batch_size {batch_size} is too small: a step needs at least {groups * sets + has_keep} "
                f"images, one of each set ({sets}) under each caption ({groups}){' and a keep image' * has_keep}."
            )
        each = max(1, int((0.6 if has_keep else 1) * batch_size / groups / sets))
        layout = cls(each, 0, 0, sets=sets) if images == "positive" else cls(0, each, 0, sets=0)
        return replace(layout, keep=batch_size - layout.total(groups) if has_keep else 0)

    def total(self, groups: int) -> int:
        return groups * (self.sets * self.positive + self.unlabeled + self.negative) + self.keep


@dataclass(frozen=True)
class BaselineStep:
    """What a step of a baseline holds besides keep images."""

    images: Literal["positive", "unlabeled"]  # under each of the concept's captions
    has_generic: bool = False  # whether the generic caption is another caption group, the first one


BASELINES: dict[ObjectiveName, BaselineStep] = {
    "esd-x": BaselineStep("positive"),
    "esd-u": BaselineStep("positive"),
    "anchor": BaselineStep("unlabeled", has_generic=True),
    "neggrad": BaselineStep("positive"),
}


def compose_step(
    config: TrainConfig, concept: Concept, processes: int, has_keep: bool, sets: int, negatives: bool
) -> tuple[list[GroupCaption], Layout]:
    """The caption of each caption group, and the counts of a step.

    has_keep, sets, negatives: of the data folder, as in Layout.of.

    Raises:
        UsageError: the batch is too small.
    """
    size = effective_batch_size(config, processes)
    baseline = BASELINES.get(config.objective)
    learned: list[GroupCaption] = [learned_caption(concept)] if config.robust else []
    if baseline is None:
        groups = caption_groups(concept, config.caption_mode) + learned
        return groups, Layout.of(size, len(groups), has_keep, sets, negatives)
    groups = [*([concept.generic] if baseline.has_generic else []), *wordings(concept), *learned]
    sets = sets if baseline.images == "positive" else 1
    layout = Layout.of_baseline(size, len(groups), has_keep and config.retain, sets, baseline.images)
    return groups, layout


def learned_caption(concept: Concept) -> str:
    """The name of the caption of --robust, whose embedding is learned. No prompt looks like it."""
    return f"\0learned {concept.slug}"


def wordings(concept: Concept) -> list[GroupCaption]:
    """The caption and its paraphrases, by caption group. With many paraphrases, some share a group and take turns, so
    that a step does not grow with their number.
    """
    caption, *paraphrases = concept.captions
    if len(paraphrases) <= MOST_PARAPHRASES:
        return [caption, *paraphrases]
    return [caption, *(tuple(paraphrases[n::MOST_PARAPHRASES]) for n in range(MOST_PARAPHRASES))]


def caption_groups(concept: Concept, mode: CaptionMode) -> list[GroupCaption]:
    """The caption of each caption group.

    own: one group, every image under its own caption. shared: one group, all images under the generic caption. both:
    one group under the generic caption and others under the concept's wordings, each with positives and generic images.
    """
    groups: dict[str, list[GroupCaption]] = {
        "own": [None],
        "shared": [concept.generic],
        "both": [concept.generic, *wordings(concept)],
    }
    return groups[mode]


def check_batch_size(config: TrainConfig, concept: Concept, folder: Path, has_keep: bool = True) -> None:
    """Refuse a step that cannot hold what it needs, and options that contradict each other about its size.

    has_keep: as in Layout.of.

    Raises:
        UsageError: names --effective_batch_size and a sufficient value.
    """
    size, negatives = effective_batch_size(config, process_count()), has_negatives(folder, config.eta)
    for part in concept.parts:
        sets = len(positive_sets(folder)) if part is concept else 1
        captions, layout = compose_step(config, part, process_count(), has_keep, sets, negatives)
        alone = layout.unlabeled + layout.negative or layout.positive  # positives go where their unlabeled images are
        if len(captions) * alone + layout.keep < process_count():
            raise UsageError(
                f"--effective_batch_size {size} is too small for {process_count()} processes. Start fewer."
            )
