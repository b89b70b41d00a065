"""What a judge is: something that reads images as one of several labels on one or more axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sd_unlearn.metrics.base import ASKED, KEPT, Counted, Shots


@dataclass(frozen=True)
class Reading:
    """A judge's word on N images: p(label) on each axis [N, labels], and features [N, D]."""

    axes: dict[str, tuple[str, ...]]
    probabilities: dict[str, NDArray]
    features: NDArray

    def axis_of(self, label: str) -> str:
        """The axis a label is on.

        Raises:
            KeyError: no axis has it.
        """
        for axis, labels in self.axes.items():
            if label in labels:
                return axis
        raise KeyError(label)

    def knows(self, label: str) -> bool:
        return any(label in labels for labels in self.axes.values())

    def shows(self, label: str) -> NDArray[np.bool_]:
        """[N] whether each image is read as `label` rather than another label of its axis."""
        axis = self.axis_of(label)
        return self.probabilities[axis].argmax(1) == self.axes[axis].index(label)

    def confident(self, label: str, threshold: float, other_than: bool) -> NDArray[np.bool_]:
        """[N] whether each image is read on `label`'s axis with p >= threshold, as anything or as something else."""
        axis = self.axis_of(label)
        sure = self.probabilities[axis].max(1) >= threshold
        return sure & ~self.shows(label) if other_than else sure

    def words(self, index: int) -> str:
        """What one image was read as, on every axis."""
        return " ".join(labels[int(self.probabilities[axis][index].argmax())] for axis, labels in self.axes.items())


class Judge(Protocol):
    """Name (with version or hash) of the detector, what it can tell apart, and its reading of images."""

    name: str
    labels: tuple[str, ...]

    def read(self, images: Sequence[Image.Image]) -> Reading: ...


def count_read(
    shots: Shots, label: str, knows: Callable[[str], bool], shows: Callable[[str], NDArray[np.bool_]]
) -> list[Counted]:
    """What a reader of labels counts: leakage of what was asked for, accuracy of what was kept.

    label: the concept's. knows: whether a word is a label. shows: [N] whether each picture is read as a label.
    A kept picture is right when it is read as every word its prompt expects; it is not asked of prompts that expect
    nothing, or a word that is no label.
    """
    counted, asked = [], shots.of(*ASKED)
    if asked.any():
        values = np.where(asked, shows(label), np.nan)
        counted.append(Counted("leakage", ASKED, values, note=f"read as {label}"))
    words = [prompt.expect for prompt in shots.prompts]
    judged = shots.of(*KEPT) & np.array([bool(w) and all(map(knows, w)) for w in words], dtype=bool)
    if judged.any():
        shown = {word: shows(word) for i in np.flatnonzero(judged) for word in words[i]}
        values = np.full(len(shots), np.nan)
        for i in np.flatnonzero(judged):
            values[i] = all(shown[word][i] for word in words[i])
        counted.append(Counted("accuracy", KEPT, values, note="read as asked"))
    return counted
