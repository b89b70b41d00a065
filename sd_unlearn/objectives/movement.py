"""How far the student has moved from the frozen base, relative to the effect of captions, and how hard to push it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sd_unlearn.data.batch import NO_GROUP, Batch

GAIN = 4.0  # of the controller: concepts then come about equally far, 80 to 90 % of --push
MAX_PULL = 1.2  # times --push: at the start, and while a concept resists
SPILLOVER = (0.25, 0.5)  # between them the pull falls to a tenth: not to zero, so that a base on which captions
# have little effect is trained, too
SMOOTHING = 0.9  # of a moving average over steps: one step has few positives
MIN_SMOOTHING = 0.5  # over the turns of one of several concepts, which come less often


class Movement:
    """Measures the movement of each step, in sums that add up over its micro-batches and processes, and derives from
    it how hard the next step is to push. The numbers have no unit and mean the same on every base and resolution.

    Let f be the student's prediction, f* the base's under the caption that the image was generated from, f0 and fe the
    base's under the generic and the empty caption.

    moved: sum <f - f*, f0 - f*> / sum |f0 - f*|^2 over positives that are not seen under the generic caption: 0 as long
        as the student predicts them as the base does, 1 if it predicts them as the base does under the generic caption.
        --push moves it beyond 1.
    spillover: sqrt(sum |f - f*|^2 / sum |f* - fe|^2) over keep images under their captions: 0 if their predictions have
        not changed, 1 if they have changed as much as by leaving out the caption. f* is shifted by `Teacher.offset`.

    Args:
        every: One of how many steps is seen. With several concepts, each has its own movement, which sees its turns.
    """

    def __init__(self, every: int = 1) -> None:
        self.smoothing = max(MIN_SMOOTHING, SMOOTHING**every)
        self._sums: Tensor | None = None  # [4], of this process: the sums above, numerators and denominators in turn
        self.smoothed: Tensor | None = None  # [2]: moved and squared spillover; NaN if no image tells

    def start_step(self) -> None:
        """Forget what was added since the last step."""
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

    def end_step(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Take what was added as the whole step. Does not wait for the device.

        reduce: adds up, or averages, over processes. All of them have to call this.
        """
        if self._sums is None:
            return
        sums = reduce(self._sums)
        over, below = sums[::2], sums[1::2]
        seen = over / below.clamp(min=torch.finfo(below.dtype).tiny)
        before = torch.full_like(seen, math.nan) if self.smoothed is None else self.smoothed
        after = torch.where(before.isnan(), seen, torch.lerp(seen, before, self.smoothing))
        self.smoothed = torch.where(below > 0, after, before)

    def pull(self, push: float) -> Tensor | float:
        """The weight of positives, in [0, MAX_PULL * push]: proportional to what is left of the way to 1 + push, and
        less if other images change much.

        A constant weight moves concepts by different amounts, in proportion to p_S / p_U (`losses.example_losses`):
        what suits most digits then damages the neighbours of an ink.
        """
        if self.smoothed is None:
            return min(GAIN * (1 + push), MAX_PULL * push)
        moved, squared = self.smoothed.nan_to_num(0)
        low, high = SPILLOVER
        bound = ((high - squared.sqrt()) / (high - low)).clamp(0.1, 1)
        return bound * (GAIN * (1 + push - moved)).clamp(0, MAX_PULL * push)

    def read(self) -> dict[str, float]:
        """{moved, spillover}, smoothed over the last steps; NaN without such images. Waits for the device."""
        if self.smoothed is None:
            return {}
        moved, squared = self.smoothed.tolist()
        return {"moved": moved, "spillover": math.sqrt(squared)}
