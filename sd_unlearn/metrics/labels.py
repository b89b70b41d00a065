"""Classifiers that assign each image one label on one or more axes, and the two metrics computed from their labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sd_unlearn.metrics.base import CONCEPT_GROUPS, KEEP_GROUPS, ImageValues, PromptedImages

CLEAN = 0.9  # probability from which an image counts as clean, if the classifier `rejects_invalid`


@dataclass(frozen=True)
class LabelPredictions:
    """A classifier's output on N images."""

    axes: dict[str, tuple[str, ...]]  # axis (digit, ink, ...) -> its labels
    probabilities: dict[str, NDArray]  # axis -> [N, labels]
    features: NDArray  # [N, D]
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # e.g. animal: the labels of one axis

    def members(self, label: str) -> tuple[str, tuple[str, ...]]:
        """The axis of a label or a category, and the labels that it stands for: of a label itself.

        Raises:
            KeyError: no axis has this label.
        """
        members = self.categories.get(label, (label,))
        for axis, labels in self.axes.items():
            if members[0] in labels:
                return axis, members
        raise KeyError(label)

    def has_label(self, label: str) -> bool:
        return label in self.categories or any(label in labels for labels in self.axes.values())

    def shows(self, label: str) -> NDArray[np.bool_]:
        """[N] whether `label`, or a label of this category, is the most probable one of its axis."""
        axis, members = self.members(label)
        return np.isin(self.probabilities[axis].argmax(1), [self.axes[axis].index(member) for member in members])

    def confident(self, label: str, threshold: float, other_than: bool) -> NDArray[np.bool_]:
        """[N] whether an image has a label with p >= threshold on `label`'s axis; `other_than`: not `label`."""
        axis = self.members(label)[0]
        confident = self.probabilities[axis].max(1) >= threshold
        return confident & ~self.shows(label) if other_than else confident

    def words(self, index: int) -> str:
        """The most probable label of one image on every axis."""
        return " ".join(labels[int(self.probabilities[axis][index].argmax())] for axis, labels in self.axes.items())


class LabelClassifier(Protocol):
    """A classifier with a fixed set of labels; also used by the training probe."""

    name: str  # with version or hash
    labels: tuple[str, ...]
    rejects_invalid: bool  # trained to have no high probability on invalid images

    def read(self, images: Sequence[Image.Image]) -> LabelPredictions: ...


def leakage_and_accuracy(
    prompted: PromptedImages, label: str, has_label: Callable[[str], bool], shows: Callable[[str], NDArray[np.bool_]]
) -> list[ImageValues]:
    """Leakage of the concept groups and accuracy of the keep groups.

    An image of a keep prompt is correct if the classifier predicts every word that the prompt expects. Prompts that
    expect nothing, or a word that is not a label, are left out of accuracy.

    Args:
        label: The concept's label.
        has_label: Whether a word is a label of the classifier.
        shows: [N] whether each image is predicted as a label.
    """
    values_of = []
    in_concept_groups = prompted.in_groups(*CONCEPT_GROUPS)
    if in_concept_groups.any():
        leaks = np.where(in_concept_groups, shows(label), np.nan)
        values_of.append(ImageValues("leakage", CONCEPT_GROUPS, leaks, note=f"read as {label}"))
    expected = [prompt.expect for prompt in prompted.prompts]
    has_labels = np.array([bool(words) and all(map(has_label, words)) for words in expected], dtype=bool)
    rated = np.flatnonzero(prompted.in_groups(*KEEP_GROUPS) & has_labels)
    if len(rated):
        predicted = {word: shows(word) for i in rated for word in expected[i]}
        correct = np.full(len(prompted), np.nan)
        for i in rated:
            correct[i] = all(predicted[word][i] for word in expected[i])
        values_of.append(ImageValues("accuracy", KEEP_GROUPS, correct, note="read as asked"))
    return values_of
