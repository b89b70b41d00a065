"""The steps in which white-box attacks minimize the loss: in half precision, and with little memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_cases import CONCEPT, SMALL, make_target
from diffusers import UNet2DConditionModel
from out_of_memory import limit_memory
from torch import Tensor

from sd_unlearn.attacks import noise_prediction
from sd_unlearn.attacks.base import Samples, Target
from sd_unlearn.attacks.finetune import FINETUNE
from sd_unlearn.attacks.noise_prediction import MAX_SKIPPED, Descent, noise_gradients, sample_batch
from sd_unlearn.attacks.registry import ATTACKS
from sd_unlearn.config.objective import Weights
from sd_unlearn.data.encoding import encode_captions
from sd_unlearn.errors import OutOfMemory, UnlearnError
from sd_unlearn.models import lora
from sd_unlearn.models.base import Base, load_base
from sd_unlearn.models.learned_prompt import LearnedPrompt, learned_positions

pytestmark = pytest.mark.usefixtures("one_thread")


def learned_prompt(base: Base) -> LearnedPrompt:
    return LearnedPrompt(base, CONCEPT.caption, learned_positions(base, CONCEPT.caption))


def gradients_of_512_pixels(base: Path, dtype: torch.dtype) -> list[Tensor]:
    """Gradients by a learned prompt, and by a LoRA on the network, of 25 latents [4, 64, 64]."""
    loaded, generator = load_base(str(base), device="cpu"), torch.Generator().manual_seed(0)
    loaded.pipeline.to(dtype)
    mean = torch.randn(25, 4, 64, 64, generator=generator)
    samples = Samples([CONCEPT.caption] * 25, mean, torch.full_like(mean, 0.1))
    target, batch = make_target(loaded), sample_batch(samples, 25, generator)
    prompt = learned_prompt(loaded)
    of_prompt = noise_gradients(target, batch, lambda _: prompt.encode(), prompt.vectors)
    adapter = lora.attach(loaded.network, Weights(rank=2), lora.network_targets(loaded.network, "attention"), 0)
    weights = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    assert {weight.dtype for weight in weights} == {torch.float32}
    for weight in weights:
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    caption = encode_captions(loaded, [CONCEPT.caption])
    of_lora = noise_gradients(target, batch, lambda _: caption, weights)
    return [torch.cat([one.flatten() for one in found if one is not None]) for found in (of_prompt, of_lora)]


def test_gradients_in_fp16_are_those_of_full_precision(tiny_base: Path) -> None:
    """A mean over 409,600 elements has gradients below 6e-6 by each: fp16 rounds them to a few multiples of 6e-8."""
    whole = gradients_of_512_pixels(tiny_base, torch.float32)
    half = gradients_of_512_pixels(tiny_base, torch.float16)
    for ours, wanted in zip(half, whole, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - wanted).norm() < 0.01 * wanted.norm()


def infinite(target: Target, _batch: object, text: Tensor) -> Tensor:
    return text.sum() * torch.inf


def test_gradients_that_are_not_finite_are_skipped(loaded_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    target, generator = make_target(loaded_base), torch.Generator().manual_seed(0)
    prompt = learned_prompt(loaded_base)
    before = prompt.vectors[0].detach().clone()
    descent = Descent(target, prompt.optimizer(1.0))

    def steps(count: int) -> None:
        for _ in range(count):
            descent.step(sample_batch(target.positives, 2, generator), lambda _: prompt.encode())

    with monkeypatch.context() as patch:
        patch.setattr(noise_prediction, "noise_loss", infinite)
        steps(MAX_SKIPPED - 1)
        assert torch.equal(prompt.vectors[0], before)
    steps(1)
    assert not torch.equal(prompt.vectors[0], before)
    monkeypatch.setattr(noise_prediction, "noise_loss", infinite)
    with pytest.raises(UnlearnError, match="not finite for 20 steps in a row. Use --mixed_precision bf16"):
        steps(MAX_SKIPPED)


def test_fine_tuning_in_fp16_trains_in_full_precision(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, seen = load_base(str(tiny_base), device="cpu"), set[torch.dtype]()
    base.network.half()
    base.pipeline.text_encoder.half()
    original = Descent.step

    def step(self: Descent, *given: Any) -> None:
        original(self, *given)
        seen.update(value.dtype for p in self.parameters for value in (p, p.grad) if value is not None)

    monkeypatch.setattr(Descent, "step", step)
    monkeypatch.setattr(Target, "generate", lambda *_: [])
    list(FINETUNE.run(make_target(base), SMALL["finetune"], 0))
    assert seen == {torch.float32}
    assert base.network.dtype == torch.float16


LEARNING: dict[str, Any] = {  # one step on six images
    "token": replace(SMALL["token"], positives=6, batch_size=6),
    "soft": replace(SMALL["soft"], positives=6, batch_size=6),
    "hard": replace(SMALL["hard"], positives=6, batch_size=6),
    "prefix": replace(SMALL["prefix"], images=1, batch_size=6),
    "finetune": replace(SMALL["finetune"], steps=(1,), samples=6, batch_size=6),
}


@pytest.fixture
def target(tiny_base: Path) -> Target:
    """With six images of the concept."""
    made = make_target(load_base(str(tiny_base), device="cpu"))
    mean = torch.randn(6, *made.positives.mean.shape[1:], generator=torch.Generator().manual_seed(1))
    return replace(made, positives=Samples([CONCEPT.caption] * 6, mean, torch.full_like(mean, 0.1)))


def first_gradients(attack: str, target: Target, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The gradients of the only step of an attack."""
    seen, original = list[Tensor](), Descent.step

    def step(self: Descent, *given: Any) -> None:
        original(self, *given)
        seen.extend(parameter.grad.flatten() for parameter in self.parameters if parameter.grad is not None)

    with monkeypatch.context() as patch:
        patch.setattr(Descent, "step", step)
        patch.setattr(Target, "generate", lambda *_: [])
        list(ATTACKS[attack].run(target, LEARNING[attack], 0))
    return torch.cat(seen)


@pytest.mark.parametrize("attack", LEARNING)
def test_parts_of_a_batch_give_the_gradients_of_the_whole(
    attack: str, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = first_gradients(attack, target, monkeypatch)
    for most in (3, 1):
        with monkeypatch.context() as patch:
            rows = limit_memory(patch, UNet2DConditionModel, "forward", most)
            found = first_gradients(attack, target, monkeypatch)
            assert rows == [max(rows)] + [most] * (6 // most)  # 6 or, of the last time, 3 are tried first
        assert torch.allclose(found, whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))
    assert target.base.attacking.limit == 1


def test_one_image_that_does_not_fit_is_computed_with_checkpointing(
    target: Target, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = first_gradients("soft", target, monkeypatch)
    original, unet = UNet2DConditionModel.forward, target.base.network

    def limited(self: Any, rows: Tensor, *given: Any, **options: Any) -> Any:
        if len(rows) > 1 or not self.is_gradient_checkpointing:
            raise torch.OutOfMemoryError
        return original(self, rows, *given, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", limited)
    found = first_gradients("soft", target, monkeypatch)
    assert unet.is_gradient_checkpointing
    assert torch.allclose(found, whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))
    assert "continuing with gradient checkpointing" in capsys.readouterr().err


def test_one_image_that_never_fits(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(monkeypatch, UNet2DConditionModel, "forward", 0)
    with pytest.raises(OutOfMemory, match="while computing the gradients of an attack, even one at a time"):
        first_gradients("finetune", target, monkeypatch)
    assert not any(parameter.requires_grad for parameter in target.base.network.parameters())
