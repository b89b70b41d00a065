"""How a VAE's latents z are scaled to those that a network is trained on: (z - shift) * factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LatentScale:
    """Shift and factor: numbers, or tensors [C, h, w] where they differ between elements."""

    shift: Any = 0.0
    factor: Any = 1.0

    @classmethod
    def of(cls, vae: Any, latents: Tensor) -> LatentScale:
        """Of latents [..., C, h, w] of a VAE, on their device and in their data type.

        FLUX.2 normalizes each element of a patch of 2 x 2 latents by the statistics of a batch normalization,
        Qwen-Image each channel by those in its configuration.
        """
        config = vae.config
        if config.get("latents_mean"):
            mean, deviation = (
                latents.new_tensor(config[key]).view(-1, 1, 1) for key in ("latents_mean", "latents_std")
            )
            return cls(mean, 1 / deviation)
        if not hasattr(vae, "bn"):
            return cls(float(config.get("shift_factor") or 0.0), config.scaling_factor)
        height, width = latents.shape[-2:]
        deviation = (vae.bn.running_var + config.batch_norm_eps).sqrt()
        shift, factor = (
            values.to(latents).view(-1, 2, 2).repeat(1, height // 2, width // 2)
            for values in (vae.bn.running_mean, 1 / deviation)
        )
        return cls(shift, factor)

    def apply(self, latents: Tensor) -> Tensor:
        """From the VAE to the network."""
        return (latents - self.shift) * self.factor

    def undo(self, latents: Tensor) -> Tensor:
        """From the network to the VAE."""
        return latents / self.factor + self.shift


def described_scale(vae: Any) -> str:
    """What latents in a cache depend on besides the VAE's weights."""
    shift = float(vae.config.get("shift_factor") or 0.0)
    return f"{vae.config.get('scaling_factor')}" + (f" {shift}" if shift else "")
