"""How far the student has moved from the frozen base, relative to the effect of captions: numbers without a unit, which
mean the same on every base, resolution and objective of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sd_unlearn.data.batch import NO_GROUP, Batch


class Movement:
    """Sums over the rows of a step, which add up over its micro-batches and processes.

    Let f be the student's prediction, f* the base's under the caption that the image was generated from, f0 and fe the
    base's under the generic and the empty caption.

    moved: sum <f - f*, f0 - f*> / sum |f0 - f*|^2 over positives that are not seen under the generic caption: 0 as long
        as the student predicts them as the base does, 1 if it predicts them as the base does under the generic caption.
        --push moves it beyond 1.
    spillover: sqrt(sum |f - f*|^2 / sum |f* - fe|^2) over keep images under their captions: 0 if their predictions have
        not changed, 1 if they have changed as much as by leaving out the caption. f* is shifted by `Teacher.offset`.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # [4]: the sums above, numerators and denominators in turn

    def reset(self) -> None:
        """Forget the last step."""
        self._sums = None

    @torch.no_grad()
    def add(self, change: Tensor, reference: Tensor, batch: Batch, generic: Tensor) -> None:
        """Add the rows of a micro-batch.

        Args:
            change: f - f*, [B, ...].
            reference: Shaped as change: f0 - f* of positives, f* - fe of keep images under a caption, 0 elsewhere.
            generic: The generic caption, shaped as a row of batch.text.
        """
        change, reference = change.detach().flatten(1).float(), reference.flatten(1).float()
        is_keep = batch.caption_group == NO_GROUP
        is_concept = batch.is_positive & ~is_keep & (batch.text != generic).flatten(1).any(1)
        along, size = (change * reference).sum(1), reference.square().sum(1)
        is_captioned_keep = is_keep & (size > 0)
        of_rows = ((is_concept, along), (is_concept, size), (is_captioned_keep, change.square().sum(1)))
        sums = torch.stack([torch.where(w, x, 0).sum() for w, x in (*of_rows, (is_captioned_keep, size))])
        self._sums = sums if self._sums is None else self._sums + sums

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """{moved, spillover} of the step; NaN without such rows. Waits for the device.

        reduce: adds up, or averages, over processes. All of them have to call this.
        """
        if self._sums is None:
            return {}
        along, size, changed, captions = reduce(self._sums).tolist()
        return {
            "moved": along / size if size else math.nan,
            "spillover": math.sqrt(changed / captions) if captions else math.nan,
        }
