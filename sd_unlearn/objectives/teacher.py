"""The frozen base as a teacher: what it predicts, and what keeps a guided picture as it was."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sd_unlearn.models.denoiser import Denoiser


@dataclass(frozen=True)
class Teacher:
    """The base behind a student."""

    denoiser: Denoiser  # of the student's model itself, not of a wrapper for many processes
    frozen: Callable[[], AbstractContextManager[nn.Module]]  # the base's network: Student.frozen
    generic: (
        Tensor  # [tokens, width] or token ids [tokens], the embedding of what shall be drawn instead of the concept
    )
    empty: Tensor  # as generic, the empty caption's: the unconditional prediction of guidance
    guidance_scale: float  # at which pictures are drawn, >= 1
    push: float = 1.0  # multiplies the gradient on positives

    @torch.no_grad()
    def predict(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """What the base predicts: shaped as noisy, float32. text: [B, tokens, width]."""
        with self.frozen() as model:
            return replace(self.denoiser, model=model).predict(noisy, timesteps, text).float()

    @torch.no_grad()
    def offset(self, noisy: Tensor, timesteps: Tensor, unconditional: Tensor) -> Tensor:
        """How far a prediction must move so that guidance draws as before, although the unconditional one has moved.

        A picture follows u + s (f - u), u the unconditional prediction (the base's is given) and s the guidance scale.
        Where the adapter has moved u by d, that stays what it was if f moves by (1 - 1/s) d. Left where it was, f
        would be pushed by -(s - 1) d, which is towards the concept, since d leads away from it.
        """
        moved = self.denoiser.predict(noisy, timesteps, self.empty.expand(len(noisy), *self.empty.shape)).float()
        return (1 - 1 / self.guidance_scale) * (moved - unconditional)
