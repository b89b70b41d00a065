"""Closed-form objectives from options to LoRA files, compared with the formula of the paper on the tiny base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tree
from diffusers import StableDiffusionPipeline
from export_runs import exported, read_header
from kinds import POOLED, WIDTH, Kinds
from torch import Tensor

from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.find_concept import read_concept
from sd_unlearn.errors import UsageError
from sd_unlearn.evaluation.loras import open_lora
from sd_unlearn.export.kohya import read_adapter
from sd_unlearn.io.reading import read_json, read_yaml
from sd_unlearn.models.base import Base, load_base
from sd_unlearn.training import closed_form, cross_attention, trainer

pytestmark = pytest.mark.usefixtures("one_thread")

# one letter a token: the captions end alike, so the subjects are "7" and "t"
FILE = """\
name: seven
caption: 7 x
generic: it x
keep: [ab, "{c,d} e"]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("closed-form")
    (folder / "seven.yaml").write_text(FILE)
    return folder


def train(place: Path, base: Path, objective: str, **options: Any) -> Path:
    options = {"output_dir": place / f"run-{objective}"} | options
    return trainer.run(
        TrainConfig(
            concept=str(place / "seven.yaml"),
            pretrained_model_name_or_path=str(base),
            objective=objective,  # type: ignore[arg-type]
            **options,
        )
    )


@pytest.fixture(scope="module", params=["uce", "speed", "rece"])
def edited(request: pytest.FixtureRequest, place: Path, tiny_base: Path) -> Path:
    return train(place, tiny_base, request.param)


def objective_of(run: Path) -> str:
    return read_json(run / "training.json")["objective"]


def weights(base: Base) -> dict[str, Tensor]:
    """The weights of cross-attention's keys and values."""
    state = base.pipeline.unet.state_dict()
    return {n: v.clone() for n, v in state.items() if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}


def changed(run: Path, base: Base) -> dict[str, Tensor]:
    """The weights of a base with a LoRA at strength 1."""
    with open_lora(str(run)).applied_to(base, 1.0):
        return weights(base)


def test_the_lora_is_the_edit_of_the_paper(edited: Path, place: Path, loaded_base: Base) -> None:
    """UCE from equation 7 as printed; SPEED changes values only, and no projection of a kept prompt."""
    before = weights(loaded_base)
    after = changed(edited, loaded_base)
    found = cross_attention.embed(loaded_base, read_concept(place / "seven.yaml"))
    c, a, p = (x.double() for x in (found.concepts, found.anchors, found.preserved))
    objective = objective_of(edited)
    for name, old in before.items():
        old = old.double()
        new = after[name].double()
        if objective == "uce":
            gram = 0.5 * torch.eye(WIDTH) + c.T @ c + p.T @ p
            printed = (0.5 * old + old @ a.T @ c + old @ p.T @ p) @ torch.linalg.inv(gram)
            assert torch.allclose(new, printed, atol=1e-6)
        elif objective == "speed" and "to_k" in name:
            assert torch.equal(new, old)
        else:
            assert (new - old).norm() > 1e-6 * old.norm()
            assert ((new - old) @ c.T).norm() > ((new - old) @ p.T).norm() * (len(c) / len(p)) ** 0.5


def test_rece_repeats_its_edit_more_often_for_nudity(place: Path) -> None:
    concept = read_concept(place / "seven.yaml")
    config = TrainConfig(objective="rece")
    assert closed_form.rece_epochs(config, concept) == 1
    assert closed_form.rece_epochs(config, replace(concept, kind="nudity")) == 3
    assert closed_form.rece_epochs(replace(config, rece_epochs=2), concept) == 2


def test_speed_needs_directions_that_the_keep_prompts_leave() -> None:
    """Rows 3 e_i use direction i; a row of length 0.1 does not use its direction (0.01 is below the threshold)."""
    directions = torch.eye(4)

    def free(preserved: Tensor) -> int:
        return closed_form.free_directions(cross_attention.Embeddings(directions[:1], directions[1:2], preserved), 0.1)

    assert free(3 * directions[:1]) == 3
    assert free(torch.cat([3 * directions[:3], 0.1 * directions[3:]])) == 1
    with pytest.raises(UsageError, match="their 4 embeddings use all 4. .* a --null_space_threshold above 0.1"):
        free(3 * directions)


