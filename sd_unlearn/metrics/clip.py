"""CLIP (open_clip): zero-shot classification of the concept, and agreement of each image with its prompt.

Never sufficient evidence about a person by itself. Model and weights are part of the detector's name.
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
from sd_unlearn.metrics.base import (
    CONCEPT_GROUPS,
    KEEP_GROUPS,
    DetectorOutput,
    ImageValues,
    PromptedImages,
)
from sd_unlearn.metrics.drift import drift_rows
from sd_unlearn.metrics.labels import LabelPredictions, leakage_and_accuracy
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

    Hessel et al. 2021, section 3, with the factor 100 that is usual for image generation instead of their 2.5.
    """
    images, texts = np.asarray(image_features, np.float64), np.asarray(text_features, np.float64)
    norms = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    return 100 * ((images * texts).sum(1) / norms).clip(0, 1)


class ClipClassifier:
    """Zero-shot classification between labels with an open_clip model.

    Raises:
        UsageError: fewer than two labels, or open_clip is not installed.
        UnlearnError: the weights cannot be downloaded or read.
    """

    rejects_invalid = False

    def __init__(self, labels: Sequence[str], model: str, pretrained: str, device: str = "cpu") -> None:
        if len(labels) < 2:
            raise UsageError(
                "Zero-shot classification needs alternatives to the concept. List some in its file (alternatives:)."
            )
        self.encoder = ClipEncoder(model, pretrained, device)
        self.labels, self.name = tuple(labels), self.encoder.name
        self.text = self.encoder.texts([TEMPLATE.format(label) for label in labels])

    def read(self, images: Sequence[Image.Image]) -> LabelPredictions:
        features = self.encoder.images(images)
        probabilities = zero_shot(features, self.text, self.encoder.scale)
        return LabelPredictions({"label": self.labels}, {"label": probabilities}, features)


class ClipMetric:
    """Leakage and accuracy by zero-shot classification, CLIP score and drift.

    Output: "label" [N, L] probabilities of the concept and its alternatives, "features" [N, D], not normalized.
    """

    def __init__(self, classifier: ClipClassifier) -> None:
        self.classifier, self.encoder = classifier, classifier.encoder
        digest = hashlib.sha256("\0".join((TEMPLATE, *classifier.labels)).encode()).hexdigest()[:8]
        self.name = f"{self.encoder.detector}, {len(classifier.labels)} labels {digest}"

    def card(self) -> Card:
        return Card(
            self.name,
            ("leakage", "accuracy", "clip_score", "drift"),
            "CLIP: the label whose text is most similar to the image, and 100 times the cosine of image and prompt.",
            f"open_clip {version('open_clip_torch')}",
            self.encoder.weights,
            "the most probable label",
            "It cannot identify people, so it is not sufficient evidence about a person. It always predicts one of its "
            "labels, whatever the image shows. Prompts are cut at the model's context length (77 tokens).",
            {"labels": ", ".join(self.classifier.labels), "wording": TEMPLATE.format("LABEL")},
        )

    def read(self, images: Sequence[Image.Image]) -> DetectorOutput:
        if not images:
            return {
                "label": np.zeros((0, len(self.classifier.labels)), np.float32),
                "features": np.zeros((0, self.classifier.text.shape[1]), np.float32),
            }
        predictions = self.classifier.read(images)
        return {"label": predictions.probabilities["label"], "features": predictions.features}

    def count(self, prompted: PromptedImages, output: DetectorOutput) -> list[ImageValues]:
        """Leakage, accuracy and CLIP score; each prompt's text is embedded once.

        An image whose prompt is unknown ("") has no CLIP score.
        """
        predictions, concept = self._predictions(output), prompted.concept
        label = concept.label or concept.name
        values_of = leakage_and_accuracy(prompted, label, predictions.has_label, predictions.shows)
        if texts := sorted({prompt.text for prompt in prompted.prompts} - {""}):
            known = np.array([prompt.text != "" for prompt in prompted.prompts])
            embedded = self.encoder.texts(texts)[[texts.index(p.text) for p in prompted.prompts if p.text]]
            note = "100 * max(0, cosine of the picture and its own prompt)"
            scores = np.full(len(prompted), np.nan)
            scores[known] = clip_scores(output["features"][known], embedded)
            groups = (*CONCEPT_GROUPS, *KEEP_GROUPS)
            values_of.append(ImageValues("clip_score", groups, scores, is_rate=False, note=note))
        return values_of

    def compare(self, prompted: PromptedImages, base: DetectorOutput, output: DetectorOutput) -> list[Row]:
        return drift_rows(prompted, base, output, self.name)

    def words(self, output: DetectorOutput, index: int) -> str:
        return self._predictions(output).words(index)

    def _predictions(self, output: DetectorOutput) -> LabelPredictions:
        axes = {"label": self.classifier.labels}
        return LabelPredictions(axes, {"label": output["label"]}, output["features"])


def make_clip(
    concept: Concept, model: str = CLIP_MODEL, pretrained: str = CLIP_PRETRAINED, device: str = "cpu"
) -> ClipMetric:
    """For the registry: the metric clip, between the concept and the alternatives in its file.

    Raises:
        UsageError: the concept has no alternatives, or open_clip is not installed.
        UnlearnError: the weights cannot be downloaded or read.
    """
    labels = (concept.label or concept.name, *concept.alternatives)
    return ClipMetric(ClipClassifier(labels, model, pretrained, device))
