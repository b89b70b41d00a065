"""How many images are processed at once. It is chosen for the free memory and does not change the results, except for
rounding. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Batching:
    """Images (or rows of a prediction) at once in one process."""

    micro_batch_size: int  # of a training step; a step is cut into as many micro-batches as it takes
    gradient_checkpointing: bool  # recompute activations in the backward pass
    teacher_batch_size: int  # rows of one prediction of the frozen base; a micro-batch has up to twice its images
    encode_batch_size: int  # images that the VAE encodes
    render_batch_size: int  # images that the pipeline generates

    def smaller_step(self) -> Batching | None:
        """The next smaller way to take a training step: half as many images, then with checkpointing. None: none."""
        if self.micro_batch_size > 1:
            half, teacher = -(-self.micro_batch_size // 2), -(-self.teacher_batch_size // 2)
            return replace(self, micro_batch_size=half, teacher_batch_size=teacher)
        if not self.gradient_checkpointing:
            return replace(self, gradient_checkpointing=True)
        return replace(self, teacher_batch_size=1) if self.teacher_batch_size > 1 else None
