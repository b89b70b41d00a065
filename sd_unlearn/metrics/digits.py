"""The bundled reader of digit and ink: the judge of everything drawn by the bundled `digits` base.

A small convolutional network with two heads. It was also shown garbage (shuffled, overlaid and empty
images) with uniform targets, so that a high probability means "a clean digit", not merely "more like a
seven than like a two". Its 64-wide penultimate features serve `fid-digits` and the drift measure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from sd_unlearn import __version__
from sd_unlearn.data.concept import Concept
from sd_unlearn.errors import UsageError, suggest
from sd_unlearn.metrics.base import Columns, Counted, Shots
from sd_unlearn.metrics.drift import drift_rows
from sd_unlearn.metrics.fidelity import frechet_estimate
from sd_unlearn.metrics.labels import Reading, count_read
from sd_unlearn.metrics.mmd import FEWEST, Estimate, kid
from sd_unlearn.metrics.statistics import bootstrap, ratio_of_means
from sd_unlearn.results import Card, Row

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = ("white", "red", "green", "blue", "yellow")
FEATURE_WIDTH = 64
CLEAN = 0.9  # probability from which an image counts as a good image of something
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
    """The bundled reader in eval mode, on CPU."""
    reader = DigitReader()
    reader.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in load_file(READER_DIR / "model.safetensors").items()}
    )
    return reader.eval().requires_grad_(False)


class DigitsJudge:
    """Reads digit and ink of images of any size (scaled to 32x32)."""

    labels: tuple[str, ...] = (*DIGITS, *INKS)

    def __init__(self) -> None:
        sha = json.loads((READER_DIR / "config.json").read_text())["sha256"]
        self.name = f"digits-reader sha256:{sha[:12]}"

    @torch.no_grad()
    def read(self, images: Sequence[Image.Image]) -> Reading:
        reader, axes = load_reader(), {"digit": DIGITS, "ink": INKS}
        found = [np.zeros((0, len(DIGITS))), np.zeros((0, len(INKS))), np.zeros((0, FEATURE_WIDTH))]
        for chunk in (images[i : i + 500] for i in range(0, len(images), 500)):
            pixels = np.stack([np.asarray(image.convert("RGB").resize((32, 32))) for image in chunk])
            features = reader.features(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)
            parts = (reader.digit(features).softmax(1), reader.ink(features).softmax(1), features)
            found = [np.concatenate([old, new.numpy()]) for old, new in zip(found, parts, strict=True)]
        return Reading(axes, {"digit": found[0], "ink": found[1]}, found[2])


def held_apart() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [N, 64], digit [N] and ink [N] of the real digits that nothing was trained on."""
    held = load_file(READER_DIR / "held_apart.safetensors")
    return held["features"].float().numpy(), held["digit"].numpy(), held["ink"].numpy()


class DigitsQuestion:
    """Digit and ink of every picture, and how good the pictures still are.

    Columns: "digit" [N, 10] and "ink" [N, 5] probabilities, "features" [N, 64].

    Raises:
        UsageError: a concept that is neither a digit nor an ink.
    """

    def __init__(self, concept: Concept | None = None) -> None:
        if concept:
            _label(concept)
        self.judge = DigitsJudge()
        self.name = self.judge.name

    def card(self) -> Card:
        return Card(
            self.name,
            ("leakage", "accuracy", "clean_replacement", "drift", "fid-digits", "kid-digits"),
            "The bundled reader of digit and ink, a small convolutional network; pictures are scaled to 32 pixels.",
            f"sd-unlearn {__version__}",
            self.name.split()[-1],
            f"the most probable digit and ink; p >= {CLEAN} for a clean replacement",
            "It reads the bundled base's pictures and nothing else. Its distances compare with each other alone.",
        )

    def read(self, images: Sequence[Image.Image]) -> Columns:
        reading = self.judge.read(images)
        return {**reading.probabilities, "features": reading.features}

    def count(self, shots: Shots, columns: Columns) -> list[Counted]:
        """Leakage and accuracy.

        Raises:
            UsageError: a concept that is neither a digit nor an ink.
        """
        reading = _reading(columns)
        return count_read(shots, _label(shots.concept), reading.knows, reading.shows)

    def compare(self, shots: Shots, base: Columns, columns: Columns) -> list[Row]:
        """Clean replacement, drift, and the distances to real digits: of the base (subject "base") and of ours ("").

        Raises:
            UsageError: a concept that is neither a digit nor an ink.
        """
        label = _label(shots.concept)
        rows = _clean_replacement(label, self.name, shots, base, columns)
        rows += drift_rows(shots, base, columns, self.name)
        alike = shots.of("alike")
        for subject, features in (("base", base["features"][alike]), ("", columns["features"][alike])):
            rows += _to_real_digits(label, self.name, subject, features)
        return rows

    def words(self, columns: Columns, index: int) -> str:
        return _reading(columns).words(index)


