"""Steps cut into micro-batches of any size, and what happens when memory runs out: the LoRA is the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from train_runs import ADAPTER, Config, make, rendered

from sd_unlearn.errors import UnlearnError
from sd_unlearn.io.reading import read_json, read_jsonl
from sd_unlearn.training import checkpoint, trainer
from sd_unlearn.training.optim import GuardedSteps

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = 8
Raises = Callable[[Any, Tensor], bool]  # UNet, its input -> whether memory runs out
ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture(scope="module")
def place(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rendered(tmp_path_factory.mktemp("place"), tiny_base)


@pytest.fixture(scope="module")
def make_config(place: Path, tiny_base: Path) -> Config:
    def plain(output: Path | str, **changes: object) -> object:
        usual = {"checkpointing_steps": 0, "lora_dropout": 0.0, "ema_decay": None, "max_train_steps": 3}
        usual |= {"effective_batch_size": IMAGES, "train_batch_size": None}
        return make(place, tiny_base, output, **(usual | changes))

    return plain  # type: ignore[return-value]


def run_out(monkeypatch: pytest.MonkeyPatch, raises: Raises, backward: bool = False) -> None:
    """Memory runs out in a forward pass of the UNet, or in its backward pass, where `raises` says so."""
    forward = UNet2DConditionModel.forward

    def fail(*_: object) -> None:
        raise ERROR

    def watched(unet: Any, sample: Tensor, *arguments: Any, **options: Any) -> Any:
        out_of_memory = raises(unet, sample)
        if out_of_memory and not backward:
            fail()
        found = forward(unet, sample, *arguments, **options)
        if out_of_memory:
            found.sample.register_hook(fail)
        return found

    monkeypatch.setattr(UNet2DConditionModel, "forward", watched)


def weights(run: Path) -> Tensor:
    return torch.cat([value.flatten() for _, value in sorted(load_file(run / ADAPTER).items())])


@pytest.mark.parametrize("target", ["teacher", "noise"])
def test_micro_batches_of_any_size_train_the_same_lora(
    photos: Callable[..., Path], make_config: Config, target: str
) -> None:
    """With several sets of positives, images known to be normal and two caption groups: 17 images of 9 kinds."""
    folder = photos(unlabeled=4, positive=3)
    shutil.copytree(folder / "0_unlabeled", folder / "2_negative")
    shutil.copytree(folder / "1_positive", folder / "1_positive_2")
    (folder / "1_positive_2" / "0.png").unlink()
    options = {"data_dir": folder, "target": target, "effective_batch_size": 17, "beta": 0.4}
    options["lora_targets"] = "attention"  # with all layers, AdamW amplifies rounding
    whole = weights(trainer.run(make_config("whole", **options)))
    for size in (1, 2, 5):
        run = trainer.run(make_config(str(size), **options, train_batch_size=size))
        assert (weights(run) - whole).abs().max() <= 1e-5 * whole.abs().max()
        assert read_json(run / "training.json")["cost"]["micro_batch_size"] == size


@pytest.mark.parametrize("place_of_error", ["student", "teacher", "backward"])
def test_a_step_that_runs_out_of_memory_is_repeated_with_half_the_images(
    make_config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place_of_error: str
) -> None:
    """The LoRA is that of the smaller micro-batches from the start, bit for bit if the first step is repeated."""
    small = trainer.run(make_config("small", train_batch_size=2))
    teacher = place_of_error == "teacher"
    run_out(
        monkeypatch,
        lambda _, sample: len(sample) > (4 if teacher else 2) and torch.is_grad_enabled() != teacher,
        backward=place_of_error == "backward",
    )
    run = trainer.run(make_config("run"))
    assert (run / ADAPTER).read_bytes() == (small / ADAPTER).read_bytes()
    err = capsys.readouterr().err
    assert "Out of memory at step 1: repeating it with 4 images at once instead of 8." in err
    assert "Out of memory at step 1: repeating it with 2 images at once instead of 4." in err
    notes = [line for line in read_jsonl(run / "metrics.jsonl") if "micro_batch_size" in line]
    assert [(line["step"], line["micro_batch_size"]) for line in notes] == [(1, 4), (1, 2)]
    cost = read_json(run / "training.json")["cost"]
    assert (cost["effective_batch_size"], cost["micro_batch_size"], cost["gradient_checkpointing"]) == (8, 2, False)


@pytest.mark.parametrize("call", [3, 8, 13])
def test_a_later_micro_batch_may_run_out_of_memory(
    make_config: Config, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """The gradient of the micro-batches before it is dropped, so nothing counts twice."""
    calls: list[int] = []

    def raises(unet: Any, sample: Tensor) -> bool:
        calls.append(len(sample))
        return len(calls) == call

    small, whole = (weights(trainer.run(make_config(f"size-{n}", train_batch_size=n))) for n in (2, 4))
    run_out(monkeypatch, raises)
    run = trainer.run(make_config("run", train_batch_size=4))
    assert read_json(run / "training.json")["cost"]["micro_batch_size"] == 2
    assert (weights(run) - small).abs().max() <= 1e-5 * small.abs().max()
    assert (weights(run) - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_the_optimizer_may_run_out_of_memory(make_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    small, reserve, calls = trainer.run(make_config("small", train_batch_size=4)), GuardedSteps.reserve, []

    def fails_once(self: GuardedSteps) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ERROR
        reserve(self)

    monkeypatch.setattr(GuardedSteps, "reserve", fails_once)
    run = trainer.run(make_config("run"))
    assert len(calls) == 2
    assert (run / ADAPTER).read_bytes() == (small / ADAPTER).read_bytes()


@pytest.mark.parametrize("place_of_error", ["accelerate.Accelerator.clip_grad_norm_", "step"])
def test_memory_that_runs_out_while_weights_are_updated_is_explained(
    make_config: Config, monkeypatch: pytest.MonkeyPatch, place_of_error: str
) -> None:
    """The step cannot be repeated, since some weights may have changed."""

    def fail(*_: object) -> Tensor:
        if checkpoint.list_checkpoints(Path("run")):
            raise ERROR
        return torch.zeros(())

    kept = "step-000001 with --resume_from_checkpoint latest.*--overwrite.*--optimizer adamw8bit"
    if place_of_error == "step":
        monkeypatch.setattr(GuardedSteps, "step", fail)
    else:
        monkeypatch.setattr(place_of_error, fail)
    with pytest.raises(UnlearnError, match=rf"Out of memory while step 2 updated the weights: CUDA out.*{kept}"):
        trainer.run(make_config("run", checkpointing_steps=1))


def test_with_one_image_at_once_checkpointing_is_switched_on(
    make_config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = trainer.run(make_config("small", train_batch_size=1, gradient_checkpointing=True))
    run_out(monkeypatch, lambda unet, _: torch.is_grad_enabled() and not unet.is_gradient_checkpointing)
    run = trainer.run(make_config("run"))
    assert "repeating it with gradient checkpointing." in capsys.readouterr().err
    assert (run / ADAPTER).read_bytes() == (small / ADAPTER).read_bytes()
    cost = read_json(run / "training.json")["cost"]
    assert (cost["micro_batch_size"], cost["gradient_checkpointing"]) == (1, True)


def test_when_nothing_is_left_the_error_says_what_to_try(make_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run_out(monkeypatch, lambda *_: torch.is_grad_enabled())
    with pytest.raises(
        UnlearnError,
        match=r"with one image at once and gradient checkpointing: CUDA out.*repeat the command.*lower --resolution",
    ):
        trainer.run(make_config("run"))
    assert not Path("run/training.json").exists()


def test_other_errors_are_not_taken_for_a_lack_of_memory(make_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object) -> bool:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    run_out(monkeypatch, wrong)
    with pytest.raises(RuntimeError, match="mat1"):
        trainer.run(make_config("run"))


def test_a_resumed_run_cuts_its_steps_as_before(make_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, although on resuming there would be memory for more; an option wins."""
    options = {"checkpointing_steps": 2, "checkpoints_total_limit": 3}
    with monkeypatch.context() as patch:
        run_out(patch, lambda _, sample: len(sample) > 2 and torch.is_grad_enabled())
        whole = trainer.run(make_config("whole", **options))
    for name, size in (("run", None), ("larger", 8)):
        shutil.copytree(whole, name)
        Path(name, "training.json").unlink()
        resume = {"resume_from_checkpoint": f"{name}/checkpoints/step-000002", "train_batch_size": size}
        run = trainer.run(make_config(name, **options | resume))
        assert read_json(run / "training.json")["cost"]["micro_batch_size"] == (size or 2)
        assert (weights(run) - weights(whole)).abs().max() <= (1e-5 if size else 0)
