"""The plan of a training: --dry_run, --vram, and the batches that a training takes from it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tree

from sd_unlearn.cli import main
from sd_unlearn.config.base import RenderConfig
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.find_concept import load_concept
from sd_unlearn.data.render_job import make_job
from sd_unlearn.io.files import write_json
from sd_unlearn.io.run_folder import CONFIG, METADATA, TRAINING, UNLABELED
from sd_unlearn.models.fit import GIB, MIB
from sd_unlearn.models.source import Source
from sd_unlearn.training import trainer
from sd_unlearn.training.plan import describe_plan, known_speed, plan_memory
from sd_unlearn.training.preflight import check_inputs

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PLANNED = TrainConfig(vram="8GB", mixed_precision="fp16")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to weights fails."""
    for name in ("torch.load", "safetensors.torch.load_file", "diffusers.DiffusionPipeline.from_pretrained"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("weights were loaded"))
    monkeypatch.setattr("sd_unlearn.models.loading.load_pipeline", lambda *_: pytest.fail("the base was loaded"))


@pytest.mark.usefixtures("no_weights")
def test_a_dry_run_prints_the_plan_and_writes_nothing(concept_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(Path("."))
    command = ["--concept", str(concept_file), "--pretrained_model_name_or_path", SD15, "--mixed_precision", "fp16"]
    assert main(["train", *command, "--dry_run", "--vram", "8GB"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "40 images a step in 14 micro-batches of at most 3",
        "of 7.5 GB free on a GPU with 8 GB",
        "activations",
    ):
        assert words in printed
    assert "Images to generate: 13 of 13, 512 pixels" in printed
    assert main(["render", *command, "--dry_run", "--vram", "4GB"]) == 0
    assert "2 images at once instead of 4" in capsys.readouterr().out
    assert tree(Path(".")) == before


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("command", ["train", "render"])
def test_a_dry_run_refuses_a_folder_that_was_rendered_with_other_settings(
    concept_file: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """As a real run does; another --seed of a training is allowed."""
    config = RenderConfig(concept=str(concept_file), data_dir=Path("images"))
    job = make_job(load_concept(config.concept), config, Source("digits"))
    Path("images").mkdir()
    write_json(Path("images/settings.json"), job.settings)
    words = [command, "--concept", config.concept, "--data_dir", "images", "--dry_run"]
    words += ["--pretrained_model_name_or_path", "digits"]
    assert main([*words, "--seed", "1" if command == "train" else "0"]) == 0
    assert main([*words, "--num_keep", "7"]) == 2
    found = "--data_dir images was rendered with other settings: keep images (--num_keep) 4 then, 7 now."
    assert found in capsys.readouterr().err


def test_options_win_over_the_plan() -> None:
    source = Source(SD15)
    chosen = plan_memory(PLANNED, source, 10).batching
    assert (chosen.micro_batch_size, chosen.gradient_checkpointing) == (3, False)
    given = plan_memory(replace(PLANNED, train_batch_size=2), source, 10).batching
    assert (given.micro_batch_size, given.gradient_checkpointing) == (2, False)
    large = plan_memory(replace(PLANNED, train_batch_size=14), source, 10).batching
    assert (large.micro_batch_size, large.gradient_checkpointing) == (14, True)
    parts = plan_memory(replace(PLANNED, gradient_accumulation_steps=20, render_batch_size=3), source, 10).batching
    assert (parts.micro_batch_size, parts.render_batch_size, parts.preview_batch_size) == (2, 3, 3)
    on = plan_memory(replace(PLANNED, gradient_checkpointing=True), source, 10)
    assert on.batching.micro_batch_size > 3
    assert on.peak.total <= on.device.usable


def test_what_cannot_fit_is_refused_with_what_is_left_to_try(
    concept_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--concept", str(concept_file), "--pretrained_model_name_or_path", SD15, "--dry_run"]
    assert main([*command, "--vram", "2GB"]) == 1
    printed = capsys.readouterr()
    assert "does not fit" in printed.out
    assert "--mixed_precision fp16" in printed.err
    assert "a lower --resolution" in printed.err


@pytest.mark.parametrize("size", ["8XB", "huge", "0GB", "-8GB", "5000GB"])
def test_a_wrong_size_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "seven", "--dry_run", f"--vram={size}"]) == 2
    message = capsys.readouterr().err
    assert "--vram" in message
    assert size in message


@pytest.mark.parametrize("size", ["8GB", "8 gib", "8192MB", "8"])
def test_sizes(size: str) -> None:
    from sd_unlearn.config.planning import parse_vram

    assert parse_vram(size) == 8 * GIB


def test_without_a_shortage_a_cpu_does_everything_at_once() -> None:
    batching = plan_memory(TrainConfig(), Source("digits"), 10).batching
    assert (batching.micro_batch_size, batching.gradient_checkpointing) == (40, False)
    assert (batching.teacher_batch_size, batching.encode_batch_size, batching.render_batch_size) == (80, 64, 100)


def test_the_time_comes_from_an_earlier_run_of_the_same_kind() -> None:
    source, config = Source("digits"), TrainConfig()
    plan = plan_memory(config, source, 10)

    def record(name: str, **changes: object) -> None:
        folder = Path("runs") / name
        folder.mkdir(parents=True)
        cost = {"device": "cpu", "mixed_precision": "no", "seconds": 10.0, "images_seen": 50} | changes
        write_json(folder / TRAINING, {"base": {"name": "digits"}, "created": name, "cost": cost})
        (folder / CONFIG).write_text("resolution: null\n")

    record("a", device="a GPU")
    assert known_speed(Path("runs"), source, config, plan) is None
    record("b")
    record("c", seconds=5.0)
    assert known_speed(Path("runs"), source, config, plan) == 10.0
    assert known_speed(Path("runs"), source, replace(config, resolution=64), plan) is None
    record("d", processes=2)
    assert known_speed(Path("runs"), source, config, plan) == 10.0  # of another number of processes
    (Path("runs") / "c" / TRAINING).write_text("{}")
    assert known_speed(Path("runs"), source, config, plan) == 5.0


@pytest.mark.parametrize(
    ("options", "has_offsets"),
    [({}, True), ({"guidance_scale": 1.0}, False), ({"teacher_reuse": 1}, False), ({"target": "noise"}, False)],
)
def test_the_disk_space_of_a_run_counts_the_offsets_in_checkpoints(
    tiny_base: Path, concept_file: Path, photos: Callable[..., Path], options: dict[str, Any], has_offsets: bool
) -> None:
    """As many bytes as a training really saves."""
    folder = photos(unlabeled=4, positive=3)
    retained = [{"file_name": f"{n}.png", "text": "a photo of a dog", "group": "keep"} for n in (0, 1)]
    (folder / UNLABELED / METADATA).write_text("\n".join(map(json.dumps, retained)))
    given = {
        "concept": str(concept_file),
        "pretrained_model_name_or_path": str(tiny_base),
        "data_dir": folder,
        "output_dir": Path("run"),
        "max_train_steps": 1,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 3,
        "validation_steps": 0,
        "report_to": "none",
    }
    config = TrainConfig(**given | options)
    inputs = check_inputs(config)
    plan = plan_memory(config, inputs.source, 10)
    run = trainer.run(config)
    saved = torch.load(next((run / "checkpoints").glob("*/state.pt")), weights_only=False)
    size = sum(tensor.nbytes for of_process in saved["offsets"] for tensor in of_process)
    assert (size > 0) == has_offsets
    printed = re.search(r"of which checkpoints take (\d+) MB", describe_plan(config, inputs, Path("run"), plan))
    t = plan.training.trained
    assert printed
    assert int(printed[1]) == round(3 * (t.gradients + t.optimizer + t.average + size) / MIB)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_the_error_names_options_for_the_kind_of_the_base(
    name: str, concept_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {"sd15": SD15, "flux": "black-forest-labs/FLUX.1-dev"}[name]
    command = ["train", "--concept", str(concept_file), "--pretrained_model_name_or_path", base, "--dry_run"]
    assert main([*command, "--vram", "1GB", "--torch_compile", "--train_batch_size", "4"]) == 1
    message = capsys.readouterr().err
    assert "Try a smaller --train_batch_size, " in message
    assert f"--mixed_precision {'bf16' if name == 'flux' else 'fp16'}, " in message
    assert "--offload" in message
    assert "--quantize_base" not in message  # not with --torch_compile
