"""The options that are named when a training needs too much memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sd_unlearn.config.checks import check_train
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.models.kinds import KINDS
from sd_unlearn.training.memory import remedies

CONFIG = TrainConfig(concept="seven")
QUANTIZE, OFFLOAD, COMPILE = "--quantize_base nf4", "--offload", {"torch_compile": True}


def named(config: TrainConfig = CONFIG, kind: str = "sd1", precision: Any = "no", on_gpu: bool = True) -> list[str]:
    return remedies(config, kind, 512, precision, on_gpu)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_that_of_the_kind(kind: str) -> None:
    half = "--mixed_precision bf16" if KINDS[kind].is_flow else "--mixed_precision fp16"
    assert [words for words in named(kind=kind) if "mixed_precision" in words] == [half]
    assert not any("mixed_precision" in words for words in named(kind=kind, precision="bf16"))
    assert not any("mixed_precision" in words for words in named(kind=kind, on_gpu=False))


@pytest.mark.parametrize("kind", ["sd1", "flux"])
@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({}, set()),
        ({"use_dora": True}, {QUANTIZE, OFFLOAD}),
        (COMPILE, {QUANTIZE}),
        ({"quantize_base": "int8"}, {QUANTIZE}),
        ({"offload": True}, {OFFLOAD}),
        ({"method": "full"}, {QUANTIZE, OFFLOAD}),
    ],
)
def test_what_is_named_can_be_used_with_the_other_options(
    kind: str, options: dict[str, Any], left_out: set[str]
) -> None:
    config = replace(CONFIG, **options)
    found = named(config, kind)
    assert {QUANTIZE, OFFLOAD} - set(found) == left_out
    for words, change in ((QUANTIZE, {"quantize_base": "nf4"}), (OFFLOAD, {"offload": True})):
        if words in found:
            check_train(replace(config, **change))  # type: ignore[arg-type]


def test_offloading_is_for_gpus_and_in_several_processes_for_a_quantized_base(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OFFLOAD not in named(on_gpu=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert OFFLOAD not in named()
    assert OFFLOAD in named(replace(CONFIG, quantize_base="nf4"))
