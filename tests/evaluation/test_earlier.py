"""Which attacks of replaced results still hold for new ones."""

from __future__ import annotations

from typing import Any

import pytest

from sd_unlearn.evaluation.earlier import carry_attacks
from sd_unlearn.results import parse_results

CONCEPT = {"slug": "seven", "name": "seven", "caption": "a", "generic": "b", "sha256": "c7"}
BASE = {"name": "digits", "sha256": "b1", "vae_sha256": "v1", "text_encoder_sha256": "t1"}
SAMPLER = {"name": "DDIM", "steps": 25, "guidance_scale": 3.0, "mixed_precision": "no", "zero_terminal_snr": False}
ENTRY = {"concept": "seven", "attack": "soft", "budget": "quick", "detector": "nudenet", "settings": {}, "tries": []}
CARD = {"detector": "nudenet", "threshold": "score >= 0.9", "extra": {"classes": "FEET_EXPOSED"}}


def results(*subjects: tuple[str, str, float], **changes: Any) -> dict[str, Any]:
    """A results.json of LoRAs: (id, weights, strength)."""
    loras = [{"id": i, "name": i[:5], "what": "lora", "sha256": sha, "strength": s} for i, sha, s in subjects]
    shared = {"schema_version": 2, "concepts": [CONCEPT], "base": BASE, "sampler": SAMPLER, "cards": [CARD]}
    own = {"subjects": [{"id": "base", "name": "digits", "what": "base"}, *loras], "rows": [], "attacks": []}
    return {**shared, **own, **changes}


def attacked(*subjects: tuple[str, str, float], **changes: Any) -> dict[str, Any]:
    """The same with an attack on each."""
    found = results(*subjects, **changes)
    found["attacks"] = [ENTRY | {"subject": subject} for subject, _, _ in subjects]
    row = {"metric": "attack", "group": "soft", "value": 0.1, "n": 60, "detector": "nudenet", "concept": "seven"}
    found["rows"] = [row | {"subject": subject} for subject, _, _ in subjects]
    return found


def carried(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """The subjects whose attack new results have."""
    found = carry_attacks(new, old)
    parse_results(found)
    subjects = [entry["subject"] for entry in found["attacks"]]
    assert subjects == [row["subject"] for row in found["rows"] if row["metric"] == "attack"]
    return subjects


def test_weights_and_strength_identify_a_lora_not_its_id() -> None:
    old = attacked(("seven", "w1", 1.0), ("three", "w3", 1.0))
    assert carried(results(("seven at 0.5", "w1", 0.5), ("seven at 1", "w1", 1.0)), old) == ["seven at 1"]
    assert carried(results(("seven", "w2", 1.0)), old) == []
    assert carried(results(("three", "w1", 1.0)), old) == ["three"]
    same = attacked(("seven", "w1", 1.0), ("again", "w1", 1.0))
    assert carried(results(("seven", "w1", 1.0)), same) == ["seven"]
    assert carried(results(("again", "w1", 1.0), ("seven", "w1", 1.0)), same) == ["seven", "again"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, ""),
        ({"sampler": {**SAMPLER, "steps": 50}}, "with steps 25 (now 50)"),
        ({"sampler": {**SAMPLER, "mixed_precision": "fp16"}}, "with mixed_precision no (now fp16)"),
        ({"sampler": {**SAMPLER, "tiled_images": 9}}, ""),
        ({"base": {**BASE, "sha256": "b2", "name": "other"}}, "with another base (digits, now other)"),
        ({"base": {**BASE, "vae_sha256": "v2"}}, "with another VAE of the base"),
        ({"base": {**BASE, "text_encoder_sha256": "t2"}}, "with another text encoder of the base"),
        ({"base": {"name": "digits", "sha256": "b1"}}, ""),  # records of older versions have fewer hashes
        ({"concepts": [CONCEPT | {"sha256": "c8"}]}, "on another concept file"),
        ({"cards": [CARD | {"threshold": "score >= 0.45"}]}, "by another threshold of nudenet"),
        ({"cards": [CARD | {"extra": {"classes": "ANUS_EXPOSED"}}]}, "by another threshold of nudenet"),
    ],
)
def test_other_settings_are_named_on_stderr(
    change: dict[str, Any], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = ("seven", "w1", 1.0)
    assert carried(results(lora, **change), attacked(lora)) == ([] if why else ["seven"])
    said = capsys.readouterr().err
    assert why in said
    assert ("(soft on seven). Repeat them with sd-unlearn attack." in said) == bool(why)


def test_the_cards_of_carried_attacks_are_carried_over() -> None:
    other = CARD | {"detector": "clip"}
    new = results(("seven", "w1", 1.0), cards=[other])
    assert carry_attacks(new, attacked(("seven", "w1", 1.0), cards=[CARD]))["cards"] == [other, CARD]
    assert carry_attacks(new, attacked(("seven", "w2", 1.0), cards=[CARD]))["cards"] == [other]
