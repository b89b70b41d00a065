"""Defaults of `train` that depend on other options."""

from __future__ import annotations

from typing import Any

import pytest

from sd_unlearn.config.objective import REUSE
from sd_unlearn.config.train import TrainConfig, default_lora_targets, resolve_teacher_reuse


def test_layers_by_default_are_all_or_those_of_the_method() -> None:
    assert default_lora_targets("pu") == default_lora_targets("anchor") == "all_linear+conv"
    assert default_lora_targets("esd-x") == "cross_attention"
    assert default_lora_targets("esd-u") == "not_cross_attention"


@pytest.mark.parametrize(
    ("options", "concepts", "expected"),
    [
        ({}, 1, REUSE),
        ({}, 2, 1),
        ({"target": "noise"}, 1, 1),
        ({"objective": "esd-u"}, 1, 1),
        ({"teacher_reuse": 1}, 1, 1),
        ({"teacher_reuse": 3}, 2, 3),
    ],
)
def test_predictions_of_the_base_are_reused_by_default_where_that_is_possible(
    options: dict[str, Any], concepts: int, expected: int
) -> None:
    assert resolve_teacher_reuse(TrainConfig(concept=["seven"], **options), concepts) == expected