def test_the_run_folder_and_its_record(edited: Path) -> None:
    names = {"adapter", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert tree(edited) - {".sd-unlearn-run", ".lock"} >= names | {"concept.yaml", "config.yaml", "training.json"}
    record, settings = read_json(edited / "training.json"), read_yaml(edited / "config.yaml", "")
    assert record["cost"]["steps"] == 0
    assert record["rank"] == record["lora_alpha"] == read_adapter(edited / "adapter").settings.r
    assert record["truncation_error"] < 1e-10
    assert record["truncation_error"] < record["rounding_error_fp32"] < 1e-5 < record["rounding_error_fp16"] < 1e-2
    assert settings["objective"] == record["objective"]
    is_speed = record["objective"] == "speed"
    assert ("free_directions" in record) == is_speed
    assert record.get("rece_epochs") == (1 if record["objective"] == "rece" else None)
    assert record.get("erase_weight") == settings.get("erase_weight") == (None if is_speed else 1.0)
    assert record.get("null_space_threshold") == settings.get("null_space_threshold") == (0.1 if is_speed else None)
    assert "max_train_steps" not in settings
    again = trainer.run(TrainConfig(**settings | {"output_dir": edited.with_name(f"{edited.name}-again")}))
    adapters = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (edited, again)]
    assert adapters[0] == adapters[1]


def test_the_exported_files_make_the_same_change(edited: Path, tiny_base: Path, loaded_base: Base) -> None:
    """In Diffusers, from both files; and in our reader, from the file for ComfyUI and A1111."""
    expected = changed(edited, loaded_base)
    files = exported(edited)
    for file in files:
        header = read_header(file)
        assert header["sd_unlearn.objective"] == objective_of(edited)
        assert float(header["sd_unlearn.truncation_error"]) < 1e-10
        assert int(header["sd_unlearn.rank"]) == read_json(edited / "training.json")["rank"]
        assert "sd_unlearn.beta" not in header
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_base)
        pipeline.load_lora_weights(str(file))
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        fused = pipeline.unet.state_dict()
        for name, weight in expected.items():
            key = name if name in fused else name.replace(".weight", ".base_layer.weight")
            assert torch.allclose(fused[key], weight, atol=1e-6)
        read = changed(file, loaded_base)
        assert all(torch.allclose(read[name], weight, atol=1e-6) for name, weight in expected.items())


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_other_bases(kinds: Kinds, place: Path, kind: str, tmp_path: Path) -> None:
    folder = kinds.place(kind, "folder")
    run = train(place, folder, "uce", output_dir=tmp_path / "run")
    base = load_base(str(folder), device="cpu")
    width = WIDTH + POOLED if kind == "sdxl" else WIDTH
    found = cross_attention.embed(base, read_concept(place / "seven.yaml"))
    assert found.concepts.shape[1] == found.preserved.shape[1] == width
    before, after = weights(base), changed(run, base)
    for name, weight in after.items():
        wanted, kept = before[name] @ found.anchors.T, weight @ found.concepts.T
        assert (kept - wanted).norm() < (before[name] @ found.concepts.T - wanted).norm()
    assert len(exported(run)) == 2


@pytest.mark.parametrize(
    ("option", "flag"),
    [
        ({"rank": 4}, "--rank 4"),
        ({"seed": 1}, "--seed 1"),
        ({"beta_sweep": "1,2"}, "--beta_sweep 1,2"),
        ({"method": "full"}, "--method full"),
        ({"retain": False}, "--no_retain"),
    ],
)
def test_options_of_a_training_are_refused(
    place: Path, tiny_base: Path, option: dict[str, Any], flag: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"^{flag}: --objective uce is computed in closed form.* Leave it out"):
        train(place, tiny_base, "uce", output_dir=tmp_path / "run", **option)
    assert not (tmp_path / "run").exists()


def test_a_plan_and_an_earlier_run(
    edited: Path, place: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = objective_of(edited)
    train(place, tiny_base, objective, output_dir=tmp_path / "run", data_dir=tmp_path / "data", dry_run=True)
    plan = capsys.readouterr().out
    assert f"--objective {objective}" in plan
    assert "Preserved: 3 keep prompts. No images are generated" in plan
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="holds a finished run"):
        train(place, tiny_base, objective)
