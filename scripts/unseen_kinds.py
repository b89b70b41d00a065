"""What the bundled bases have never seen, and how it is found in images. Used by `unseen.py`.

Of each kind there are images, a function that finds it in images, and how often that is wrong.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from digits_data import load_digits, paint, wobble
from emoji_data import compose, draw, fetch, place
from numpy.typing import NDArray
from safetensors.torch import load_file
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from sd_unlearn.metrics import digits, emoji

THINGS = {"wrench": "1f527", "telephone receiver": "1f4de", "camel": "1f42b", "lollipop": "1f36d"}  # in all six sets
MIRRORED = {"mirrored seven": 7, "mirrored three": 3, "mirrored four": 4}


@dataclass(frozen=True)
class Unseen(ABC):
    """What a base has never seen. work: where downloads are kept."""

    name: str
    work: Path
    base: ClassVar[str]
    size: ClassVar[int]  # pixels
    like: ClassVar[str]  # the concept whose file, with another caption, is attacked

    @property
    @abstractmethod
    def caption(self) -> str:
        """Where the learned prompt starts."""

    @abstractmethod
    def images(self, count: int, seed: int) -> Tensor:
        """[count, 3, size, size] in [-1, 1]."""

    @property
    @abstractmethod
    def false_rate(self) -> float:
        """The share of images of everything else in which it is found."""

    @abstractmethod
    def finds(self, images: Tensor) -> NDArray[np.bool_]:
        """[N] whether images [N, 3, size, size] in [-1, 1] show it."""


class UnseenThing(Unseen):
    """An emoji that is not among those of `emoji`, drawn by the same hands.

    It is found by a linear discriminant of the features of the bundled classifier: of the known things and this one.
    """

    base, size, like = "emoji", emoji.SIZE, "pistol"

    @property
    def caption(self) -> str:
        return f"an emoji of a {self.name}"

    @cached_property
    def drawings(self) -> Tensor:
        """[styles, 4, 128, 128] RGBA."""
        return torch.stack([draw(fetch(style, self.work / "npm")[THINGS[self.name]]) for style in emoji.STYLES])

    def images(self, count: int, seed: int) -> Tensor:
        torch.manual_seed(seed)
        rows = torch.arange(count) % len(self.drawings)
        return compose(place(self.drawings[rows]), torch.randint(len(emoji.BACKGROUNDS), (count,)))

    @property
    def false_rate(self) -> float:
        return float(self._is_own(self._known(1)[0]).mean())

    def finds(self, images: Tensor) -> NDArray[np.bool_]:
        return self._is_own(_features(images))

    def _is_own(self, features: NDArray[np.float32]) -> NDArray[np.bool_]:
        return self.discriminant.predict(features) == len(emoji.THINGS)

    def _known(self, half: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Features and labels of half the held-apart images of every known thing; the other half has half=1."""
        held = load_file(emoji.READER_DIR / "held_apart.safetensors")
        features, labels = held["features"].float().numpy(), held["thing"].numpy()
        rows = np.argsort(labels, kind="stable")[half::2]
        return features[rows], labels[rows]

    @cached_property
    def discriminant(self) -> LinearDiscriminantAnalysis:
        features, labels = self._known(0)
        own = _features(self.images(300, seed=2))
        classes = np.concatenate([labels, np.full(len(own), len(emoji.THINGS))])
        count = len(np.unique(classes))
        fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=np.full(count, 1 / count))
        return fitted.fit(np.concatenate([features, own]), classes)


def _features(images: Tensor) -> NDArray[np.float32]:
    with torch.no_grad():
        return torch.cat([emoji.load_reader().features(part) for part in images.split(100)]).numpy()


@cache
def _digits() -> tuple[Tensor, Tensor]:
    return load_digits()[:2]


class MirroredDigit(Unseen):
    """A mirrored digit: it is found if the bundled classifier reads the mirrored image as that digit."""

    base, size, like = "digits", 32, "seven"

    @property
    def caption(self) -> str:
        return f"a photo of a {self.name}"

    def _strokes(self, count: int, seed: int, digit: int | None = None) -> Tensor:
        """[count, 1, 32, 32] in [0, 1] of one digit, or of all."""
        strokes, labels = _digits()
        torch.manual_seed(seed)
        rows = torch.arange(len(labels)) if digit is None else (labels == digit).nonzero().flatten()
        return wobble(strokes[rows[torch.randint(len(rows), (count,))]])

    @property
    def false_rate(self) -> float:
        return float(self.finds(paint(self._strokes(2000, seed=4), torch.randint(len(digits.INKS), (2000,)))).mean())

    def images(self, count: int, seed: int) -> Tensor:
        strokes = self._strokes(count, seed, MIRRORED[self.name])
        return paint(strokes.flip(3), torch.randint(len(digits.INKS), (count,)))

    def finds(self, images: Tensor) -> NDArray[np.bool_]:
        with torch.no_grad():
            return (digits.load_reader()(images.flip(3))[0].argmax(1) == MIRRORED[self.name]).numpy()


UNSEEN: dict[str, type[Unseen]] = {
    **dict.fromkeys(THINGS, UnseenThing),
    **dict.fromkeys(MIRRORED, MirroredDigit),
}
