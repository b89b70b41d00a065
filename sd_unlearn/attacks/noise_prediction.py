"""The loss of noise prediction on the attacker's images, which most white-box attacks minimize."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sd_unlearn.attacks.base import Samples, Target
from sd_unlearn.models.diffusion import sample_positions


@dataclass(frozen=True)
class NoisedBatch:
    """Latents of some of the attacker's images, with noise and timesteps to train on."""

    rows: Tensor  # [B] indices of the images
    latents: Tensor  # [B, C, H/8, W/8]
    noise: Tensor  # as latents
    position: Tensor  # [B] in [0, 1): the timestep as a share of the schedule (of its density, for flow matching)


def sample_batch(samples: Samples, size: int, generator: torch.Generator) -> NoisedBatch:
    """`size` of the images, or all if there are fewer, in random order. The random numbers are drawn on the CPU.

    Each image gets a timestep from another of len(rows) equal parts of the schedule: uniform, with less variance of the
    batch's loss than independent timesteps.
    """
    rows = torch.randperm(len(samples.mean), generator=generator)[:size]
    latents = samples.latents(rows, generator)
    noise = torch.randn(latents.shape, generator=generator)
    return NoisedBatch(rows, latents, noise, sample_positions(len(rows), generator))


def noise_loss(target: Target, batch: NoisedBatch, text: Tensor) -> Tensor:
    """Mean squared error of the prediction (Ho et al. 2020, equation 14) with text [1 or B, tokens, width]."""
    base, denoiser, device = target.base, target.denoiser, target.base.device
    timesteps = denoiser.process.at(batch.position).to(device)
    given = batch.latents.to(device), batch.noise.to(device), timesteps
    noisy, wanted = denoiser.process.add_noise(*given), denoiser.process.target(*given)
    dtype = base.network.dtype
    predicted = denoiser.predict(noisy.to(dtype), timesteps, text.expand(len(noisy), -1, -1).to(device, dtype))
    return (predicted.float() - wanted).square().mean()
