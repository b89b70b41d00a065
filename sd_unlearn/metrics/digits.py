"""The bundled reader of digit and ink: the judge of everything drawn by the bundled `digits` base.

A small convolutional network with two heads. It was also shown garbage (shuffled, overlaid and empty
images) with uniform targets, so that a high probability means "a clean digit", not merely "more like a
seven than like a two". Its 64-wide penultimate features serve `fid-digits` and the drift measure.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from sd_unlearn.metrics.judge import Reading

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
            *block(3, 32), *block(32, 32), nn.MaxPool2d(2),
            *block(32, 64), *block(64, 64), nn.MaxPool2d(2),
            *block(64, 96), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3),
            nn.Linear(96 * 16, FEATURE_WIDTH), nn.ReLU(),
        )  # fmt: skip
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
