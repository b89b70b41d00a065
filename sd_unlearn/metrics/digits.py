"""The metric of the bundled `digits` base: a small classifier of digit and ink.

The classifier is a convolutional network with two heads. Its training data included invalid images (shuffled, overlaid
and empty ones) with uniform targets, so a high probability means a clean digit and not only "more like a seven than
like a two". Its 64 penultimate features are used for fid-digits, kid-digits and drift.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from sd_unlearn import __version__
from sd_unlearn.data.concept import Concept
from sd_unlearn.errors import UsageError, suggest
from sd_unlearn.io.reading import read_json
from sd_unlearn.metrics.base import DetectorOutput, ImageValues, PromptedImages
from sd_unlearn.metrics.drift import drift_rows
from sd_unlearn.metrics.frechet import frechet_with_interval
from sd_unlearn.metrics.labels import LabelPredictions, leakage_and_accuracy
from sd_unlearn.metrics.mmd import FEWEST, Distance, kid
from sd_unlearn.metrics.statistics import bootstrap, ratio_of_means
from sd_unlearn.models.halving import FOR_METRIC, HalvingBatches
from sd_unlearn.results import Card, Row

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = ("white", "red", "green", "blue", "yellow")
FEATURE_WIDTH = 64
CLEAN = 0.9  # probability from which an image counts as a clean digit
_BATCH = 500
READER_DIR = Path(__file__).parent.parent / "assets" / "digits_reader"


class DigitReader(nn.Module):
    """Images [B, 3, 32, 32] in [-1, 1] -> (digit logits [B, 10], ink logits [B, 5])."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

        self.body = nn.Sequential(
            *block(3, 32),
            *block(32, 32),
            nn.MaxPool2d(2),
            *block(32, 64),
            *block(64, 64),
            nn.MaxPool2d(2),
            *block(64, 96),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(96 * 16, FEATURE_WIDTH),
            nn.ReLU(),
        )
        self.digit = nn.Linear(FEATURE_WIDTH, len(DIGITS))
        self.ink = nn.Linear(FEATURE_WIDTH, len(INKS))

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features [B, 64] of images [B, 3, 32, 32] in [-1, 1]."""
        return self.body(images)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        return self.digit(features), self.ink(features)


@lru_cache(maxsize=1)
def load_reader() -> DigitReader:
    """The bundled network in eval mode, on the CPU."""
    reader = DigitReader()
    reader.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in load_file(READER_DIR / "model.safetensors").items()}
    )
    return reader.eval().requires_grad_(False)


class DigitsClassifier:
    """Predicts digit and ink of images of any size (scaled to 32x32)."""

    labels: tuple[str, ...] = (*DIGITS, *INKS)

    def __init__(self) -> None:
        sha = read_json(READER_DIR / "config.json")["sha256"]
        self.name = f"digits-reader sha256:{sha[:12]}"
        self.batches = HalvingBatches("classifying images", FOR_METRIC)

    @torch.no_grad()
    def read(self, images: Sequence[Image.Image]) -> LabelPredictions:
        reader = load_reader()

        def read(batch: Sequence[Image.Image]) -> tuple[NDArray, NDArray, NDArray]:
            pixels = np.stack([np.asarray(image.convert("RGB").resize((32, 32))) for image in batch])
            hidden = reader.features(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)
            return reader.digit(hidden).softmax(1).numpy(), reader.ink(hidden).softmax(1).numpy(), hidden.numpy()

        none = tuple(np.zeros((0, width)) for width in (len(DIGITS), len(INKS), FEATURE_WIDTH))
        parts = zip(none, *self.batches.map(read, images, _BATCH), strict=True)
        return _predictions(*(np.concatenate(arrays) for arrays in parts))


def held_out_digits() -> tuple[NDArray, NDArray, NDArray]:
    """Features [N, 64], digit [N] and ink [N] of real digits that no bundled model was trained on."""
    held = load_file(READER_DIR / "held_apart.safetensors")
    return held["features"].float().numpy(), held["digit"].numpy(), held["ink"].numpy()


class DigitsMetric:
    """Leakage, accuracy, clean replacement, drift and distances to real digits.

    Output: "digit" [N, 10] and "ink" [N, 5] probabilities, "features" [N, 64].

    Raises:
        UsageError: the concept is neither a digit nor an ink.
    """

    def __init__(self, concept: Concept | None = None) -> None:
        if concept:
            _label(concept)
        self.classifier = DigitsClassifier()
        self.name = self.classifier.name

    def card(self) -> Card:
        return Card(
            self.name,
            ("leakage", "accuracy", "clean_replacement", "drift", "fid-digits", "kid-digits"),
            "The bundled classifier of digit and ink, a small convolutional network; images are scaled to 32 pixels.",
            f"sd-unlearn {__version__}",
            self.name.split()[-1],
            f"the most probable digit and ink; p >= {CLEAN} for a clean replacement",
            "It works on images of the bundled base only. Its distances are comparable only with each other.",
        )

    def read(self, images: Sequence[Image.Image]) -> DetectorOutput:
        predictions = self.classifier.read(images)
        return {**predictions.probabilities, "features": predictions.features}

    def count(self, prompted: PromptedImages, output: DetectorOutput) -> list[ImageValues]:
        """Leakage and accuracy.

        Raises:
            UsageError: the concept is neither a digit nor an ink.
        """
        predictions = _predictions(**output)
        return leakage_and_accuracy(prompted, _label(prompted.concept), predictions.has_label, predictions.shows)

    def compare(self, prompted: PromptedImages, base: DetectorOutput, output: DetectorOutput) -> list[Row]:
        """Clean replacement, drift, and the distances to real digits of both subjects ("base", and "" for the LoRA).

        Raises:
            UsageError: the concept is neither a digit nor an ink.
        """
        label = _label(prompted.concept)
        rows = _clean_replacement(label, self.name, prompted, base, output)
        rows += drift_rows(prompted, base, output, self.name)
        alike = prompted.in_groups("alike")
        for subject, features in (("base", base["features"][alike]), ("", output["features"][alike])):
            rows += _to_real_digits(label, self.name, subject, features)
        return rows

    def words(self, output: DetectorOutput, index: int) -> str:
        return _predictions(**output).words(index)


def make_digits(concept: Concept | None = None) -> DigitsMetric:
    """For the registry: the metric digits. Raises as DigitsMetric."""
    return DigitsMetric(concept)


def _label(concept: Concept) -> str:
    label = concept.label or concept.name
    if label not in DigitsClassifier.labels:
        known = ", ".join(DigitsClassifier.labels)
        raise UsageError(
            f'The metric digits has no label "{label}" (label: of the concept file).'
            f"{suggest(label, DigitsClassifier.labels)} Its labels: {known}. Use another metric for other concepts."
        )
    return label


def _predictions(digit: NDArray, ink: NDArray, features: NDArray) -> LabelPredictions:
    return LabelPredictions({"digit": DIGITS, "ink": INKS}, {"digit": digit, "ink": ink}, features)


def _clean_replacement(
    label: str, detector: str, prompted: PromptedImages, base: DetectorOutput, output: DetectorOutput
) -> list[Row]:
    """Share of clean images of something else, over the share of clean images that the base generates by default.

    The numerator is of the direct prompts with the LoRA, the denominator of the generic prompt without it.
    """
    direct, generic = prompted.in_groups("direct"), prompted.in_groups("generic")
    if not (direct.any() and generic.any()):
        return []
    replaced = _predictions(**output).confident(label, CLEAN, other_than=True)[direct].astype(float)
    default = _predictions(**base).confident(label, CLEAN, other_than=False)[generic].astype(float)
    estimate = (ratio_of_means(replaced, default), *bootstrap(ratio_of_means, replaced, default, paired=False))
    value, low, high = (None if math.isnan(x) else x for x in estimate)  # a ratio over zero; JSON has no NaN
    note = f"read as something else on its axis with p >= {CLEAN}, over the base's generic images read as anything so"
    return [Row("clean_replacement", "direct", "", value, len(replaced), low, high, detector, "bootstrap", note)]


def _to_real_digits(label: str, detector: str, subject: str, features: NDArray) -> list[Row]:
    """Distances of images of the similar concepts (the other digits or inks) to real digits without the concept."""
    real, digits, inks = held_out_digits()
    real = real[digits != DIGITS.index(label)] if label in DIGITS else real[inks != INKS.index(label)]
    return distance_rows(features, real, "alike", subject, detector, "of the alike images to real held-apart digits")


def distance_rows(generated: NDArray, real: NDArray, group: str, subject: str, detector: str, sets: str) -> list[Row]:
    """fid-digits and kid-digits of features [N, 64] to real ones [M, 64]; each only if N is large enough.

    Args:
        sets: What is compared, for the rows' note: "of the images to 500 real ones".
    """
    rows, n = [], len(generated)

    def row(metric: str, distance: Distance, interval: str, note: str) -> Row:
        return Row(metric, group, subject, distance.value, n, distance.low, distance.high, detector, interval, note)

    if n > FEATURE_WIDTH:
        note = f"Frechet distance of the detector's features {sets}"
        rows.append(row("fid-digits", frechet_with_interval(generated, real), "basic-bootstrap", note))
    if n >= FEWEST:
        note = f"kernel distance of the detector's features {sets}, unbiased"
        if n <= FEATURE_WIDTH:
            note += f"; no fid-digits: it needs more than {FEATURE_WIDTH} images"
        rows.append(row("kid-digits", kid(generated, real), "half-sampling", note))
    return rows
