"""How a training step is cut into micro-batches, and how many images are processed at once elsewhere.

None of it changes the results, except for rounding, so it is chosen for the free memory. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sd_unlearn.config.train import TrainConfig
from sd_unlearn.errors import UsageError

EFFECTIVE_BATCH_SIZE = 40
CUT = ("train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")  # options of the cut alone


@dataclass(frozen=True, kw_only=True)
class Batching:
    """Images (or rows of a prediction) at once in one process."""

    micro_batch_size: int  # of a training step; a step is cut into as many micro-batches as it takes
    gradient_checkpointing: bool  # recompute activations in the backward pass
    teacher_batch_size: int  # rows of one prediction of the frozen base; a micro-batch has up to twice its images
    encode_batch_size: int = 4  # images that the VAE encodes
    render_batch_size: int = 4  # images that the pipeline generates
    preview_batch_size: int = 4  # the same while a network is trained

    def smaller_step(self) -> Batching | None:
        """The next smaller way to take a training step: half as many images, then with checkpointing. None: none."""
        if self.micro_batch_size > 1:
            half, teacher = -(-self.micro_batch_size // 2), -(-self.teacher_batch_size // 2)
            return replace(self, micro_batch_size=half, teacher_batch_size=teacher)
        if not self.gradient_checkpointing:
            return replace(self, gradient_checkpointing=True)
        return replace(self, teacher_batch_size=1) if self.teacher_batch_size > 1 else None


def effective_batch_size(config: TrainConfig, processes: int) -> int:
    """Images of one training step, over all processes.

    Raises:
        UsageError: options that contradict each other, with all their values.
    """
    at_once, times, given = config.train_batch_size, config.gradient_accumulation_steps, config.effective_batch_size
    cut = f"--train_batch_size {at_once} x --gradient_accumulation_steps {times} x {processes} process(es)"
    if at_once and times:
        if given not in (None, at_once * times * processes):
            raise UsageError(
                f"--effective_batch_size {given} differs from {cut} = {at_once * times * processes}. Leave out one of "
                "the three options."
            )
        return at_once * times * processes
    given = given or EFFECTIVE_BATCH_SIZE
    for name, value in (("train_batch_size", at_once), ("gradient_accumulation_steps", times)):
        if value and value > share_of(given, processes):
            raise UsageError(
                f"--{name} {value} is more than the {share_of(given, processes)} images of a step in each of "
                f"{processes} process(es): --effective_batch_size is {given}. Raise it to train with larger steps."
            )
    return given


def share_of(images: int, processes: int) -> int:
    """The most images of a step that a process gets."""
    return -(-images // processes)


def default_batching(config: TrainConfig, processes: int) -> Batching:
    """Everything at once, without checkpointing, except for what the options say.

    Raises:
        UsageError: see effective_batch_size.
    """
    share = share_of(effective_batch_size(config, processes), processes)
    whole = Batching(micro_batch_size=share, gradient_checkpointing=False, teacher_batch_size=2 * share)
    return with_options(whole, config, processes)


def with_options(batching: Batching, config: TrainConfig, processes: int) -> Batching:
    """A batching with the values that the options give; they win over what was chosen."""
    at_once, times = config.train_batch_size, config.gradient_accumulation_steps
    if times and not at_once:
        at_once = -(-share_of(effective_batch_size(config, processes), processes) // times)
    if at_once and at_once != batching.micro_batch_size:
        batching = replace(batching, micro_batch_size=at_once, teacher_batch_size=2 * at_once)
    if config.gradient_checkpointing is not None:
        batching = replace(batching, gradient_checkpointing=config.gradient_checkpointing)
    if size := config.render_batch_size:
        batching = replace(batching, render_batch_size=size, preview_batch_size=size)
    return batching
