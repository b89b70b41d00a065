"""The choice of batches for a memory, on a footprint with round numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sd_unlearn.models.fit import (
    CONTEXT,
    GIB,
    WORKSPACE,
    Device,
    Inference,
    Training,
    balanced,
    divisors,
    free_in_container,
    other_device,
    this_device,
)
from sd_unlearn.models.footprint import InferenceFootprint, TrainingFootprint

FROZEN = InferenceFootprint(
    network=2 * GIB,
    vae=GIB // 4,
    text_encoders=GIB // 4,
    upcast=0,
    sample=GIB // 8,
    decode=GIB // 2,
    encode=GIB // 2,
    caption=0,
    largest_weight=0,
    resolution=512,
)
TRAINED = TrainingFootprint(
    network=FROZEN.network,
    trained=0,
    gradients=0,
    optimizer=0,
    average=0,
    teacher_copy=0,
    casts=0,
    saved=GIB,
    activations=GIB,
    checkpointed=GIB // 4,
    forward=GIB // 8,
)


def gpu(usable: float) -> Device:
    """A GPU with this much memory (in GB) left for a training step of this base, after UNet and workspace."""
    return Device("cuda", "a GPU", round((usable * GIB + FROZEN.network + WORKSPACE["cuda"]) / 0.9) + 2)


def test_stored_predictions_are_counted_in_every_phase_of_training() -> None:
    trained = replace(TRAINED, trained=1)
    stored = replace(trained, predictions=1000)
    plain, repeated = Training(FROZEN, gpu(10), trained), Training(FROZEN, gpu(10), stored, repeated=40)
    batching = plain.choose(40, 10, 1)
    for before, after in zip(*(t.phases(batching, 1, True, True, True) for t in (plain, repeated)), strict=True):
        assert after.total - before.total == (0 if after.name in ("render", "encode") else 40_000)


def test_sizes() -> None:
    assert balanced(40) == [40, 20, 14, 10, 8, 7, 6, 5, 4, 3, 2, 1]
    assert divisors(100) == [100, 50, 25, 20, 10, 5, 4, 2, 1]


@pytest.mark.parametrize(
    ("usable", "chosen"),
    [
        (40, (40, False)),
        (39.9, (20, False)),
        (10, (10, False)),
        (9.9, (8, False)),
        (1, (1, False)),
        (0.9, (3, True)),
        (0.25, (1, True)),
    ],
)
def test_the_largest_micro_batch_that_fits(usable: float, chosen: tuple[int, bool]) -> None:
    training = Training(FROZEN, gpu(usable), TRAINED)
    size, checkpointing = next(training.step_sizes(balanced(40), None))
    assert (size, checkpointing) == chosen
    assert training.step(size, checkpointing).total <= training.device.usable
    assert training.teacher(training.teacher_batch_size(size)).total <= training.device.usable


def test_options_limit_the_choice() -> None:
    training = Training(FROZEN, gpu(8), TRAINED)
    assert next(training.step_sizes(balanced(40), True)) == (20, True)
    assert next(training.step_sizes([6], None)) == (6, False)
    assert not list(Training(FROZEN, gpu(0.9), TRAINED).step_sizes(balanced(40), False))
    assert not list(Training(FROZEN, gpu(0.2), TRAINED).step_sizes(balanced(40), None))


def test_rendering_is_cut_and_then_tiled() -> None:
    def chosen(free: float) -> tuple[int, bool]:
        return Inference(FROZEN, Device("cuda", "a GPU", round(free * GIB / 0.9) + 2)).render_batch_size(4)

    weights = 2.75  # with the workspace of 256 MB
    assert chosen(weights + 2) == (4, False)
    assert chosen(weights + 1.9) == (2, False)
    assert chosen(weights + 0.5) == (1, False)
    assert chosen(weights + 0.4) == (1, True)


def test_previews_are_cut_for_the_memory_that_a_training_leaves() -> None:
    training = Training(FROZEN, gpu(2), replace(TRAINED, optimizer=GIB))
    batching = training.choose(40, 4, 1)
    assert (batching.render_batch_size, batching.preview_batch_size) == (2, 1)
    preview = training.phases(batching, 1, rendering=True, teacher=True, previews=True)[-1]
    assert (preview.name, preview.at_once) == ("preview", 1)
    assert preview.total <= training.device.usable < training.render(2, training=training.trained.constant).total


def test_memory_grows_with_the_number_of_images() -> None:
    training = Training(FROZEN, gpu(1), TRAINED)
    for phase in (training.render, lambda n: training.encode(n, 1), training.teacher, lambda n: training.step(n, True)):
        totals = [phase(n).total for n in (1, 2, 3)]  # type: ignore[operator]
        assert totals[0] < totals[1] < totals[2]
        assert totals[1] - totals[0] == totals[2] - totals[1]


def test_another_card() -> None:
    assert other_device(8 * GIB).free == 8 * GIB - CONTEXT
    assert other_device(8 * GIB).name == "a GPU with 8 GB"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 5\ninactive_file 200"}, 500),
        ({"memory.max": "1000", "memory.current": "1700", "memory.stat": "inactive_file 200"}, 0),
        ({"memory.max": "max", "memory.current": "700", "memory.stat": "inactive_file 200"}, None),
        (
            {
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "700",
                "memory/memory.stat": "total_inactive_file 100",
            },
            400,
        ),
        ({}, None),
    ],
)
def test_the_limit_of_a_container(tmp_path: Path, files: dict[str, str], free: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert free_in_container(tmp_path) == free


def test_several_processes_plan_for_whole_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free differs between the GPUs; with different batches, some images would belong to no process."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    for free in (4 * GIB, 7 * GIB):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 8 * GIB))
        assert this_device().free == free
        assert this_device(2).free == other_device(8 * GIB).free


def test_what_an_earlier_stage_has_left_on_the_gpu_is_given_back_first(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [1 * GIB]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free[0], 8 * GIB))
    monkeypatch.setattr("sd_unlearn.models.fit.free_memory", lambda: free.__setitem__(0, 7 * GIB))
    assert this_device().free == 7 * GIB


def test_a_cpu_has_no_more_memory_than_its_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sd_unlearn.models.fit.free_in_container", lambda: 1000)
    assert this_device(2).free == 500
    monkeypatch.setattr("sd_unlearn.models.fit.free_in_container", lambda: None)
    assert this_device().free > 1000
