"""One `predict` for every kind of UNet, whatever it is wrapped in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from sd_unlearn.models.base import Base
from sd_unlearn.models.conditioning import time_ids, unpack


@dataclass(frozen=True)
class Denoiser:
    """A UNet with its noise schedule. `model` may be the bare UNet, a PEFT model or a DDP wrapper of it.

    conditioning: `text` takes caption embeddings (UNet2DConditionModel); `class` takes class numbers and `none` nothing
    (UNet2DModel, the DDPMs of the paper, which work on pixels).
    """

    model: nn.Module
    alphas_cumprod: Tensor  # [T]
    prediction_type: str
    num_train_timesteps: int
    pooled_width: int | None = None  # of SDXL's pooled embedding; None for other UNets
    pixels_per_latent: int = 8
    conditioning: Literal["text", "class", "none"] = "text"

    @classmethod
    def of(cls, base: Base, model: nn.Module) -> Denoiser:
        """The denoiser of a base with its UNet replaced by `model`, the student."""
        schedule = base.pipeline.scheduler
        return cls(
            model,
            schedule.alphas_cumprod.to(base.device),
            base.prediction_type,
            schedule.config.num_train_timesteps,
            base.pooled_width,
            base.pipeline.vae_scale_factor,
        )

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        r"""noisy [B, C, h, w], timesteps [B], text [B, ...] -> prediction, shaped as noisy.

        For latent models C is 4 and h, w are an eighth of the image's size; for pixel models they are the image's own.
        text: [B, tokens, width], for SDXL with the pooled embedding as one more row (conditioning.py); class numbers
        [B, 1]; ignored without conditioning.

        No attention mask is passed: the pipelines pass none, so training must not either.
        """
        if self.conditioning == "none":
            return self.model(noisy, timesteps).sample
        if self.conditioning == "class":
            return self.model(noisy, timesteps, class_labels=text[:, 0].long()).sample
        if self.pooled_width is None:
            return self.model(noisy, timesteps, encoder_hidden_states=text).sample
        tokens, pooled = unpack(text, self.pooled_width)
        added = {"text_embeds": pooled, "time_ids": time_ids(noisy, self.pixels_per_latent)}
        return self.model(noisy, timesteps, encoder_hidden_states=tokens, added_cond_kwargs=added).sample
