"""Pure tensor maths of the forward process: noising, targets, per-example loss. No models, no state."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def _coefficients(alphas_cumprod: Tensor, timesteps: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    kept = alphas_cumprod.to(timesteps.device)[timesteps].float().view(-1, *[1] * (ndim - 1))
    return kept.sqrt(), (1 - kept).sqrt()


def add_noise(x0: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Ho et al. 2020, eq. 4).

    x0, noise: [B, ...]; timesteps: [B] in [0, T); alphas_cumprod: [T]. Returns [B, ...] in float32.
    """
    signal, sigma = _coefficients(alphas_cumprod, timesteps, x0.ndim)
    return signal * x0 + sigma * noise


def training_target(
    x0: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: Literal["epsilon", "v_prediction"],
) -> Tensor:
    """What the network should predict: eps, or v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans & Ho 2022, eq. 11).

    Raises:
        ValueError: another prediction type.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        signal, sigma = _coefficients(alphas_cumprod, timesteps, x0.ndim)
        return signal * noise - sigma * x0
    raise ValueError(f"prediction type {prediction_type!r} is not supported; epsilon and v_prediction are")


def per_example_loss(predicted: Tensor, target: Tensor, reduction: Literal["sum", "mean"] = "sum") -> Tensor:
    """Squared error of each example, l [B] in float32: their sum (the paper's likelihood) or mean."""
    squared = (predicted.float() - target.float()).square().flatten(1)
    return squared.sum(1) if reduction == "sum" else squared.mean(1)


def min_snr_weight(
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    gamma: float,
    prediction_type: Literal["epsilon", "v_prediction"],
) -> Tensor:
    """Weights [B] in [0, 1] that make a loss on x_0 weighted by min(SNR, gamma) of it (Hang et al. 2023, section 3.4).

    min(SNR, gamma) / SNR for epsilon and / (SNR + 1) for v, SNR = abar / (1 - abar), written without a division that
    a schedule could make 0 / 0: at SNR 0 they are 1 and 0, and without noise both go to 0. gamma > 0, usually 5.

    Raises:
        ValueError: another prediction type.
    """
    kept = alphas_cumprod.to(timesteps.device)[timesteps].float()
    if prediction_type == "epsilon":
        return (gamma * (1 - kept) / kept).clamp(max=1)
    if prediction_type == "v_prediction":
        return torch.minimum(kept, gamma * (1 - kept))
    raise ValueError(f"prediction type {prediction_type!r} is not supported; epsilon and v_prediction are")


def sample_timesteps(count: int, num_train_timesteps: int, generator: torch.Generator, bias: float = 0.0) -> Tensor:
    """Timesteps [count] in [0, T) with a density that grows as t^bias: 0 is uniform, 1 favours the noisy end.

    Stratified: one draw from each of `count` equally likely slices, shuffled, so each on its own still follows the
    density, and the batch mean varies less.
    """
    slices = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    return ((slices / count) ** (1 / (1 + bias)) * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)
