"""How far the pictures of what must stay have moved, pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.metrics.base import KEPT, Columns, Question, Shots
from sd_unlearn.metrics.statistics import bootstrap
from sd_unlearn.results import Card, Row

SMALLEST = 64  # pixels a side: LPIPS was fitted on patches of that size, and AlexNet reads nothing smaller
_BATCH = 16


def feature_drift(base: NDArray, lora: NDArray) -> NDArray:
    """Cosine distance, in [0, 2], of each pair of features [N, D]: zero for equals, symmetric. Returns [N]."""
    norms = np.linalg.norm(base, axis=1) * np.linalg.norm(lora, axis=1)
    cosine = (base * lora).sum(1) / np.where(norms == 0, 1, norms)
    return np.where(norms == 0, (base != lora).any(1).astype(float), 1 - cosine).clip(min=0)


def drift_rows(shots: Shots, base: Columns, columns: Columns, detector: str) -> list[Row]:
    """The mean feature drift of what must stay, from the "features" of a reading; none where nothing must."""
    kept = shots.of(*KEPT)
    if not kept.any():
        return []
    moved = feature_drift(base["features"][kept], columns["features"][kept])
    low, high = bootstrap(np.mean, moved)
    note = "1 - cosine of the detector's features, same prompt and seed"
    return [Row("drift", "kept", "", float(moved.mean()), len(moved), low, high, detector, "bootstrap", note)]


class FeatureDrift:
    """1 - cosine of another question's "features": for where the weights of LPIPS cannot be had."""

    metric = "drift"

    def __init__(self, question: Question) -> None:
        self.question, self.name = question, question.name

    def card(self) -> Card:
        about = "1 - cosine of the features of both pictures of a pair, in [0, 2]; 0 for equals."
        limits = "It sees what the detector was trained to see; figures of different detectors don't compare."
        inner = self.question.card()
        return Card(self.name, (self.metric,), about, inner.version, inner.weights, limits=limits)

    def distance(self, base: Sequence[Image.Image], other: Sequence[Image.Image]) -> NDArray[np.float64]:
        return feature_drift(self.question.read(base)["features"], self.question.read(other)["features"])


class LpipsDrift:
    """LPIPS with AlexNet (Zhang et al. 2018, eq. 1), version 0.1, through torchmetrics.

    Raises:
        UsageError: torchmetrics or torchvision is not installed.
        UnlearnError: AlexNet's weights cannot be had.
    """

    metric = "lpips"

    def __init__(self, device: Any = "cpu") -> None:
        try:
            import torch
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
            from torchvision.models import AlexNet_Weights
        except ImportError as error:
            raise UsageError(
                f"The metric lpips needs torchmetrics: pip install 'sd-unlearn[fidelity]' ({error})."
            ) from None
        try:
            self.net = LearnedPerceptualImagePatchSimilarity(net_type="alex").net.to(device)
        except (OSError, RuntimeError) as error:  # URLError is an OSError; a broken file is a RuntimeError
            place = f"{torch.hub.get_dir()}/checkpoints"
            raise UnlearnError(
                f"The metric lpips needs AlexNet's weights, which cannot be had: {str(error).splitlines()[0][:200]}. "
                f"Fetch {AlexNet_Weights.DEFAULT.url} on a machine with a network and put it into {place}, "
                "or take the metric drift, which needs none."
            ) from error
        self.torch, self.device = torch, device
        self.weights = f"AlexNet {AlexNet_Weights.DEFAULT.name}"
        self.name = f"lpips-alex 0.1 torchmetrics {version('torchmetrics')}"

    def card(self) -> Card:
        return Card(
            self.name,
            (self.metric,),
            "Perceptual distance of both pictures of a pair, from five layers of AlexNet weighted to agree with "
            "people; 0 for equals, about 0.5 to 0.8 for unrelated photos.",
            version("torchmetrics"),
            f"{self.weights}, linear heads bundled with torchmetrics",
            limits=f"Pictures with a side below {SMALLEST} pixels are scaled up to it. A picture that only shifted "
            "counts as changed.",
        )

    def distance(self, base: Sequence[Image.Image], other: Sequence[Image.Image]) -> NDArray[np.float64]:
        """[N] LPIPS of each pair of RGB pictures of any size, zero for equals, symmetric.

        Raises:
            UsageError: the two of a pair differ in size.
        """
        for number, (one, two) in enumerate(zip(base, other, strict=True)):
            if one.size != two.size:
                raise UsageError(f"Pair {number} is of {one.size} and {two.size} pixels; LPIPS needs equal sizes.")
        found = np.zeros(len(base))
        for places in same_sizes(base, _BATCH):
            one, two = (self._pixels([images[i] for i in places]) for images in (base, other))
            with self.torch.no_grad():
                found[places] = self.net(one, two).flatten().double().cpu().numpy()
        return found

    def _pixels(self, images: Sequence[Image.Image]) -> Any:
        """[B, 3, H, W] in [-1, 1], H and W at least 64."""
        width, height = images[0].size
        scale = max(1.0, SMALLEST / min(width, height))
        size = (round(width * scale), round(height * scale))
        scaled = [i.convert("RGB") if i.size == size else i.convert("RGB").resize(size) for i in images]
        pixels = self.torch.from_numpy(np.stack([np.asarray(image) for image in scaled]))
        return pixels.permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1


def same_sizes(images: Sequence[Image.Image], most: int) -> list[list[int]]:
    """The places of all pictures in batches of at most `most` of one size."""
    batches: list[list[int]] = []
    for i, image in enumerate(images):
        if batches and len(batches[-1]) < most and images[batches[-1][0]].size == image.size:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def make_lpips(device: Any = "cpu") -> LpipsDrift:
    """For the registry: the metric lpips. Raises as LpipsDrift."""
    return LpipsDrift(device)
