"""What is in memory at the same time: one base, in the precision asked for, and only the parts that a step needs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_runs import make_run
from kinds import KINDS, Kinds

from sd_unlearn import cli
from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.config.objective import Weights
from sd_unlearn.evaluation import evaluate
from sd_unlearn.models import base as base_module
from sd_unlearn.models.base import load_base
from sd_unlearn.models.student import make_student
from sd_unlearn.objectives import registry

pytestmark = pytest.mark.usefixtures("one_thread")


class Loaded:
    """The networks of every base that was loaded, while they are in memory."""

    def __init__(self) -> None:
        self.bases: list[dict[str, weakref.ref[Any]]] = []

    def alive(self) -> list[set[str]]:
        gc.collect()
        return [{name for name, network in networks.items() if network() is not None} for networks in self.bases]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loaded]:
    load, seen = base_module.load_pipeline, Loaded()

    def watched(*arguments: Any) -> Any:
        pipeline = load(*arguments)
        seen.bases.append({name: weakref.ref(getattr(pipeline, name)) for name in ("unet", "vae", "text_encoder")})
        return pipeline

    monkeypatch.setattr(base_module, "load_pipeline", watched)
    return seen


@pytest.mark.parametrize(("previews", "kept"), [("0", {"unet"}), ("5", {"unet", "vae"})])
def test_rendering_and_training_share_one_base_and_a_step_needs_only_its_unet(
    tiny_base: Path,
    concept_file: Path,
    loaded: Loaded,
    monkeypatch: pytest.MonkeyPatch,
    previews: str,
    kept: set[str],
) -> None:
    losses, found = registry.example_losses, []

    def watched(*arguments: Any) -> Any:
        found.append(loaded.alive())
        return losses(*arguments)

    monkeypatch.setattr(registry, "example_losses", watched)
    command = ["train", str(concept_file), "--pretrained_model_name_or_path", str(tiny_base), "--data_dir", "data"]
    command += ["--num_inference_steps", "1", "--max_train_steps", "1", "--validation_steps", previews]
    assert cli.main([*command, "--report_to", "none", "--train_batch_size", "8"]) == 0
    assert found
    assert all(alive == [kept] for alive in found)


def test_an_evaluation_drops_the_base_before_it_runs_its_metrics(
    tiny_base: Path, tmp_path: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", tiny_base)
    loaded.bases.clear()
    make, found = evaluate.make_metrics, []

    def watched(*arguments: Any) -> Any:
        found.append(loaded.alive())
        return make(*arguments)

    monkeypatch.setattr(evaluate, "make_metrics", watched)
    evaluate.run(
        EvaluateConfig(
            run=run, groups=["direct"], num_images=1, num_inference_steps=1, cache_dir=tmp_path / "c", output_dir=run
        )
    )
    assert found == [[set()]]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_in_half_precision_once_and_the_lora_in_full(kinds: Kinds, kind: str, precision: str) -> None:
    base = load_base(str(kinds.folder(kind)), precision, device="cpu")
    student = make_student(base, Weights(rank=2), seed=0, needs_teacher=True)
    trained = {id(parameter) for parameter in student.trainable()}
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    networks = [base.pipeline.vae, base.pipeline.text_encoder, getattr(base.pipeline, "text_encoder_2", None)]
    for network in [student.model, *filter(None, networks)]:
        for name, parameter in network.named_parameters():
            assert parameter.dtype == (torch.float32 if id(parameter) in trained else half), name
    assert student.base_copy is None
    assert trained
