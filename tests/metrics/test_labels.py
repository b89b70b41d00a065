"""Leakage and accuracy from predicted labels."""

from __future__ import annotations

import numpy as np
import pytest

from sd_unlearn.data.concept import Concept, Prompt
from sd_unlearn.metrics.base import PromptedImages
from sd_unlearn.metrics.labels import LabelPredictions, leakage_and_accuracy

pytestmark = pytest.mark.usefixtures("one_thread")
LABELS = ("Brad Pitt", "Tom Hanks", "a dog")
CELLS = [
    *[("direct", ())] * 4,
    *[("generic", ())] * 2,
    *[("alike", ("Tom Hanks",))] * 2,
    ("general", ("a dog",)),
    ("general", ()),
    ("general", ("a cat",)),
]
WORDS = ["Brad Pitt"] + ["a dog"] * 5 + ["Tom Hanks", "a dog", "a dog", "Brad Pitt", "a dog"]


def test_leakage_and_accuracy_are_defined_on_their_groups() -> None:
    person = Concept("Brad Pitt", "a photo of Brad Pitt", "a photo of a man", kind="person")
    prompts = tuple(Prompt(group, words) for group, words in CELLS)
    prompted = PromptedImages(person, np.array([group for group, _ in CELLS]), prompts, np.zeros(len(CELLS), dtype=int))
    probabilities = np.array([[0.8 if label == word else 0.1 for label in LABELS] for word in WORDS])
    reading = LabelPredictions({"label": LABELS}, {"label": probabilities}, np.eye(len(WORDS)))
    leakage, accuracy = leakage_and_accuracy(prompted, "Brad Pitt", reading.has_label, reading.shows)
    unasked = [np.nan] * 5
    assert leakage.metric == "leakage"
    np.testing.assert_array_equal(leakage.values, [1, 0, 0, 0, 0, 0, *unasked])
    # What expects nothing, or a word that is no label, is in no denominator.
    np.testing.assert_array_equal(accuracy.values, [*[np.nan] * 6, 1, 0, 1, np.nan, np.nan])
