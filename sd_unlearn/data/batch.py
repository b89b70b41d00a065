"""The images of a training step, and how they are cut into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

NO_GROUP = -1  # the caption group of keep images


@dataclass(frozen=True)
class Batch:
    """Images of a training step: one process's share, or a micro-batch of it, the input of one forward pass."""

    latents: Tensor  # [B, C, H/8, W/8], scaled; of a DDPM the images, [B, C, H, W] in [-1, 1]
    text: Tensor  # [B, tokens, width], or what else Denoiser.predict takes
    teacher_text: Tensor  # as text: the caption each image was generated from, under which the frozen base predicts
    label: Tensor  # [B] long: the number of a positive's set, from 0; UNLABELED; NORMAL for images known to be normal
    caption_group: Tensor  # [B] long, index of the caption group; NO_GROUP for keep images
    num_groups: int
    timesteps: Tensor  # [B] long; of flow matching float32
    noise: Tensor  # as latents
    unconditional: Tensor  # [B] bool, seen under the empty caption
    weight: Tensor  # [B]: sum(weight * l) over a process, averaged over processes, is the step's mean of each kind
    limit: Tensor | None = None  # [B]: the cap on l of each row, where it needs images of other micro-batches
    captioned_keep: Tensor | None = None  # row numbers, see captioned_keep_rows; given to avoid a device sync
    positives: Tensor | None = None  # row numbers, see positive_rows
    bank_rows: Tensor | None = None  # [B] long: where the teacher's predictions are stored, if rows are seen again
    bank_size: int = 0  # rows that can be stored
    is_repeated: bool = False  # whether these are stored already
    visit: int = 0  # how many steps had these rows before
    turn: int = 0  # which of several concepts the step serves

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

    def only(self, rows: Tensor | slice) -> Batch:
        """The batch of these rows ([B] bool, or a slice). Their weights do not change."""
        kept = self._fields() | {"captioned_keep": None, "positives": None}
        return Batch(**kept | {name: value[rows] for name, value in kept.items() if isinstance(value, Tensor)})

    def cut(self, size: int) -> list[Batch]:
        """Micro-batches of at most `size` images. The rows of each kind, which stand together, are dealt out in turn,
        so that all micro-batches take about the same memory and time. `join` undoes the order."""
        count = -(-len(self.label) // size)
        return [self] if count == 1 else [self.only(slice(n, None, count)) for n in range(count)]

    def to(self, device: torch.device) -> Batch:
        """On a device, without waiting for it: from pinned memory, with row numbers that were found on the CPU."""
        found = self._fields() | {"captioned_keep": self.captioned_keep_rows(), "positives": self.positive_rows()}
        tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        if device.type == "cuda":
            tensors = {name: v if v.is_cuda else v.contiguous().pin_memory() for name, v in tensors.items()}
        return Batch(**found | {name: value.to(device, non_blocking=True) for name, value in tensors.items()})

    def _fields(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def join(values: Sequence[Tensor]) -> Tensor:
    """[B]: the values of micro-batches made by `Batch.cut`, in the order of its rows."""
    joined = values[0].new_empty(sum(map(len, values)))
    for n, of_part in enumerate(values):
        joined[n :: len(values)] = of_part
    return joined


def find_captioned_keep(caption_group: Tensor, unconditional: Tensor) -> Tensor:
    return torch.nonzero((caption_group == NO_GROUP) & ~unconditional)[:, 0]


def find_positives(label: Tensor, caption_group: Tensor) -> Tensor:
    return torch.nonzero((label >= 0) & (caption_group != NO_GROUP))[:, 0]
