r"""Flow matching (Lipman et al. 2023; Esser et al. 2024, "Scaling Rectified Flow Transformers", arXiv 2403.03206).

x_s = (1 - s) x_0 + s n with noise n, s in [0, 1], and the network predicts the velocity v = n - x_0. Timesteps are
those of Diffusers' schedulers, t = 1000 s, as floating-point numbers.

The squared error of v, l = |v - v_pred|^2, is that of x_0 and of n up to weights, because x_0 = x_s - s v and
n = x_s + (1 - s) v: |x_0 - x_0_pred|^2 = s^2 l and |n - n_pred|^2 = (1 - s)^2 l.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sd_unlearn.config.objective import TimestepSampling


@dataclass(frozen=True)
class Flow:
    """The forward process of a flow-matching model. The counterpart of `diffusion.Diffusion`."""

    shift: float = 1.0  # > 0; above 1, high-noise timesteps are more frequent
    sampling: TimestepSampling = "shift"
    num_train_timesteps: int = 1000
    device: torch.device = torch.device("cpu")

    def at(self, positions: Tensor) -> Tensor:
        """Timesteps [B] in [0, T] for positions [B] in [0, 1]: quantiles of the density that training samples from.

        uniform: s = u. shift: s = a u / (1 + (a - 1) u), as the model's scheduler spaces its sampling steps.
        logit_normal: s = sigmoid(z) with z standard normal (Esser et al. 2024, section 3.1).
        """
        if self.sampling == "logit_normal":
            s = torch.special.ndtri(positions).sigmoid()
        else:
            shift = self.shift if self.sampling == "shift" else 1.0
            s = shift * positions / (1 + (shift - 1) * positions)
        return s * self.num_train_timesteps

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_s = (1 - s) x_0 + s n; x0, noise: [B, ...]; timesteps: [B]. Returns [B, ...]."""
        s = self._share(timesteps).view(-1, *[1] * (x0.ndim - 1))
        return (1 - s) * x0 + s * noise

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity n - x_0."""
        return noise - x0

    def snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Min-SNR loss weights [B] in [0, 1]: min(SNR, gamma) s^2 with SNR = ((1 - s) / s)^2 (Hang et al. 2023).

        min(SNR, gamma) is the weight of the error of x_0, which is s^2 times that of v. Written without a division.
        """
        s = self._share(timesteps)
        return torch.minimum((1 - s).square(), gamma * s.square())

    def _share(self, timesteps: Tensor) -> Tensor:
        return timesteps.float() / self.num_train_timesteps


def shift_of(scheduler: Mapping[str, Any], image_tokens: int) -> float:
    """The shift of a FlowMatchEulerDiscreteScheduler for images of this many patches.

    SD 3 has a fixed one. FLUX.1 dev's grows with the image (`use_dynamic_shifting`): e^mu, where mu is linear in the
    number of patches, as its pipeline computes it.
    """
    if not scheduler.get("use_dynamic_shifting"):
        return float(scheduler.get("shift", 1.0))
    few, many = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    mu = low + (high - low) * (image_tokens - few) / (many - few)
    return float(math.exp(mu) if scheduler.get("time_shift_type", "exponential") == "exponential" else mu)
