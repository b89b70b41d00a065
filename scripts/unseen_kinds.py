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
from emoji_data import Drawings, compose, draw, fetch, load_drawings, place
from numpy.typing import NDArray
from torch import Tensor

from sd_unlearn.metrics import digits, emoji

THINGS = {"wrench": "1f527", "telephone receiver": "1f4de", "camel": "1f42b", "lollipop": "1f36d"}  # in all six sets
BORDER = 3  # pixels of a 64-pixel image
CONTRAST = 0.25  # of the largest channel in [-1, 1] between a thing and its background
MIRRORED = {"mirrored seven": 7, "mirrored three": 3}  # digits that do not look alike in a mirror


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


class Thing(Unseen):
    """An emoji, drawn by the same hands as those of `emoji`: one that is not among them, or for comparison one that is.

    It is found by its outline: of all drawings of all things, that with the largest overlap (intersection over union)
    is one of this thing. The bundled classifier cannot be used: it knows its own things only, and it takes a blurred
    outline for the nearest of them.
    """

    base, size, like = "emoji", emoji.SIZE, "pistol"

    @property
    def caption(self) -> str:
        return f"an emoji of a {self.name}"

    @cached_property
    def drawings(self) -> Tensor:
        """[drawings, 4, 128, 128] RGBA: in each style."""
        if self.name not in THINGS:
            drawn = load_drawings(self.work)
            return drawn.pixels[drawn.things == emoji.THINGS.index(self.name)]
        return torch.stack([draw(fetch(style, self.work / "npm")[THINGS[self.name]]) for style in emoji.STYLES])

    def images(self, count: int, seed: int) -> Tensor:
        torch.manual_seed(seed)
        rows = torch.arange(count) % len(self.drawings)
        return compose(place(self.drawings[rows]), torch.randint(len(emoji.BACKGROUNDS), (count,)))

    @cached_property
    def others(self) -> Drawings:
        """The drawings of all other things that the base knows."""
        drawn = load_drawings(self.work)
        rows = torch.tensor([emoji.THINGS[thing] != self.name for thing in drawn.things])
        return Drawings(*(column[rows] for column in drawn))

    @property
    def false_rate(self) -> float:
        torch.manual_seed(4)
        rows = torch.randperm(len(self.others.pixels))[:600]
        return float(self.finds(compose(place(self.others.pixels[rows]), rows % len(emoji.BACKGROUNDS))).mean())

    def finds(self, images: Tensor) -> NDArray[np.bool_]:
        drawn = torch.cat([outlines_of_drawings(self.drawings), outlines_of_drawings(self.others.pixels)])
        return (overlap(outlines(images), drawn).argmax(1) < len(self.drawings)).numpy()


def outlines(images: Tensor) -> Tensor:
    """[N, size * size], 1 where images [N, 3, size, size] in [-1, 1] differ from the median colour of their border."""
    edge = torch.ones(images.shape[2:], dtype=torch.bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    background = images[:, :, edge].median(2).values[:, :, None, None]
    return ((images - background).abs().amax(1) > CONTRAST).float().flatten(1)


def outlines_of_drawings(drawings: Tensor) -> Tensor:
    """[N, size * size] of drawings [N, 4, 128, 128] (uint8), placed without chance."""
    return (place(drawings, degrees=0, zoom=0, shift=0)[:, 3] > 0.5).float().flatten(1)


def overlap(images: Tensor, drawings: Tensor) -> Tensor:
    """[N, M] intersection over union of outlines [N, pixels] and [M, pixels]."""
    both = images @ drawings.T
    return both / (images.sum(1)[:, None] + drawings.sum(1) - both).clamp(min=1)


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


KNOWN: dict[str, type[Unseen]] = dict.fromkeys(emoji.THINGS, Thing)  # for comparison
UNSEEN: dict[str, type[Unseen]] = {
    **dict.fromkeys(THINGS, Thing),
    **dict.fromkeys(MIRRORED, MirroredDigit),
}
