"""One `predict` for every kind of network, whatever it is wrapped in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from sd_unlearn.models.base import Base
from sd_unlearn.models.conditioning import Conditioning, TextConditioning
from sd_unlearn.models.diffusion import Process


@dataclass(frozen=True)
class Denoiser:
    """A network with its forward process. `model` may be the bare network, a PEFT model or a DDP wrapper of it."""

    model: nn.Module
    process: Process
    conditioning: Conditioning = TextConditioning()

    @classmethod
    def of(cls, base: Base, model: nn.Module) -> Denoiser:
        """The denoiser of a base with its network replaced by `model`, the student."""
        return cls(model, base.process(), base.conditioning)

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        r"""noisy [B, C, h, w], timesteps [B], text [B, ...] -> prediction, shaped as noisy.

        For latent models h, w are an eighth of the image's size and C is the number of latent channels (4; 16 for SD 3
        and FLUX); for pixel models they are the image's own.
        text: captions as `TextConditioning.encode` returns them; class numbers [B, 1]; ignored without conditioning.
        """
        return self.conditioning.predict(self.model, noisy, timesteps, text)
