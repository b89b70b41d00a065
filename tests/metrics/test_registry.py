"""The cards of an evaluation: one per detector."""

from __future__ import annotations

from sd_unlearn.metrics.registry import merge_cards


def test_cards_of_a_detector_are_merged() -> None:
    shared = {"detector": "resnet50", "about": "a classifier"}
    cards = [{**shared, "extra": {"label": label, "side": "224"}} for label in ("church", "tench", "church")]
    other = {"detector": "clip", "about": "", "extra": {}}
    assert merge_cards([*cards, other]) == [{**shared, "extra": {"label": "church; tench", "side": "224"}}, other]
    assert cards[0]["extra"]["label"] == "church"
