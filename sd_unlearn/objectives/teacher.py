"""The frozen base as a teacher: its predictions, and the offset that preserves images generated with guidance."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.objectives.movement import Movement


class PredictionBank:
    """Predictions for rows that are seen again."""

    def __init__(self) -> None:
        self.stored: tuple[Tensor, ...] = ()

    def write(self, rows: Tensor, size: int, *predictions: Tensor) -> None:
        """rows: [B] long, below size, the number of rows that are kept; predictions: [B, ...] each."""
        shapes = [(size, *p.shape[1:]) for p in predictions]
        if [tuple(stored.shape) for stored in self.stored] != shapes:  # --force_resume may have changed them
            self.stored = tuple(p.new_zeros(shape) for p, shape in zip(predictions, shapes, strict=True))
        for stored, predicted in zip(self.stored, predictions, strict=True):
            stored[rows] = predicted

    def read(self, rows: Tensor) -> tuple[Tensor, ...]:
        """What was written, [B, ...] each."""
        return tuple(stored[rows] for stored in self.stored)


@dataclass(frozen=True)
class Teacher:
    """The base behind a student.

    generic: what to generate instead of the concept, [tokens, width] or token ids [tokens]. empty: the same for the
    empty caption, which gives the unconditional prediction of guidance.
    """

    denoiser: Denoiser  # of the student's own model, not of a DDP wrapper
    frozen: Callable[[], AbstractContextManager[nn.Module]]  # lends the base's network: Student.frozen
    generic: Tensor
    empty: Tensor
    guidance_scale: float  # at which images are generated, >= 1; 1 if the base uses no classifier-free guidance
    push: float = 1.0  # how far beyond the generic prediction positives should move, see Movement
    weight: float = 1.0  # of positives; 1 / beta makes their pull independent of beta
    batch_size: int | None = None  # rows of one prediction; None: all
    bank: PredictionBank | None = None  # the base's predictions for batches that are repeated
    offsets: PredictionBank | None = None  # the offsets of their rows, from the first of the steps that have them
    movement: Movement = field(default_factory=Movement)

    @torch.no_grad()
    def predict(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """The base's prediction: shaped as noisy, float32. text: [B, tokens, width]."""
        with self.frozen() as model:
            return self._predict(replace(self.denoiser, model=model), noisy, timesteps, text)

    @torch.no_grad()
    def predict_student(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """The student's own prediction, as `predict`."""
        return self._predict(self.denoiser, noisy, timesteps, text)

    @property
    def has_guidance(self) -> bool:
        """Whether sampling follows the unconditional prediction, too, so that retained ones need an `offset`."""
        return self.guidance_scale > 1

    @torch.no_grad()
    def offset(self, noisy: Tensor, timesteps: Tensor, unconditional: Tensor) -> Tensor:
        """How far a prediction must move so that guided sampling is unchanged although the unconditional one moved.

        Guidance follows u + s (f - u), where u is the unconditional prediction (`unconditional` is the base's) and s
        the guidance scale. If the adapter has moved u by d, this stays unchanged when f moves by (1 - 1/s) d.
        Otherwise guidance moves by -(s - 1) d: towards the concept, since d leads away from it. Without guidance, s =
        1, sampling follows f alone: the offset is zero, whatever u has become, and is not computed (`has_guidance`).
        """
        moved = self.predict_student(noisy, timesteps, self.empty.expand(len(noisy), *self.empty.shape))
        return (1 - 1 / self.guidance_scale) * (moved - unconditional)

    def _predict(self, denoiser: Denoiser, *rows: Tensor) -> Tensor:
        """denoiser.predict of `batch_size` rows at a time, float32."""
        if not len(rows[0]):
            return rows[0].float()
        parts = zip(*(tensor.split(self.batch_size or len(tensor)) for tensor in rows), strict=True)
        return torch.cat([denoiser.predict(*part).float() for part in parts])
