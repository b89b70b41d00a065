"""Where the images of attacks are kept: earlier ones are used again wherever they are right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from attack_cases import CONCEPT, SAMPLER

from sd_unlearn.attacks.registry import ATTACKS
from sd_unlearn.attacks.tasks import Model, task_folder
from sd_unlearn.evaluation.generate import ImageCache
from sd_unlearn.evaluation.loras import ModelVariant
from sd_unlearn.models.sampling import Sampler

BASE = {"name": "some", "kind": "sd1"}


def name(attack: str = "soft", base: dict[str, Any] = BASE, sampler: Sampler = SAMPLER, suffix: str = "") -> str:
    def load() -> Any:
        raise AssertionError

    model = Model("base", ModelVariant(), ("seven",), load, ImageCache(Path(), base, sampler, suffix))
    settings = ATTACKS[attack].budgets["quick"]
    return task_folder(model, CONCEPT, ATTACKS[attack], settings, 0, "", 0).parent.name


def test_attacks_that_were_right_are_not_done_again() -> None:
    """Names that the first attacks of VERSION 2 have."""
    assert (name(), name("noise")) == ("soft-4f558b6be627", "noise-1814ba2379f6")


@pytest.mark.parametrize(("attack", "again"), [("soft", True), ("inversion", True), ("noise", False)])
def test_attacks_with_the_timesteps_of_another_resolution_are_done_again(attack: str, again: bool) -> None:
    at_64 = replace(SAMPLER, resolution=64)
    assert name(attack, BASE, at_64) == name(attack)  # the folder above has the resolution
    assert (name(attack, BASE | {"kind": "flux"}, at_64) != name(attack)) == again
    assert name(attack, BASE | {"kind": "flux"}) == name(attack)


@pytest.mark.parametrize(("attack", "again"), [("finetune", True), ("strength", False)])
def test_attacks_by_gradients_in_fp16_are_done_again(attack: str, again: bool) -> None:
    assert (name(attack, suffix="-zero-snr-fp16") != name(attack)) == again
    assert name(attack, suffix="-bf16") == name(attack)
