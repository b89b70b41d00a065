"""The per-example losses of a training step, against the noise or, with less variance, against the frozen base."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sd_unlearn import lora
from sd_unlearn.batches import PLAIN, Batch
from sd_unlearn.denoiser import Denoiser
from sd_unlearn.diffusion import add_noise, per_example_loss, training_target


def example_losses(
    denoiser: Denoiser, batch: Batch, reduction: Literal["sum", "mean"] = "sum", teacher: Denoiser | None = None,
    temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """l [B] of a batch's examples over the temperature, with the gradient to follow.

    Without a teacher: the noise-prediction loss. With one (a PEFT model's Denoiser; its adapter is switched off for
    it) the value stays that loss, which decides the sign of a bracket, but the gradient is that of |f - f*|^2, with
    f* the base's prediction under the caption the image was drawn from. Where the base is optimal for its own images,
    f* = E[eps | x_t], so |f - eps|^2 and |f - f*|^2 differ in expectation by a constant: the gradient has the same
    mean without the noise's variance. Keep images have |f - f*|^2 for a value, too: zero is what one wants there.
    """
    schedule = denoiser.alphas_cumprod
    noisy = add_noise(batch.latents, batch.noise, batch.timesteps, schedule)
    target = training_target(batch.latents, batch.noise, batch.timesteps, schedule, denoiser.prediction_type)  # type: ignore[arg-type]
    # First, because switching the adapter off and on between a forward and its backward pass upsets DDP.
    taught = None if teacher is None else base_prediction(teacher, noisy, batch)
    predicted = denoiser.predict(noisy, batch.timesteps, batch.text)
    against_noise = per_example_loss(predicted, target, reduction) / temperature
    if taught is None:
        return against_noise
    distance = per_example_loss(predicted, taught, reduction) / temperature
    value = torch.where(batch.bracket == PLAIN, distance, against_noise).detach()
    return value + distance - distance.detach()


@torch.no_grad()
def base_prediction(teacher: Denoiser, noisy: Tensor, batch: Batch) -> Tensor:
    """What the network predicts with its adapter off, under the captions the images were drawn from: as noisy."""
    with lora.teacher(teacher.model):
        return teacher.predict(noisy, batch.timesteps, batch.teacher_text).float()
