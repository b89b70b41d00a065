"""An open_clip model that encodes images and texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sd_unlearn.errors import UnlearnError, UsageError, install_command, reason
from sd_unlearn.io.reading import file_sha256
from sd_unlearn.models.halving import FOR_METRIC, HalvingBatches

BATCH_SIZE = 32
Features = NDArray[np.float32]


def check_clip(model: str, pretrained: str) -> None:
    """Find the weights of a model, or download them, without loading them.

    Raises:
        UsageError: open_clip is not installed.
        UnlearnError: the weights cannot be downloaded.
    """
    open_clip = _import_open_clip(model)
    if not pretrained or Path(pretrained).is_file():
        return
    try:
        open_clip.download_pretrained(open_clip.get_pretrained_cfg(model, pretrained))
    except Exception as error:  # as in ClipEncoder
        raise _not_loaded(model, pretrained, error) from error


def _import_open_clip(model: str) -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise UsageError(f"--clip_model {model} needs open_clip: {install_command('clip')} ({error}).") from None
    return open_clip


def _not_loaded(model: str, pretrained: str, error: Exception) -> UnlearnError:
    return UnlearnError(
        f"--clip_model {model} --clip_pretrained {pretrained} could not be loaded: {reason(error)}. "
        "Without a network, set --clip_pretrained to the path of a weights file."
    )


class ClipEncoder:
    """An open_clip model, in eval mode.

    Raises:
        UsageError: open_clip is not installed.
        UnlearnError: the weights cannot be loaded.
    """

    def __init__(self, model: str, pretrained: str, device: Any = "cpu") -> None:
        import torch

        open_clip = _import_open_clip(model)
        try:
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(model, pretrained=pretrained or None)
        except Exception as error:  # open_clip raises RuntimeError, OSError and hub errors alike
            raise _not_loaded(model, pretrained, error) from error
        self.torch, self.device = torch, device
        self.batches = HalvingBatches("encoding with CLIP", FOR_METRIC)
        self.model.eval().to(device)
        self.tokenizer = open_clip.get_tokenizer(model)
        self.name = f"open_clip {model} {Path(pretrained).name if pretrained else 'random weights'}"
        self.scale = float(self.model.logit_scale.detach().exp())
        local = Path(pretrained) if pretrained and Path(pretrained).is_file() else None
        self.architecture = model
        self.weights = f"sha256:{file_sha256(local)[:12]}" if local else pretrained or "random weights"
        self.detector = f"open_clip {model} {self.weights}"  # identifies the weights, not their path

    def images(self, images: Iterable[Image.Image]) -> Features:
        """Features [N, D] of N > 0 images, not normalized."""

        def encode(batch: Sequence[Image.Image]) -> Features:
            pixels = self.torch.stack([self.preprocess(image.convert("RGB")) for image in batch]).to(self.device)
            with self.torch.no_grad():
                return self.model.encode_image(pixels).float().cpu().numpy()

        features: list[Features] = []
        pending = iter(images)
        while opened := list(islice(pending, BATCH_SIZE)):
            features += self.batches.map(encode, opened, BATCH_SIZE)
        return np.concatenate(features)

    def texts(self, texts: Sequence[str]) -> Features:
        """Features [N, D] of N > 0 texts, not normalized."""

        def encode(batch: Sequence[str]) -> Features:
            with self.torch.no_grad():
                return self.model.encode_text(self.tokenizer(list(batch)).to(self.device)).float().cpu().numpy()

        return np.concatenate(list(self.batches.map(encode, texts, BATCH_SIZE)))
