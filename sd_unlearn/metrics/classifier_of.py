"""Which classifier labels the images of a concept: that of its bundled base, or zero-shot CLIP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_unlearn.config.base import CLIP_MODEL, CLIP_PRETRAINED
from sd_unlearn.data.concept import Concept
from sd_unlearn.metrics.labels import LabelClassifier
from sd_unlearn.models.source import DIGITS, EMOJI

if TYPE_CHECKING:
    from sd_unlearn.metrics.reader import ReaderClassifier


def make_label_classifier(concept: Concept) -> LabelClassifier:
    """The bundled classifier for concepts of a bundled base, zero-shot CLIP for all others.

    Raises:
        UsageError, UnlearnError: CLIP is not installed, or its weights cannot be downloaded or read.
    """
    if bundled := _bundled_classifier(concept):
        return bundled()
    from sd_unlearn.metrics.clip import ClipClassifier

    return ClipClassifier(labels_of(concept), CLIP_MODEL, CLIP_PRETRAINED)


def labels_of(concept: Concept) -> tuple[str, ...]:
    """The labels of `make_label_classifier`, without loading it."""
    if bundled := _bundled_classifier(concept):
        return bundled.labels
    names = [part.label or part.name for part in concept.parts]
    return tuple(dict.fromkeys([*names, *(other for part in concept.parts for other in part.alternatives)]))


def bundled_metric(concept: Concept) -> str | None:
    """The metric of the bundled base that a concept is of: digits, emoji or None."""
    of_parts = {
        DIGITS if part.kind in ("digit", "ink") else EMOJI if part.base == EMOJI else None for part in concept.parts
    }
    return of_parts.pop() if len(of_parts) == 1 else None


def _bundled_classifier(concept: Concept) -> type[ReaderClassifier] | None:
    bundled = bundled_metric(concept)
    if bundled == DIGITS:
        from sd_unlearn.metrics.digits import DigitsClassifier

        return DigitsClassifier
    if bundled == EMOJI:
        from sd_unlearn.metrics.emoji import EmojiClassifier

        return EmojiClassifier
    return None