def make_digits(concept: Concept | None = None) -> DigitsQuestion:
    """For the registry: the metric digits. Raises as DigitsQuestion."""
    return DigitsQuestion(concept)


def _label(concept: Concept) -> str:
    label = concept.label or concept.name
    if label not in DigitsJudge.labels:
        known = ", ".join(DigitsJudge.labels)
        raise UsageError(
            f'The metric digits does not know "{label}" (label: of the concept file).'
            f"{suggest(label, DigitsJudge.labels)} It reads {known}; take another metric for anything else."
        )
    return label


def _reading(columns: Columns) -> Reading:
    probabilities = {"digit": columns["digit"], "ink": columns["ink"]}
    return Reading({"digit": DIGITS, "ink": INKS}, probabilities, columns["features"])


def _clean_replacement(label: str, detector: str, shots: Shots, base: Columns, columns: Columns) -> list[Row]:
    """Clean pictures of something else, over how many clean ones the base draws when nothing is asked for."""
    direct, generic = shots.of("direct"), shots.of("generic")
    if not (direct.any() and generic.any()):
        return []
    good = _reading(columns).confident(label, CLEAN, other_than=True)[direct].astype(float)
    usual = _reading(base).confident(label, CLEAN, other_than=False)[generic].astype(float)
    figures = (ratio_of_means(good, usual), *bootstrap(ratio_of_means, good, usual, paired=False))
    value, low, high = (None if math.isnan(x) else x for x in figures)  # over zero it is unknown; JSON has no NaN
    note = f"read as something else on its axis with p >= {CLEAN}, over the base's generic images read as anything so"
    return [Row("clean_replacement", "direct", "", value, len(good), low, high, detector, "bootstrap", note)]


def _to_real_digits(label: str, detector: str, subject: str, drawn: np.ndarray) -> list[Row]:
    """Images of what is most alike (the other digits or inks) against held-apart real ones without the concept."""
    features, digits, inks = held_apart()
    real = features[digits != DIGITS.index(label)] if label in DIGITS else features[inks != INKS.index(label)]
    return distance_rows(drawn, real, "alike", subject, detector, "of the alike images to real held-apart digits")


def distance_rows(drawn: np.ndarray, real: np.ndarray, group: str, subject: str, detector: str, told: str) -> list[Row]:
    """fid-digits and kid-digits of the reader's features [N, 64] to real ones [M, 64]: what N is enough for.

    told: whose features and to what, for the note: "of the images to 500 real ones".
    """
    rows, count = [], len(drawn)

    def row(metric: str, found: Estimate, interval: str, note: str) -> Row:
        return Row(metric, group, subject, found.value, count, found.low, found.high, detector, interval, note)

    if count > FEATURE_WIDTH:
        note = f"Frechet distance of the detector's features {told}"
        rows.append(row("fid-digits", frechet_estimate(drawn, real), "basic-bootstrap", note))
    if count >= FEWEST:
        note = f"kernel distance of the detector's features {told}, unbiased"
        if count <= FEATURE_WIDTH:
            note += f"; no fid-digits: it needs more than {FEATURE_WIDTH} images"
        rows.append(row("kid-digits", kid(drawn, real), "half-sampling", note))
    return rows
