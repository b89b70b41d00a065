"""Image embeddings for estimating beta: CLIP's if open_clip and its weights are available, else the base's latents."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from sd_unlearn.config.base import CLIP_MODEL, CLIP_PRETRAINED
from sd_unlearn.data.dataset import UNUSED, Example
from sd_unlearn.data.prior import ImageEmbeddings
from sd_unlearn.errors import UnlearnError, install_command, reason
from sd_unlearn.io.images import open_image
from sd_unlearn.models.base import Base
from sd_unlearn.models.clip import ClipEncoder, Features

MIN_CLIP_PIXELS = 64  # CLIP takes 224 pixels; from images up to this size it learns little
MAX_LATENT_SIDE = 16  # latents are averaged to this size: image content, not texture


class Embedder:
    """Embeds the images of one or several concepts. CLIP is loaded once, and an image that they share is encoded once.

    Uses CLIP for bases above MIN_CLIP_PIXELS if open_clip and its weights are available, else the latents.

    latents: of all examples, [N, C, h, w].
    """

    def __init__(self, base: Base, latents: Tensor) -> None:
        self.base, self.latents = base, latents
        self._features: dict[Path, Features] = {}  # CLIP's, [D] each

    def embed(self, examples: Sequence[Example]) -> ImageEmbeddings:
        """Embed the positive and the unlabeled examples; keep images and negatives are left out.

        examples: in the order of the latents.
        """
        indices = [n for n, example in enumerate(examples) if example.group not in ("keep", "negative", UNUSED)]
        chosen = [examples[n] for n in indices]
        clip, why = self._clip
        rows = self._encoded(clip, [e.path for e in chosen]) if clip else _pooled(self.latents[indices])
        positive = np.array([e.is_positive for e in chosen])
        name = clip.name if clip else f"VAE latents of {Path(self.base.name).name}"
        return ImageEmbeddings(name, f"beta is estimated from {name}: {why}.", rows[positive], rows[~positive])

    @cached_property
    def _clip(self) -> tuple[ClipEncoder | None, str]:
        return _clip_for(self.base)

    def _encoded(self, clip: ClipEncoder, paths: Sequence[Path]) -> Features:
        """CLIP's features of image files, [N, D]."""
        if new := [path for path in dict.fromkeys(paths) if path not in self._features]:
            self._features |= zip(new, clip.images(map(open_image, new)), strict=True)
        return np.stack([self._features[path] for path in paths])


def _clip_for(base: Base) -> tuple[ClipEncoder | None, str]:
    """CLIP if it can be used for this base, and the reason why it is or is not used."""
    if base.resolution <= MIN_CLIP_PIXELS:
        return None, f"images of {base.resolution} pixels are too small for CLIP"
    if not find_spec("open_clip"):
        return None, f"CLIP would be more accurate, but needs {install_command('clip')}"
    try:
        return ClipEncoder(CLIP_MODEL, CLIP_PRETRAINED, base.device), "open_clip and its weights are available"
    except UnlearnError as error:
        cause = reason(error.__cause__ or error)
        return None, f"the weights {CLIP_PRETRAINED} of CLIP {CLIP_MODEL} could not be loaded ({cause})"


def _pooled(latents: Tensor) -> Features:
    """[N, C, h, w] -> [N, C * min(h, MAX_LATENT_SIDE) * min(w, MAX_LATENT_SIDE)]."""
    height, width = latents.shape[2:]
    size = (min(height, MAX_LATENT_SIDE), min(width, MAX_LATENT_SIDE))
    return adaptive_avg_pool2d(latents.float(), size).flatten(1).cpu().numpy()
