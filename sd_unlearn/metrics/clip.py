"""Zero-shot reading by CLIP (open_clip): which of the named things does an image show?

Never proof alone for identities: names leak through text. Model and weights are part of the judge's name.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sd_unlearn.embeddings import ClipEncoder
from sd_unlearn.errors import UsageError
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
        self.encoder = ClipEncoder(model, pretrained, device)
        self.labels, self.name = tuple(labels), self.encoder.name
        self.text = self.encoder.texts([TEMPLATE.format(label) for label in labels])

    def read(self, images: Sequence[Image.Image]) -> Reading:
        features = self.encoder.images(images)
        return Reading({"label": self.labels}, {"label": zero_shot(features, self.text, self.encoder.scale)}, features)
