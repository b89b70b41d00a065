"""One `predict` over the network that is trained, whatever it is wrapped in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from sd_unlearn.base import Base


@dataclass(frozen=True)
class Denoiser:
    """A UNet with its noise schedule. `model` may be the bare UNet, a PEFT model or a DDP wrapper of it."""

    model: nn.Module
    alphas_cumprod: Tensor  # [T]
    prediction_type: str
    num_train_timesteps: int

    @classmethod
    def of(cls, base: Base, model: nn.Module) -> Denoiser:
        schedule = base.pipeline.scheduler
        return cls(
            model, schedule.alphas_cumprod.to(base.device), base.prediction_type, schedule.config.num_train_timesteps
        )

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """noisy [B, 4, H/8, W/8], timesteps [B], text [B, tokens, width] -> prediction, shaped as noisy.

        No attention mask goes to the text: the pipelines pass none, so neither may training.
        """
        return self.model(noisy, timesteps, encoder_hidden_states=text).sample
