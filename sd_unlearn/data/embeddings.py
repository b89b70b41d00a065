"""Images as vectors: by CLIP where open_clip and its weights are at hand, else by the base's own autoencoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from sd_unlearn.config.base import CLIP_MODEL, CLIP_PRETRAINED
from sd_unlearn.data.dataset import Example
from sd_unlearn.data.prior import Embedded
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.io.run_folder import file_sha256
from sd_unlearn.models.base import Base

SMALL = 64  # pixels: CLIP looks at 224, and of images far smaller it tells little
SIDE = 16  # latents are averaged down to this side: what a picture shows, not its texture
CHUNK = 32

Features = NDArray[np.float32]


class ClipEncoder:
    """An open_clip model, in eval mode.

    Raises:
        UsageError: open_clip is not installed.
        UnlearnError: the weights cannot be had.
    """

    def __init__(self, model: str, pretrained: str, device: Any = "cpu") -> None:
        try:
            import open_clip
            import torch
        except ImportError as error:
            raise UsageError(
                f"--clip_model {model} needs open_clip: pip install 'sd-unlearn[clip]' ({error})."
            ) from None
        try:
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(model, pretrained=pretrained or None)
        except Exception as error:  # open_clip raises RuntimeError, OSError and hub errors alike
            reason = str(error).splitlines()[0][:200]
            raise UnlearnError(
                f"--clip_model {model} --clip_pretrained {pretrained} could not be loaded: {reason} "
                "Without a network give --clip_pretrained the path of a weights file."
            ) from error
        self.torch, self.device = torch, device
        self.model.eval().to(device)
        self.tokenizer = open_clip.get_tokenizer(model)
        self.name = f"open_clip {model} {Path(pretrained).name if pretrained else 'random weights'}"
        self.scale = float(self.model.logit_scale.detach().exp())
        local = Path(pretrained) if pretrained and Path(pretrained).is_file() else None
        self.architecture = model
        self.weights = f"sha256:{file_sha256(local)[:12]}" if local else pretrained or "random weights"
        self.detector = f"open_clip {model} {self.weights}"  # says what the weights are, not where they lie

    def images(self, images: Iterable[Image.Image]) -> Features:
        """Features [N, D] of N > 0 images, not normalised."""
        pending, features = iter(images), []
        with self.torch.no_grad():
            while chunk := list(islice(pending, CHUNK)):
                pixels = self.torch.stack([self.preprocess(image.convert("RGB")) for image in chunk]).to(self.device)
                features.append(self.model.encode_image(pixels).float().cpu().numpy())
        return np.concatenate(features)

    def texts(self, texts: Sequence[str]) -> Features:
        """Features [N, D] of N > 0 texts, not normalised."""
        features = []
        with self.torch.no_grad():
            for start in range(0, len(texts), CHUNK):
                tokens = self.tokenizer(list(texts[start : start + CHUNK])).to(self.device)
                features.append(self.model.encode_text(tokens).float().cpu().numpy())
        return np.concatenate(features)


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
