"""--add_edit: the closed-form edit that a trained LoRA contains."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_runs import ADAPTER, logged, make, rendered

from sd_unlearn.config.checks import check_train
from sd_unlearn.config.loop import LEARNING_RATE, STEPS
from sd_unlearn.config.train import TrainConfig, resolve_edit
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation.loras import open_lora
from sd_unlearn.export.kohya import read_adapter
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


def weights(base: Base) -> dict[str, torch.Tensor]:
    """The weights of cross-attention's keys and values."""
    state = base.pipeline.unet.state_dict()
    return {n: v.clone() for n, v in state.items() if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_alpha": 4.0},
        {"quantize_base": "int8"},
        {"train_text_encoder": True},
        {"lora_targets": "not_cross_attention"},
    ],
)
def test_the_saved_lora_has_the_edit_beside_what_was_trained(
    place: Path, tiny_base: Path, loaded_base: Base, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Nothing is trained here, so the sum is the edit; in the layers without an edit the rank is that of the LoRA."""
    concept, base = str(place / "brad.yaml"), str(tiny_base)
    edited = trainer.run(
        TrainConfig(concept=concept, pretrained_model_name_or_path=base, objective="uce", output_dir=tmp_path / "uce")
    )
    run = trainer.run(make(place, tiny_base, tmp_path / "run", **STILL, **options))
    with open_lora(str(run)).applied_to(loaded_base, 1.0):
        found = weights(loaded_base)
    with open_lora(str(edited)).applied_to(loaded_base, 1.0):
        wanted = weights(loaded_base)
    unchanged = weights(loaded_base)
    for name, weight in wanted.items():
        change = (weight - unchanged[name]).norm()
        assert (found[name] - weight).norm() <= 0.05 * change  # small directions are left out
        assert change > 0
    ranks = {pair.module: pair.rank for pair in read_adapter(run / "adapter").pairs}
    assert {rank for module, rank in ranks.items() if "attn2.to_k" not in module and "attn2.to_v" not in module} == {2}


def test_training_does_without_the_edit(place: Path, tiny_base: Path, tmp_path: Path) -> None:
    """The trained part and everything logged are the same with and without the edit; only what is saved differs."""
    runs = [
        trainer.run(make(place, tiny_base, tmp_path / edit, add_edit=edit, max_train_steps=3))
        for edit in ("uce", "none")
    ]
    assert logged(runs[0]) == logged(runs[1])
    with_edit, without = (load_file(run / ADAPTER) for run in runs)
    assert with_edit.keys() == without.keys()
    for name, tensor in without.items():
        found = with_edit[name]
        trained = found[: len(tensor)] if "lora_A" in name else found[:, : tensor.shape[1]]
        assert torch.equal(trained, tensor)
    assert any(len(with_edit[name]) > len(tensor) for name, tensor in without.items())


def test_previews_show_what_would_be_saved(place: Path, tiny_base: Path, tmp_path: Path) -> None:
    """The grid of step 0 is the base's, with or without an edit. The last one is of the saved LoRA: with an edit."""
    grids = []
    for edit in ("uce", "none"):
        run = trainer.run(make(place, tiny_base, tmp_path / edit, add_edit=edit, validation_steps=1, **STILL))
        grids.append([(run / "previews" / f"step-00000{step}.png").read_bytes() for step in (0, 1)])
    edited, plain = grids
    assert edited[0] == plain[0] == plain[1]
    assert edited[1] != edited[0]


@pytest.mark.parametrize(
    ("options", "edit"),
    [
        ({}, "uce"),
        ({"add_edit": "none"}, "none"),
        ({"lora_targets": "attention"}, "uce"),
        ({"lora_targets": "not_cross_attention"}, "uce"),
        ({"use_dora": True}, "none"),
        ({"target": "noise"}, "none"),
        ({"objective": "anchor"}, "none"),
        ({"objective": "anchor", "add_edit": "uce"}, "uce"),
        ({"method": "full"}, None),
    ],
)
def test_the_default(loaded_base: Base, options: dict[str, Any], edit: str | None) -> None:
    data: Any = SimpleNamespace(beta=0.2, turns=[None])
    resolved = resolve_defaults(TrainConfig(concept="seven", **options), loaded_base, data, 1)
    assert resolved.add_edit == edit
    assert resolved.max_train_steps == STEPS[edit or "none"]
    assert resolved.learning_rate == LEARNING_RATE[edit or "none"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "--add_edit uce does not work with --use_dora"),
        ({"method": "full"}, "--add_edit is for --method lora"),
        ({"objective": "uce"}, "--add_edit uce: --objective uce is computed in closed form"),
    ],
)
def test_an_edit_that_cannot_be_added_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_train(TrainConfig(concept="seven", add_edit="uce", **options))


def test_joint_attention_has_no_edit() -> None:
    assert resolve_edit(TrainConfig(concept="seven"), is_flow=True) == "none"
    with pytest.raises(UsageError, match="--add_edit uce changes cross-attention; digits-sd3 is .* --add_edit none"):
        check_kind(TrainConfig(concept="seven", add_edit="uce"), "sd3", "digits-sd3")
