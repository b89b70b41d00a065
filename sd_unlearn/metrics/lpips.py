"""LPIPS: the perceptual distance between the two images of a pair, on the keep prompts."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sd_unlearn.errors import UnlearnError, UsageError, install_command, reason
from sd_unlearn.metrics.base import batches_of_one_size
from sd_unlearn.models.halving import FOR_METRIC, HalvingBatches
from sd_unlearn.results import Card

MIN_SIDE = 64  # pixels: LPIPS was trained on patches of this size, and AlexNet accepts nothing smaller
LANCZOS = Image.Resampling.LANCZOS
_BATCH = 16


class Lpips:
    """LPIPS with AlexNet (Zhang et al. 2018, eq. 1), version 0.1, through torchmetrics.

    Raises:
        UsageError: torchmetrics or torchvision is not installed.
        UnlearnError: AlexNet's weights cannot be downloaded or read.
    """

    metric = "lpips"

    def __init__(self, device: Any = "cpu") -> None:
        try:
            import torch
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
            from torchvision.models import AlexNet_Weights
        except ImportError as error:
            raise UsageError(
                f"The metric lpips needs torchmetrics: {install_command('fidelity')} ({reason(error)})."
            ) from None
        try:
            self.net = LearnedPerceptualImagePatchSimilarity(net_type="alex").net.to(device)
        except (OSError, RuntimeError) as error:  # URLError is an OSError; a broken file is a RuntimeError
            raise UnlearnError(
                f"The metric lpips could not load AlexNet's weights: {reason(error)}. "
                f"Download {AlexNet_Weights.DEFAULT.url} on a machine with a network, put the file into "
                f"{torch.hub.get_dir()}/checkpoints, or use drift (of the metrics clip and digits) instead."
            ) from error
        self.torch, self.device = torch, device
        self.batches = HalvingBatches("computing LPIPS", FOR_METRIC)
        self.weights = f"AlexNet {AlexNet_Weights.DEFAULT.name}"
        self.name = f"lpips-alex 0.1 torchmetrics {version('torchmetrics')}"

    def card(self) -> Card:
        return Card(
            self.name,
            (self.metric,),
            "Perceptual distance of the two images of a pair from five layers of AlexNet, weighted to agree with "
            "human ratings; 0 for equal images, about 0.5 to 0.8 for unrelated photos.",
            version("torchmetrics"),
            f"{self.weights}, linear heads bundled with torchmetrics",
            limits=f"Images with a side below {MIN_SIDE} pixels are scaled up to it, and an image of another size than "
            "the base's to the base's size. Shifted images count as changed.",
        )

    def distance(self, base: Sequence[Image.Image], other: Sequence[Image.Image]) -> NDArray[np.float64]:
        """[N] LPIPS of each pair of RGB images of any size, symmetric and zero for equal images.

        If the two images of a pair differ in size, the other one is scaled to the size of the base's.
        """
        other = [b if b.size == a.size else b.resize(a.size, LANCZOS) for a, b in zip(base, other, strict=True)]
        distances = np.zeros(len(base))

        def fill(indices: Sequence[int]) -> None:
            a, b = (self._pixels([images[i] for i in indices]) for images in (base, other))
            with self.torch.no_grad():
                distances[indices] = self.net(a, b).flatten().double().cpu().numpy()

        for indices in batches_of_one_size(base, _BATCH):
            list(self.batches.map(fill, indices, _BATCH))
        return distances

    def _pixels(self, images: Sequence[Image.Image]) -> Any:
        """[B, 3, H, W] in [-1, 1], H and W at least MIN_SIDE."""
        width, height = images[0].size
        scale = max(1.0, MIN_SIDE / min(width, height))
        size = (round(width * scale), round(height * scale))
        scaled = [i.convert("RGB") if i.size == size else i.convert("RGB").resize(size) for i in images]
        pixels = self.torch.from_numpy(np.stack([np.asarray(image) for image in scaled]))
        return pixels.permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1


def make_lpips(device: Any = "cpu") -> Lpips:
    """For the registry: the metric lpips. Raises as Lpips."""
    return Lpips(device)
