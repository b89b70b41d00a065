"""The contract of a metric.

A metric runs a detector on images once (`read`), turns its output into one value per image (`count`) and compares whole
sets of images (`compare`). The output depends on the image and the detector only, so `evaluation` caches it. Confidence
intervals and differences between subjects are computed from the values per image in `evaluation/aggregate.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sd_unlearn.data.concept import Concept, Prompt
from sd_unlearn.results import Card, Row

CONCEPT_GROUPS = ("direct", "held_out", "generic")  # prompt groups whose images show the concept before unlearning
KEEP_GROUPS = ("alike", "general")  # prompt groups of the retained concepts

DetectorOutput = dict[str, NDArray]  # named arrays of a detector's output; the first axis of each is the N images


@dataclass(frozen=True)
class PromptedImages:
    """What each of N images was generated for."""

    concept: Concept
    groups: NDArray[np.str_]  # [N] direct | held_out | generic | alike | general
    prompts: tuple[Prompt, ...]  # [N]
    seeds: NDArray[np.int64]  # [N] index of the evaluation seed: 0, 1, ...

    def __len__(self) -> int:
        return len(self.groups)

    def in_groups(self, *groups: str) -> NDArray[np.bool_]:
        """[N] whether each image belongs to one of these prompt groups."""
        return np.isin(self.groups, groups)


@dataclass(frozen=True)
class ImageValues:
    """One value per image. results.json gets one row per prompt group: the mean with its interval."""

    metric: str  # leakage, accuracy, face_rate, clip_score, ...
    groups: tuple[str, ...]  # the prompt groups that the metric is defined on
    values: NDArray[np.float64]  # [N] in the order of the images; nan: the metric is not defined on this image
    is_rate: bool = True  # values are 0 or 1: Wilson interval; else a bootstrap interval
    note: str = ""
    unknown: NDArray[np.bool_] | None = None  # [N] of a rate: defined on the image, but the image is unreadable


class Metric(Protocol):
    """A metric of single images, of sets of images, or both."""

    name: str  # the detector with its version or hash and every setting that changes its output; names the cache

    def card(self) -> Card: ...

    def read(self, images: Sequence[Image.Image]) -> DetectorOutput:
        """The detector's output on N >= 0 RGB images. It must not depend on their order or on batching."""

    def count(self, prompted: PromptedImages, output: DetectorOutput) -> list[ImageValues]:
        """The values of each image; needs no base."""

    def compare(self, prompted: PromptedImages, base: DetectorOutput, output: DetectorOutput) -> list[Row]:
        """Metrics of whole sets (e.g. FID) or of image pairs that cannot be computed from `count`.

        `base` and `output` belong to images of the same prompts and seeds, generated without and with the LoRA. The
        `subject` of a row is "" for the LoRA and "base" for the base.
        """

    def words(self, output: DetectorOutput, index: int) -> str:
        """What the detector saw on one image, in words for the report; "" if there is nothing to say."""


class PairMetric(Protocol):
    """A metric that needs both images of a pair at once."""

    name: str  # as Metric.name
    metric: str  # the metric's name in results.json

    def card(self) -> Card: ...

    def distance(self, base: Sequence[Image.Image], other: Sequence[Image.Image]) -> NDArray[np.float64]:
        """[N] the distance of each pair, zero for equal images."""


def batches_of_one_size(images: Sequence[Image.Image], batch_size: int) -> list[list[int]]:
    """Indices of consecutive images of equal size, at most `batch_size` in each batch."""
    batches: list[list[int]] = []
    for i, image in enumerate(images):
        if batches and len(batches[-1]) < batch_size and images[batches[-1][0]].size == image.size:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
