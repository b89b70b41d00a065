"""The cards of an evaluation: one a detector, and what it was asked of each concept."""

from __future__ import annotations

from sd_unlearn.metrics.registry import merge_cards


def test_a_detector_of_two_concepts_has_one_card_with_what_it_was_asked_of_each() -> None:
    shared = {"detector": "resnet50", "about": "a classifier"}
    cards = [{**shared, "extra": {"label": label, "side": "224"}} for label in ("church", "tench", "church")]
    other = {"detector": "clip", "about": "", "extra": {}}
    assert merge_cards([*cards, other]) == [{**shared, "extra": {"label": "church; tench", "side": "224"}}, other]
    assert cards[0]["extra"]["label"] == "church"
