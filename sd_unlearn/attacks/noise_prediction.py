"""The loss of noise prediction on the attacker's images, and the steps in which most white-box attacks minimize it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from sd_unlearn.attacks.base import Samples, Target
from sd_unlearn.errors import UnlearnError
from sd_unlearn.io.progress import say
from sd_unlearn.models.diffusion import sample_positions
from sd_unlearn.training.learned_captions import SCALE

MAX_SKIPPED = 20  # steps in a row whose gradient is not finite


@dataclass(frozen=True)
class NoisedBatch:
    """Latents of some of the attacker's images, with noise and timesteps to train on."""

    rows: Tensor  # [B] indices of the images
    latents: Tensor  # [B, C, H/8, W/8]
    noise: Tensor  # as latents
    position: Tensor  # [B] in [0, 1): the timestep as a share of the schedule (of its density, for flow matching)

    def part(self, numbers: Sequence[int]) -> NoisedBatch:
        """The images with consecutive numbers in the batch."""
        of = slice(numbers[0], numbers[-1] + 1)
        return NoisedBatch(self.rows[of], self.latents[of], self.noise[of], self.position[of])


def sample_batch(samples: Samples, size: int, generator: torch.Generator) -> NoisedBatch:
    """`size` of the images, or all if there are fewer, in random order. The random numbers are drawn on the CPU.

    Each image gets a timestep from another of len(rows) equal parts of the schedule: uniform, with less variance of the
    batch's loss than independent timesteps.
    """
    rows = torch.randperm(len(samples.mean), generator=generator)[:size]
    latents = samples.latents(rows, generator)
    noise = torch.randn(latents.shape, generator=generator)
    return NoisedBatch(rows, latents, noise, sample_positions(len(rows), generator))


def noise_loss(target: Target, batch: NoisedBatch, text: Tensor) -> Tensor:
    """Mean squared error of the prediction (Ho et al. 2020, equation 14) with text [1 or B, tokens, width]."""
    base, denoiser, device = target.base, target.denoiser, target.base.device
    timesteps = denoiser.process.at(batch.position).to(device)
    given = batch.latents.to(device), batch.noise.to(device), timesteps
    noisy, wanted = denoiser.process.add_noise(*given), denoiser.process.target(*given)
    dtype = base.network.dtype
    predicted = denoiser.predict(noisy.to(dtype), timesteps, text.expand(len(noisy), -1, -1).to(device, dtype))
    return (predicted.float() - wanted).square().mean()


# Text embeddings [1 or B, tokens, width] of a part of a batch, with a graph of their own whenever they are asked for.
TextOf = Callable[[NoisedBatch], Tensor]
Gradients = tuple[Tensor | None, ...]  # of parameters


def noise_gradients(
    target: Target, batch: NoisedBatch, text: TextOf, parameters: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of the loss by parameters in full precision; None for one that it does not depend on.

    If memory runs out, the gradients of parts of the batch are added up, and if one image is too much, activations are
    computed again in the backward pass. In fp16 the loss is multiplied by SCALE for the backward pass: it is a mean
    over very many elements, so the gradients of the network's outputs would otherwise be rounded to zero.

    Raises:
        OutOfMemory: memory is too small for one image.
    """
    scale = SCALE if target.base.network.dtype == torch.float16 else 1.0

    def of_part(numbers: Sequence[int]) -> Gradients:
        part = batch.part(numbers)
        loss = noise_loss(target, part, text(part)) * (len(numbers) / len(batch.rows))
        return torch.autograd.grad(scale * loss, parameters, allow_unused=True)

    numbers, network = range(len(batch.rows)), target.base.network
    parts = target.base.attacking.map(of_part, numbers, len(numbers), lambda: _use_checkpointing(network))
    return [gradient if gradient is None else gradient / scale for gradient in reduce(_added, parts)]


def _added(sums: Gradients, part: Gradients) -> Gradients:
    return tuple(b if a is None else a if b is None else a + b for a, b in zip(sums, part, strict=True))


def _use_checkpointing(network: Any) -> bool:
    """Switch on gradient checkpointing, from now on; False if the network has none, or uses it already."""
    if network.is_gradient_checkpointing or not network._supports_gradient_checkpointing:
        return False
    network.enable_gradient_checkpointing()
    say("Out of memory with one image at a time: continuing with gradient checkpointing.")
    return True


class Descent:
    """Steps of an optimizer that minimize the loss. Gradients that are not finite are skipped."""

    def __init__(self, target: Target, optimizer: torch.optim.Optimizer) -> None:
        self.target, self.optimizer = target, optimizer
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.skipped = 0  # in a row

    def step(self, batch: NoisedBatch, text: TextOf) -> None:
        """A step on a batch.

        Raises:
            OutOfMemory: memory is too small for one image.
            UnlearnError: too many steps in a row were skipped.
        """
        gradients = noise_gradients(self.target, batch, text, self.parameters)
        are_finite = [gradient.isfinite().all() for gradient in gradients if gradient is not None]
        if bool(torch.stack(are_finite).all()):  # waits for the device once
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            self.optimizer.step()
            self.skipped = 0
            return
        self.skipped += 1
        if self.skipped == MAX_SKIPPED:
            raise UnlearnError(
                f"The gradient of the attack was not finite for {MAX_SKIPPED} steps in a row. Use --mixed_precision "
                "bf16 or no."
            )
