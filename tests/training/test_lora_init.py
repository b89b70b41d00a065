"""--lora_init: where the LoRA starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_runs import ADAPTER, make, rendered

from sd_unlearn.config.checks import check_train
from sd_unlearn.config.loop import STEPS
from sd_unlearn.config.train import TrainConfig, resolve_lora_init
from sd_unlearn.errors import UsageError
from sd_unlearn.models.base import Base
from sd_unlearn.training import trainer
from sd_unlearn.training.preflight import check_kind
from sd_unlearn.training.setup import resolve_defaults

pytestmark = pytest.mark.usefixtures("one_thread")
# A training that changes nothing by itself.
STILL: dict[str, Any] = {"max_train_steps": 1, "learning_rate": 1e-12, "weight_decay": 0.0, "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    return rendered(tmp_path_factory.mktemp("init"), tiny_base)


def change(run: Path) -> dict[str, torch.Tensor]:
    """What the LoRA adds to each layer that it changes; alpha is the rank."""
    state = load_file(run / ADAPTER)
    downs = {name.removesuffix(".lora_A.weight"): down for name, down in state.items() if "lora_A" in name}
    added = {name: state[f"{name}.lora_B.weight"].double() @ down.double() for name, down in downs.items()}
    return {name: value for name, value in added.items() if value.norm() > 1e-9}


@pytest.mark.parametrize("options", [{}, {"lora_alpha": 4.0}, {"quantize_base": "int8"}, {"train_text_encoder": True}])
def test_training_starts_from_uce(place: Path, tiny_base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    concept, base = str(place / "brad.yaml"), str(tiny_base)
    edited = trainer.run(
        TrainConfig(concept=concept, pretrained_model_name_or_path=base, objective="uce", output_dir=tmp_path / "uce")
    )
    run = trainer.run(make(place, tiny_base, tmp_path / "run", rank=16, **STILL, **options))
    wanted, found = change(edited), change(run)
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        scale = options.get("lora_alpha", 16) / 16
        assert torch.allclose(scale * found[name], value, atol=1e-5)


def test_it_starts_from_nothing_when_asked(place: Path, tiny_base: Path, tmp_path: Path) -> None:
    run = trainer.run(make(place, tiny_base, tmp_path / "run", lora_init="zero", **STILL))
    assert not change(run)


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({}, "uce"),
        ({"lora_init": "zero"}, "zero"),
        ({"lora_targets": "attention"}, "uce"),
        ({"lora_targets": "not_cross_attention"}, "zero"),
        ({"use_dora": True}, "zero"),
        ({"target": "noise"}, "zero"),
        ({"objective": "anchor"}, "zero"),
        ({"objective": "anchor", "lora_init": "uce"}, "uce"),
        ({"method": "full"}, None),
    ],
)
def test_the_default(loaded_base: Base, options: dict[str, Any], start: str | None) -> None:
    data: Any = SimpleNamespace(beta=0.2, turns=[None])
    resolved = resolve_defaults(TrainConfig(concept="seven", **options), loaded_base, data, 1)
    assert resolved.lora_init == start
    assert resolved.max_train_steps == STEPS[start or "zero"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "--lora_init uce does not work with --use_dora"),
        ({"lora_targets": "not_cross_attention"}, "--lora_targets not_cross_attention trains nothing"),
        ({"objective": "esd-u"}, "--objective esd-u trains nothing"),
        ({"method": "full"}, "--lora_init is for --method lora"),
    ],
)
def test_an_edit_that_the_lora_cannot_hold_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_train(TrainConfig(concept="seven", lora_init="uce", **options))


def test_joint_attention_has_no_edit() -> None:
    assert resolve_lora_init(TrainConfig(concept="seven"), is_flow=True) == "zero"
    with pytest.raises(UsageError, match="--lora_init uce edits cross-attention; digits-sd3 is .* --lora_init zero"):
        check_kind(TrainConfig(concept="seven", lora_init="uce"), "sd3", "digits-sd3")
