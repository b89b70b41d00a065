"""The metric of the bundled `digits` base: a small classifier of digit and ink (`reader.py` has what it measures)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from sd_unlearn.data.concept import Concept
from sd_unlearn.metrics.reader import Reader, ReaderClassifier, ReaderMetric

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = ("white", "red", "green", "blue", "yellow")
FEATURE_WIDTH = 64
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


READER = Reader("digits", {"digit": DIGITS, "ink": INKS}, 32, FEATURE_WIDTH, READER_DIR, load_reader)


class DigitsClassifier(ReaderClassifier):
    """Predicts digit and ink of images of any size (scaled to 32x32)."""

    reader = READER
    labels = READER.labels


class DigitsMetric(ReaderMetric):
    """What `ReaderMetric` measures, of digit and ink. Output: "digit" [N, 10], "ink" [N, 5], "features" [N, 64]."""

    classifier_class = DigitsClassifier
    what = "The bundled classifier of digit and ink, a small convolutional network"


def make_digits(concept: Concept | None = None) -> DigitsMetric:
    """For the registry: the metric digits. Raises as ReaderMetric."""
    return DigitsMetric(concept)
