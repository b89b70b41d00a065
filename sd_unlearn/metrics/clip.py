"""CLIP (open_clip): which of the named things does an image show, and how well does it go with its prompt?

Never proof alone for identities: names leak through text. Model and weights are part of the detector's name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sd_unlearn.config.base import CLIP_MODEL, CLIP_PRETRAINED
from sd_unlearn.data.concept import Concept
from sd_unlearn.errors import UsageError
from sd_unlearn.metrics.base import ASKED, KEPT, Columns, Counted, Shots
from sd_unlearn.metrics.drift import drift_rows
from sd_unlearn.metrics.labels import Reading, count_read
from sd_unlearn.models.clip import ClipEncoder
from sd_unlearn.results import Card, Row

TEMPLATE = "a photo of {}"


def zero_shot(image_features: NDArray, text_features: NDArray, scale: float) -> NDArray:
    """softmax over labels of scale * cosine (Radford et al. 2021, section 3.1): [N, D], [L, D] -> [N, L]."""
    images = image_features / np.linalg.norm(image_features, axis=1, keepdims=True)
    texts = text_features / np.linalg.norm(text_features, axis=1, keepdims=True)
    logits = scale * images @ texts.T
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def clip_scores(image_features: NDArray, text_features: NDArray) -> NDArray[np.float64]:
    """100 * max(0, cosine) of each image with its own text, [N, D] and [N, D] -> [N] in [0, 100].

    Hessel et al. 2021, section 3, with the factor 100 that image generation prints in place of their 2.5.
    """
    images, texts = np.asarray(image_features, np.float64), np.asarray(text_features, np.float64)
    norms = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    return 100 * ((images * texts).sum(1) / norms).clip(0, 1)


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


class ClipQuestion:
    """Is the concept read among named alternatives (zero-shot), and does each picture go with its own prompt?

    Columns: "label" [N, L] probabilities of the concept and its alternatives, "features" [N, D] not normalised.
    """

    def __init__(self, judge: ClipJudge) -> None:
        self.judge, self.encoder = judge, judge.encoder
        told = hashlib.sha256("\0".join((TEMPLATE, *judge.labels)).encode()).hexdigest()[:8]
        self.name = f"{self.encoder.detector}, {len(judge.labels)} labels {told}"

    def card(self) -> Card:
        return Card(
            self.name,
            ("leakage", "accuracy", "clip_score", "drift"),
            "CLIP: the label whose text is nearest to the picture, and 100 times the cosine to the picture's prompt.",
            f"open_clip {version('open_clip_torch')}",
            self.encoder.weights,
            "the most probable label",
            "Names leak through text, so it proves nothing alone about a person. It must pick one of the labels, "
            "whatever the picture shows. A prompt is read up to the model's length (77 tokens).",
            {"labels": ", ".join(self.judge.labels), "wording": TEMPLATE.format("LABEL")},
        )

    def read(self, images: Sequence[Image.Image]) -> Columns:
        if not images:
            return {
                "label": np.zeros((0, len(self.judge.labels)), np.float32),
                "features": np.zeros((0, self.judge.text.shape[1]), np.float32),
            }
        reading = self.judge.read(images)
        return {"label": reading.probabilities["label"], "features": reading.features}

    def count(self, shots: Shots, columns: Columns) -> list[Counted]:
        reading, concept = self._reading(columns), shots.concept
        counted = count_read(shots, concept.label or concept.name, reading.knows, reading.shows)
        if len(shots):
            texts = sorted({prompt.text for prompt in shots.prompts})
            embedded = self.encoder.texts(texts)[[texts.index(prompt.text) for prompt in shots.prompts]]
            note = "100 * max(0, cosine of the picture and its own prompt)"
            scores = clip_scores(columns["features"], embedded)
            counted.append(Counted("clip_score", (*ASKED, *KEPT), scores, is_rate=False, note=note))
        return counted

    def compare(self, shots: Shots, base: Columns, columns: Columns) -> list[Row]:
        return drift_rows(shots, base, columns, self.name)

    def words(self, columns: Columns, index: int) -> str:
        return self._reading(columns).words(index)

    def _reading(self, columns: Columns) -> Reading:
        return Reading({"label": self.judge.labels}, {"label": columns["label"]}, columns["features"])


def make_clip(
    concept: Concept, model: str = CLIP_MODEL, pretrained: str = CLIP_PRETRAINED, device: str = "cpu"
) -> ClipQuestion:
    """For the registry: the metric clip, between the concept and the alternatives its file names.

    Raises:
        UsageError: the concept names no alternatives, or open_clip is not installed.
        UnlearnError: the weights cannot be had.
    """
    labels = (concept.label or concept.name, *concept.alternatives)
    return ClipQuestion(ClipJudge(labels, model, pretrained, device))
