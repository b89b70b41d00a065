"""Predicted memory against what torch really keeps, on tiny models of the real architectures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import Kinds
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sd_unlearn.config.train import TrainConfig
from sd_unlearn.errors import UnlearnError
from sd_unlearn.models import performance
from sd_unlearn.models.base import load_base
from sd_unlearn.models.footprint import StepOptions, count_training, inputs, meta_denoiser
from sd_unlearn.models.meta import build_meta_base, read_configs
from sd_unlearn.models.source import Source
from sd_unlearn.models.student import make_student


def really_saved(place: Path, options: TrainConfig, side: int, images: int) -> int:
    """Bytes that autograd keeps of a real forward pass on the CPU, without weights."""
    base = load_base(str(place), device="cpu")
    performance.prepare(base.pipeline.unet, options)
    student = make_student(base, options, seed=0, needs_teacher=False)
    weights = {p.untyped_storage()._cdata for p in (*student.model.parameters(), *student.model.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    meta = build_meta_base(read_configs(Source(str(place))), torch.float32)
    given = [torch.zeros(images, *t.shape[1:], dtype=t.dtype) for t in inputs(meta, side, torch.float32)]
    with saved_tensors_hooks(save, lambda tensor: tensor):
        replace(meta_denoiser(meta, student.model)).predict(*given)  # type: ignore[arg-type]
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("targets", ["attention", "all_linear+conv"])
def test_activations_are_those_of_a_real_pass(kinds: Kinds, kind: str, targets: Any) -> None:
    options, place = TrainConfig(lora_targets=targets, rank=2), kinds.folder(kind)
    found = count_training(read_configs(Source(str(place))), StepOptions.of(options), "no", 64)
    for images in (2, 5):
        assert really_saved(place, options, 8, images) == pytest.approx(images * found.saved, rel=0.01)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_half_precision_checkpointing_and_fewer_pixels_take_less(kinds: Kinds, kind: str) -> None:
    configs = read_configs(Source(str(kinds.folder(kind))))
    full, half, small = (count_training(configs, StepOptions(), *args) for args in SETTINGS)
    assert full.saved > half.saved > small.saved
    for found in (full, half, small):
        assert found.forward < found.checkpointed < found.activations
    eager = count_training(configs, StepOptions(attention="eager"), "no", 64)
    assert eager.saved > full.saved  # it keeps the scores


SETTINGS: tuple[tuple[Any, int], ...] = (("no", 64), ("fp16", 64), ("fp16", 32))


def test_what_is_trained_is_counted_from_the_options(kinds: Kinds) -> None:
    configs = read_configs(Source(str(kinds.folder("sd1"))))
    unet = build_meta_base(configs, torch.float32).network
    size = sum(p.numel() * 4 for p in unet.parameters())
    lora = count_training(configs, StepOptions(rank=2), "fp16", 64)
    assert lora.optimizer == 2 * lora.gradients == 2 * lora.trained > 0
    assert count_training(configs, StepOptions(rank=4), "fp16", 64).trained == 2 * lora.trained
    full = count_training(configs, StepOptions(method="full", ema_decay=0.99), "fp16", 64)
    assert (full.trained, full.gradients, full.optimizer) == (0, size, 2 * size)
    assert full.average == full.teacher_copy == size
    assert full.casts > size / 3  # nearly all weights, in half precision
    text = count_training(configs, StepOptions(train_text_encoder=True), "fp16", 64)
    assert text.text_encoder > 0 == lora.text_encoder
    assert text.saved > lora.saved


def test_a_known_hub_id_needs_no_network_and_an_unknown_one_says_what_to_do() -> None:
    """The tests run with HF_HUB_OFFLINE."""
    at_512, at_768 = (
        build_meta_base(read_configs(Source(f"stabilityai/stable-diffusion-2-1{end}")), torch.float16).resolution
        for end in ("-base", "")
    )
    assert (at_512, at_768) == (512, 768)
    with pytest.raises(
        UnlearnError, match="someone/model: there is no such local folder or file, and it was not found on"
    ):
        read_configs(Source("someone/model"))
