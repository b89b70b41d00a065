"""The forward process of DDPM's diffusion as pure functions of tensors: noising, targets, per-example loss.

`Diffusion` binds them to a model's schedule. flow.py has its counterpart for flow matching.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor


class Process(Protocol):
    """How images become noise in a model's training, and what the network predicts of it."""

    @property
    def num_train_timesteps(self) -> int: ...

    @property
    def device(self) -> torch.device:
        """Where the model computes."""

    def at(self, positions: Tensor) -> Tensor:
        """Timesteps [B] for positions [B] in [0, 1], their shares of the density that training samples from."""

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t, shaped as x0 [B, ...]."""

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network learns to predict from x_t in ordinary training, shaped as x0."""

    def snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Min-SNR loss weights [B]."""


@dataclass(frozen=True)
class Diffusion:
    """DDPM's forward process with a model's schedule."""

    alphas_cumprod: Tensor  # [T]
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def device(self) -> torch.device:
        return self.alphas_cumprod.device

    def at(self, positions: Tensor) -> Tensor:
        """Timesteps [B] long in [0, T)."""
        return (positions * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return add_noise(x0, noise, timesteps, self.alphas_cumprod)

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return training_target(x0, noise, timesteps, self.alphas_cumprod, self.prediction_type)

    def snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        return min_snr_weight(timesteps, self.alphas_cumprod, gamma, self.prediction_type)


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
    """The training target: eps, or v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans & Ho 2022, eq. 11).

    Raises:
        ValueError: the prediction type is not supported.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        signal, sigma = _coefficients(alphas_cumprod, timesteps, x0.ndim)
        return signal * noise - sigma * x0
    raise ValueError(f"prediction type {prediction_type!r} is not supported; epsilon and v_prediction are")


def per_example_loss(predicted: Tensor, target: Tensor, reduction: Literal["sum", "mean"] = "sum") -> Tensor:
    """Squared error per example, l [B] in float32: the sum over elements (the paper's likelihood) or the mean."""
    squared = (predicted.float() - target.float()).square().flatten(1)
    return squared.sum(1) if reduction == "sum" else squared.mean(1)


def min_snr_weight(
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    gamma: float,
    prediction_type: Literal["epsilon", "v_prediction"],
) -> Tensor:
    """Min-SNR loss weights [B] in [0, 1] (Hang et al. 2023, section 3.4).

    min(SNR, gamma) / SNR for epsilon and min(SNR, gamma) / (SNR + 1) for v, with SNR = abar / (1 - abar), written so
    that no schedule gives 0 / 0: at SNR 0 they are 1 and 0, and without noise both approach 0. gamma > 0, usually 5.

    Raises:
        ValueError: the prediction type is not supported.
    """
    kept = alphas_cumprod.to(timesteps.device)[timesteps].float()
    if prediction_type == "epsilon":
        return (gamma * (1 - kept) / kept).clamp(max=1)
    if prediction_type == "v_prediction":
        return torch.minimum(kept, gamma * (1 - kept))
    raise ValueError(f"prediction type {prediction_type!r} is not supported; epsilon and v_prediction are")


def sample_positions(count: int, generator: torch.Generator, bias: float = 0.0) -> Tensor:
    """Positions [count] in [0, 1] with density proportional to u^bias: 0 is uniform, 1 favours high-noise timesteps.

    Stratified: one sample from each of `count` equally likely intervals, shuffled. Each sample still follows the
    density, and the batch mean varies less. `Process.at` turns them into timesteps.
    """
    slices = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    return (slices / count) ** (1 / (1 + bias))
