"""The metric of a bundled base: its reader, a small classifier with one head per axis (digit and ink, for example).

The training data of a reader include invalid images (shuffled, overlaid and empty ones) with uniform targets, so a high
probability means a clean image and not only "more like a seven than like a two". The penultimate features are used for
drift, FID and KID.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from sd_unlearn import __version__
from sd_unlearn.data.concept import Concept
from sd_unlearn.errors import UnlearnError, UsageError, suggest
from sd_unlearn.io.reading import read_json
from sd_unlearn.metrics.base import DetectorOutput, ImageValues, PromptedImages
from sd_unlearn.metrics.drift import drift_rows
from sd_unlearn.metrics.frechet import frechet_with_interval
from sd_unlearn.metrics.labels import CLEAN, LabelPredictions, leakage_and_accuracy
from sd_unlearn.metrics.mmd import FEWEST, Distance, kid
from sd_unlearn.metrics.statistics import ratio_of_rates
from sd_unlearn.models.halving import FOR_METRIC, HalvingBatches
from sd_unlearn.results import Card, Row

_BATCH = 500


@dataclass(frozen=True)
class Reader:
    """The classifier of a bundled base: a network with a method `features` and, named as each axis, a linear layer."""

    base: str  # digits, emoji
    axes: dict[str, tuple[str, ...]]  # axis -> its labels
    size: int  # width and height of the network's images in pixels
    width: int  # number of features
    folder: Path  # config.json, model.safetensors and held_apart.safetensors
    load: Callable[[], Any]  # the network in eval mode
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # more labels: each stands for several

    @property
    def labels(self) -> tuple[str, ...]:
        return (*(label for labels in self.axes.values() for label in labels), *self.categories)

    def predictions(self, output: DetectorOutput) -> LabelPredictions:
        probabilities = {axis: output[axis] for axis in self.axes}
        return LabelPredictions(self.axes, probabilities, output["features"], self.categories)

    def held_apart(self) -> dict[str, NDArray]:
        """Features [N, width], and the label [N] on each axis, of real images that no bundled model was trained on.

        Those of emoji are new placements of drawings that the models were trained on.
        """
        held = load_file(self.folder / "held_apart.safetensors")
        return {name: (tensor.float() if name == "features" else tensor).numpy() for name, tensor in held.items()}


class ReaderClassifier:
    """Predicts the labels of images of any size (scaled to the reader's).

    Raises:
        UnlearnError: the weights are not installed.
    """

    reader: ClassVar[Reader]
    labels: tuple[str, ...]
    rejects_invalid = True

    def __init__(self) -> None:
        config = self.reader.folder / "config.json"
        if not config.is_file():
            raise UnlearnError(
                f"{config} does not exist: the classifier of {self.reader.base} is not part of this installation. In a "
                f"clone, train it: python scripts/build_{self.reader.base}.py."
            )
        sha = read_json(config)["sha256"]
        self.name = f"{self.reader.base}-reader sha256:{sha[:12]}"
        self.batches = HalvingBatches("classifying images", FOR_METRIC)

    @torch.no_grad()
    def read(self, images: Sequence[Image.Image]) -> LabelPredictions:
        network, reader = self.reader.load(), self.reader

        def read(batch: Sequence[Image.Image]) -> list[NDArray]:
            size = (reader.size, reader.size)
            pixels = np.stack([np.asarray(image.convert("RGB").resize(size)) for image in batch])
            hidden = network.features(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)
            return [*(getattr(network, axis)(hidden).softmax(1).numpy() for axis in reader.axes), hidden.numpy()]

        none = [np.zeros((0, width)) for width in (*map(len, reader.axes.values()), reader.width)]
        parts = zip(none, *self.batches.map(read, images, _BATCH), strict=True)
        arrays = [np.concatenate(part) for part in parts]
        return reader.predictions(dict(zip((*reader.axes, "features"), arrays, strict=True)))


class ReaderMetric:
    """Leakage, accuracy, clean replacement, drift and distances to real images.

    Output: the probabilities [N, labels] of each axis and "features" [N, width].

    Raises:
        UsageError: the concept's label is not one of the reader's.
    """

    classifier_class: ClassVar[type[ReaderClassifier]]
    what: ClassVar[str]  # the reader in the metric's card

    def __init__(self, concept: Concept | None = None) -> None:
        self.reader = self.classifier_class.reader
        if concept:
            self._label(concept)
        self.classifier = self.classifier_class()
        self.name = self.classifier.name

    def card(self) -> Card:
        base, axes = self.reader.base, list(self.reader.axes)
        return Card(
            self.name,
            ("leakage", "accuracy", "clean_replacement", "drift", f"fid-{base}", f"kid-{base}"),
            f"{self.what}; images are scaled to {self.reader.size} pixels.",
            f"sd-unlearn {__version__}",
            self.name.split()[-1],
            f"the most probable {', '.join(axes[:-1])} and {axes[-1]}; p >= {CLEAN} for a clean replacement",
            "It works on images of the bundled base only. Its distances are comparable only with each other.",
        )

    def read(self, images: Sequence[Image.Image]) -> DetectorOutput:
        predictions = self.classifier.read(images)
        return {**predictions.probabilities, "features": predictions.features}

    def count(self, prompted: PromptedImages, output: DetectorOutput) -> list[ImageValues]:
        """Leakage and accuracy.

        Raises:
            UsageError: the concept's label is not one of the reader's.
        """
        predictions = self.reader.predictions(output)
        return leakage_and_accuracy(prompted, self._label(prompted.concept), predictions.has_label, predictions.shows)

    def compare(self, prompted: PromptedImages, base: DetectorOutput, output: DetectorOutput) -> list[Row]:
        """Clean replacement, drift, and the distances to real images of both subjects ("base", and "" for the LoRA).

        Raises:
            UsageError: the concept's label is not one of the reader's.
        """
        label = self._label(prompted.concept)
        rows = self._clean_replacement(label, prompted, base, output)
        rows += drift_rows(prompted, base, output, self.name)
        alike = prompted.in_groups("alike")
        for subject, features in (("base", base["features"][alike]), ("", output["features"][alike])):
            rows += self._to_real_images(label, subject, features)
        return rows

    def words(self, output: DetectorOutput, index: int) -> str:
        return self.reader.predictions(output).words(index)

    def _label(self, concept: Concept) -> str:
        label, labels = concept.label or concept.name, self.reader.labels
        if label not in labels:
            raise UsageError(
                f'The metric {self.reader.base} has no label "{label}" (label: of the concept file).'
                f"{suggest(label, labels)} Its labels: {', '.join(labels)}. Use another metric for other concepts."
            )
        return label

    def _clean_replacement(
        self, label: str, prompted: PromptedImages, base: DetectorOutput, output: DetectorOutput
    ) -> list[Row]:
        """Share of clean images of something else, over the share of clean images that the base generates by default.

        The numerator is of the direct prompts with the LoRA, the denominator of the generic prompt without it.
        """
        direct, generic = prompted.in_groups("direct"), prompted.in_groups("generic")
        if not (direct.any() and generic.any()):
            return []
        replaced = self.reader.predictions(output).confident(label, CLEAN, other_than=True)[direct]
        default = self.reader.predictions(base).confident(label, CLEAN, other_than=False)[generic]
        estimate = ratio_of_rates(int(replaced.sum()), len(replaced), int(default.sum()), len(default))
        value, low, high = (None if math.isnan(x) else x for x in estimate)  # a ratio over zero; JSON has no NaN
        note = (
            f"read as something else on its axis with p >= {CLEAN}, over the base's generic images read as anything so"
        )
        return [Row("clean_replacement", "direct", "", value, len(replaced), low, high, self.name, "mover", note)]

    def _to_real_images(self, label: str, subject: str, features: NDArray) -> list[Row]:
        """Distances of images of the similar concepts (the labels of `alike`) to real images without the concept."""
        held = self.reader.held_apart()
        axis, members = self.reader.predictions(held).members(label)
        numbers = [self.reader.axes[axis].index(member) for member in members]
        real = held["features"][~np.isin(held[axis], numbers)]
        sets = f"of the alike images to held-apart images of {self.reader.base}"
        return distance_rows(features, real, "alike", subject, self.name, sets, self.reader.base)


def distance_rows(
    generated: NDArray, real: NDArray, group: str, subject: str, detector: str, sets: str, base: str = "digits"
) -> list[Row]:
    """fid-<base> and kid-<base> of features [N, D] to real ones [M, D]; each only if N is large enough.

    Args:
        sets: What is compared, for the rows' note: "of the images to 500 real ones".
    """
    rows, (n, width) = [], generated.shape

    def row(metric: str, distance: Distance, interval: str, note: str) -> Row:
        return Row(metric, group, subject, distance.value, n, distance.low, distance.high, detector, interval, note)

    if n > width:
        note = f"Frechet distance of the detector's features {sets}; comparable for the same n only"
        rows.append(row(f"fid-{base}", frechet_with_interval(generated, real), "bootstrap-width", note))
    if n >= FEWEST:
        note = f"kernel distance of the detector's features {sets}, unbiased"
        if n <= width:
            note += f"; no fid-{base}: it needs more than {width} images"
        rows.append(row(f"kid-{base}", kid(generated, real), "half-sampling", note))
    return rows
