"""Defaults of `train` that depend on other options."""

from __future__ import annotations

from typing import Any

import pytest

from sd_unlearn.config.objective import REUSE
from sd_unlearn.config.train import TrainConfig, default_lora_targets, resolve_teacher_reuse


def test_layers_by_default_are_all_of_a_unet_those_of_the_method_and_the_blocks_of_a_transformer() -> None:
    assert default_lora_targets("pu", is_flow=False) == default_lora_targets("anchor", False) == "all_linear+conv"
    assert default_lora_targets("pu", is_flow=True) == "attention+mlp"
    for is_flow in (False, True):
        assert default_lora_targets("esd-x", is_flow) == "cross_attention"
        assert default_lora_targets("esd-u", is_flow) == "not_cross_attention"


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
