"""The input of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

NO_GROUP = -1  # the caption group of keep images


@dataclass(frozen=True)
class Batch:
    """The input of one forward pass: a part of a step's whole batch. Examples with the same slot share timestep and
    noise."""

    latents: Tensor  # [B, 4, H/8, W/8], scaled; of a DDPM the images, [B, C, H, W] in [-1, 1]
    text: Tensor  # [B, tokens, width], or what else Denoiser.predict takes
    teacher_text: Tensor  # as text: the caption each image was generated from, under which the frozen base predicts
    label: Tensor  # [B] long: the number of a positive's set, from 0; UNLABELED; NORMAL for images known to be normal
    caption_group: Tensor  # [B] long, index of the caption group; NO_GROUP for keep images
    num_groups: int
    timesteps: Tensor  # [B] long
    noise: Tensor  # as latents
    unconditional: Tensor  # [B] bool, seen under the empty caption
    weight: Tensor  # [B]: averaged over parts, sum(weight * l) is the whole batch's mean, for each kind of image
    captioned_keep: Tensor | None = None  # row numbers, see captioned_keep_rows; given to avoid a device sync
    positives: Tensor | None = None  # row numbers, see positive_rows

    def captioned_keep_rows(self) -> Tensor:
        """[K] long: keep images under a caption. Only these have a guidance direction to preserve."""
        if self.captioned_keep is None:
            return find_captioned_keep(self.caption_group, self.unconditional)
        return self.captioned_keep

    def positive_rows(self) -> Tensor:
        """[P] long: positives in caption groups."""
        return find_positives(self.label, self.caption_group) if self.positives is None else self.positives

    @property
    def is_positive(self) -> Tensor:
        """[B] bool."""
        return self.label >= 0

    def only(self, rows: Tensor) -> Batch:
        """The batch of these rows ([B] bool). Their weights do not change."""
        kept: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        kept |= {"captioned_keep": None, "positives": None}
        kept |= {name: value[rows] for name, value in kept.items() if isinstance(value, Tensor)}
        return Batch(**kept)


def find_captioned_keep(caption_group: Tensor, unconditional: Tensor) -> Tensor:
    return torch.nonzero((caption_group == NO_GROUP) & ~unconditional)[:, 0]


def find_positives(label: Tensor, caption_group: Tensor) -> Tensor:
    return torch.nonzero((label >= 0) & (caption_group != NO_GROUP))[:, 0]
