"""The options of a training as they are recorded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sd_unlearn.config.checks import check_train
from sd_unlearn.config.train import TrainConfig, resolve_steps
from sd_unlearn.models.base import Base
from sd_unlearn.training.setup import resolve_defaults


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objective": "esd-x"},
        {"objective": "esd-u"},
        {"objective": "anchor"},
        {"objective": "neggrad"},
        {"objective": "neggrad", "target": "noise"},
        {"objective": "supervised", "target": "noise"},
        {"objective": "unsupervised", "target": "noise"},
        {"method": "full"},
        {"method": "full", "target": "noise", "train_batch_size": 8},
    ],
)
@pytest.mark.parametrize("concepts", [1, 2])
def test_recorded_options_are_accepted_again(loaded_base: Base, options: dict[str, Any], concepts: int) -> None:
    config = TrainConfig(concept="seven", **options)
    check_train(config)
    data: Any = SimpleNamespace(beta=0.2 if concepts == 1 else None, turns=[None] * concepts)
    resolved = resolve_defaults(config, loaded_base, data, 1)
    check_train(resolved)
    assert resolve_defaults(resolved, loaded_base, data, 1) == resolved
    assert resolved.lora_targets is None or config.method == "lora"


@pytest.mark.parametrize(("concepts", "is_flow", "steps"), [(1, False, 250), (11, False, 275), (1, True, 500)])
def test_the_default_number_of_steps(concepts: int, is_flow: bool, steps: int) -> None:
    assert resolve_steps(TrainConfig(concept="seven"), concepts, is_flow) == steps
    assert resolve_steps(TrainConfig(concept="seven", max_train_steps=7), concepts, is_flow) == 7


@pytest.mark.parametrize(("scale", "unconditional"), [(None, 0.25), (7.5, 0.25), (1.0, 0.0), (0.0, 0.0)])
def test_no_keep_images_get_the_empty_caption_without_guidance(
    loaded_base: Base, scale: float | None, unconditional: float
) -> None:
    data: Any = SimpleNamespace(beta=0.2, turns=[None])
    config = TrainConfig(concept="seven", guidance_scale=scale)
    assert resolve_defaults(config, loaded_base, data, 1).unconditional == unconditional
    given = TrainConfig(concept="seven", guidance_scale=scale, unconditional=0.5)
    assert resolve_defaults(given, loaded_base, data, 1).unconditional == 0.5
