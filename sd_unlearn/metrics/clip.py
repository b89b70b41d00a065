"""Zero-shot reading by CLIP (open_clip): which of the named things does an image show?

Never proof alone for identities: names leak through text. Model and weights are part of the judge's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.metrics.judge import Reading

TEMPLATE = "a photo of {}"


def zero_shot(image_features: NDArray, text_features: NDArray, scale: float) -> NDArray:
    """softmax over labels of scale * cosine (Radford et al. 2021, section 3.1): [N, D], [L, D] -> [N, L]."""
    images = image_features / np.linalg.norm(image_features, axis=1, keepdims=True)
    texts = text_features / np.linalg.norm(text_features, axis=1, keepdims=True)
    logits = scale * images @ texts.T
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


class ClipJudge:
    """Zero-shot between labels with an open_clip model.

    Raises:
        UsageError: fewer than two labels, or open_clip is not installed.
        UnlearnError: the weights cannot be had.
    """

    def __init__(self, labels: Sequence[str], model: str, pretrained: str, device: str = "cpu") -> None:
        if len(labels) < 2:
            raise UsageError(
                "The zero-shot judge needs alternatives to the concept: list some in the concept file (alternatives:)."
            )
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
        self.labels, self.tokenizer = tuple(labels), open_clip.get_tokenizer(model)
        self.name = f"open_clip {model} {Path(pretrained).name if pretrained else 'random weights'}"
        with torch.no_grad():
            tokens = self.tokenizer([TEMPLATE.format(label) for label in labels]).to(device)
            self.text = self.model.encode_text(tokens).float().cpu().numpy()
            self.scale = float(self.model.logit_scale.exp())

    def read(self, images: Sequence[Image.Image]) -> Reading:
        torch = self.torch
        features = []
        with torch.no_grad():
            for chunk in (images[i : i + 32] for i in range(0, len(images), 32)):
                pixels = torch.stack([self.preprocess(image.convert("RGB")) for image in chunk]).to(self.device)
                features.append(self.model.encode_image(pixels).float().cpu().numpy())
        stacked = np.concatenate(features)
        return Reading({"label": self.labels}, {"label": zero_shot(stacked, self.text, self.scale)}, stacked)
