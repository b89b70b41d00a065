"""Images as vectors: by CLIP where open_clip and its weights are at hand, else by the base's own autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from sd_unlearn.config.base import CLIP_MODEL, CLIP_PRETRAINED
from sd_unlearn.data.dataset import Example
from sd_unlearn.data.prior import Embedded
from sd_unlearn.errors import UnlearnError
from sd_unlearn.models.base import Base
from sd_unlearn.models.clip import ClipEncoder, Features

SMALL = 64  # pixels: CLIP looks at 224, and of images far smaller it tells little
SIDE = 16  # latents are averaged down to this side: what a picture shows, not its texture


def embed(base: Base, examples: Sequence[Example], latents: Tensor) -> Embedded:
    """Embeddings of the positive and of the unlabeled examples, what must stay left out.

    By CLIP for bases of more than SMALL pixels where open_clip is installed and its weights can be had; else by the
    examples' latents [N, C, h, w].
    """
    counted = [n for n, e in enumerate(examples) if e.group not in ("keep", "negative")]
    chosen = [examples[n] for n in counted]
    clip, why = _clip_for(base)
    rows = clip.images(_upright(e.path) for e in chosen) if clip else _pooled(latents[counted])
    positive = np.array([e.is_positive for e in chosen])
    name = clip.name if clip else f"VAE latents of {Path(base.name).name}"
    return Embedded(name, f"beta is estimated from {name}: {why}.", rows[positive], rows[~positive])


def _clip_for(base: Base) -> tuple[ClipEncoder | None, str]:
    """CLIP, if it is fit for the base and at hand, and why or why not."""
    if base.resolution <= SMALL:
        return None, f"images of {base.resolution} pixels are too small for CLIP"
    if not find_spec("open_clip"):
        return None, "CLIP would tell more, but needs pip install 'sd-unlearn[clip]'"
    try:
        return ClipEncoder(CLIP_MODEL, CLIP_PRETRAINED, base.device), "open_clip and its weights are at hand"
    except UnlearnError as error:
        reason = str(error.__cause__ or error).splitlines()[0][:200]
        return None, f"the weights {CLIP_PRETRAINED} of CLIP {CLIP_MODEL} cannot be had ({reason})"


def _upright(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def _pooled(latents: Tensor) -> Features:
    """[N, C, h, w] -> [N, C * min(h, SIDE) * min(w, SIDE)]."""
    height, width = latents.shape[2:]
    return adaptive_avg_pool2d(latents.float(), (min(height, SIDE), min(width, SIDE))).flatten(1).cpu().numpy()
