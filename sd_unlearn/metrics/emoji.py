"""The metric of the bundled `emoji` base: a classifier of thing, style and background.

`reader.py` has what it measures, data/emoji_things.py the things and their categories. A category ("weapon") is a
label, too: an image shows it if it shows one of its things.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from sd_unlearn.data.concept import Concept
from sd_unlearn.data.emoji_things import CATEGORIES, THINGS
from sd_unlearn.metrics.reader import Reader, ReaderClassifier, ReaderMetric

ASSETS = Path(__file__).parent.parent / "assets"
READER_DIR = ASSETS / "emoji_reader"
STYLES = ("twemoji", "noto", "fluent", "fluent flat", "openmoji", "emojione")
BACKGROUNDS = ("white", "grey", "black", "red", "yellow", "green", "blue", "pink")
SIZE = 64  # width and height of images in pixels
FEATURE_WIDTH = 128
CHANNELS = (32, 64, 96, 128)  # of the bundled reader


class EmojiReader(nn.Module):
    """Images [B, 3, 64, 64] in [-1, 1] -> logits of thing, style and background."""

    def __init__(self, channels: Sequence[int] = CHANNELS) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

        layers: list[nn.Module] = []
        for inputs, outputs in zip((3, *channels), channels, strict=False):
            layers += [*block(inputs, outputs, 2), *block(outputs, outputs, 1)]
        side = SIZE >> len(channels)
        self.body = nn.Sequential(
            *layers,
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(channels[-1] * side * side, FEATURE_WIDTH),
            nn.ReLU(),
        )
        self.thing = nn.Linear(FEATURE_WIDTH, len(THINGS))
        self.style = nn.Linear(FEATURE_WIDTH, len(STYLES))
        self.background = nn.Linear(FEATURE_WIDTH, len(BACKGROUNDS))

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features [B, 128] of images [B, 3, 64, 64] in [-1, 1]."""
        return self.body(images)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.features(images)
        return self.thing(features), self.style(features), self.background(features)


@lru_cache(maxsize=1)
def load_reader() -> EmojiReader:
    """The bundled network in eval mode, on the CPU."""
    reader = EmojiReader()
    weights = load_file(READER_DIR / "model.safetensors")
    reader.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    return reader.eval().requires_grad_(False)


AXES = {"thing": THINGS, "style": STYLES, "background": BACKGROUNDS}
READER = Reader("emoji", AXES, SIZE, FEATURE_WIDTH, READER_DIR, load_reader, CATEGORIES)


class EmojiClassifier(ReaderClassifier):
    """Predicts thing, style and background of images of any size (scaled to 64x64)."""

    reader = READER
    labels = READER.labels


class EmojiMetric(ReaderMetric):
    """What `ReaderMetric` measures, of things, styles and backgrounds."""

    classifier_class = EmojiClassifier
    what = "The bundled classifier of thing, style and background, a small convolutional network"


def make_emoji(concept: Concept | None = None) -> EmojiMetric:
    """For the registry: the metric emoji. Raises as ReaderMetric."""
    return EmojiMetric(concept)
