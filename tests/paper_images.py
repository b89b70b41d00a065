"""Images in memory and a classifier of brightness, for the tests of paper.judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from sd_unlearn.paper.experiments import DIGITS
from sd_unlearn.paper.judge.classifier import Classifier


def _none(index: int) -> Image.Image:
    raise NotImplementedError


@dataclass(frozen=True)
class Images:
    """Like datasets.ImageData, from a tensor [N, C, side, side] in [-1, 1]."""

    data: Tensor
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    name: Any = "toy"
    sha256: str = "0" * 64
    test: Any = None
    read: Callable[[int], Image.Image] = _none

    @property
    def channels(self) -> int:
        return self.data.shape[1]

    def pixels(self, indices: Sequence[int] | NDArray[np.int64], side: int) -> Tensor:
        assert side == self.data.shape[-1]
        return self.data[torch.as_tensor(np.asarray(indices))]


def left_or_right(count: int = 120, channels: int = 1) -> Images:
    """8x8 noise whose left ("a") or right ("b") half is brighter."""
    generator, labels = torch.Generator().manual_seed(0), np.arange(count) % 2
    data = torch.rand(count, channels, 8, 8, generator=generator) * 0.5 - 1
    for index, label in enumerate(labels):
        data[index, :, :, 4 * label : 4 * label + 4] += 1
    return Images(data, labels, ("a", "b"))


class _Brightness(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.levels = torch.linspace(-1, 1, classes)

    def forward(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=-1000 * (images.flatten(1).mean(1)[:, None] - self.levels) ** 2)


def uniform(labels: Sequence[int], side: int = 32, channels: int = 1) -> Tensor:
    """Uniform images whose brightness encodes one of ten classes."""
    return torch.linspace(-1, 1, 10)[list(labels)].view(-1, 1, 1, 1).expand(-1, channels, side, side).clone()


def brightness_reader(confusion: NDArray[np.int64] | None = None) -> Classifier:
    """A classifier of ten classes by brightness."""
    counts = np.eye(10, dtype=np.int64) if confusion is None else confusion
    return Classifier(_Brightness(10).eval(), "resnet-toy", DIGITS, 32, "f" * 64, counts)
