"""The frozen base as a teacher: what it predicts, where its sampler would go, what a guided picture needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sd_unlearn import lora
from sd_unlearn.denoiser import Denoiser
from sd_unlearn.diffusion import ddim_step


@dataclass(frozen=True)
class Teacher:
    """The base behind a PEFT model, whose adapter is switched off while it speaks."""

    denoiser: Denoiser  # of the PEFT model itself, not of a wrapper for many processes
    generic: Tensor  # [tokens, width], the embedding of what shall be drawn instead of the concept
    empty: Tensor  # [tokens, width], the empty caption's: the unconditional prediction of guidance
    guidance_scale: float  # at which pictures are drawn, >= 1
    push: float = 1.0  # multiplies the gradient on positives

    @torch.no_grad()
    def predict(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """What the base predicts: shaped as noisy, float32. text: [B, tokens, width] or, for all alike, without B."""
        with self._base():
            return self.denoiser.predict(noisy, timesteps, self._each(text, noisy)).float()

    def carry(self, noisy: Tensor, start: Tensor, end: Tensor, text: Tensor) -> Tensor:
        """One DDIM step of the base's own guided sampler, from timesteps start [B] down to end [B]."""
        unconditional = self.predict(noisy, start, self.empty)
        guided = unconditional + self.guidance_scale * (self.predict(noisy, start, text) - unconditional)
        return ddim_step(noisy, guided, start, end, self.denoiser.alphas_cumprod, self.denoiser.prediction_type)  # type: ignore[arg-type]

    @torch.no_grad()
    def offset(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """How far a prediction must move so that guidance draws as before, although the unconditional one has moved.

        A picture follows u + s (f - u), u the unconditional prediction and s the guidance scale. Where the adapter has
        moved u by d, that stays what it was if f moves by (1 - 1/s) d. Left where it was, f would be pushed by
        -(s - 1) d, which is towards the concept, since d leads away from it.
        """
        moved = self.denoiser.predict(noisy, timesteps, self._each(self.empty, noisy)).float()
        return (1 - 1 / self.guidance_scale) * (moved - self.predict(noisy, timesteps, self.empty))

    @contextmanager
    def _base(self) -> Iterator[None]:
        with lora.teacher(self.denoiser.model):
            yield

    @staticmethod
    def _each(text: Tensor, noisy: Tensor) -> Tensor:
        return text if text.ndim == 3 else text.expand(len(noisy), -1, -1)
