"""The gradient of a whole step, however it is divided among processes and cut into micro-batches.

Each term of the objective is a weighted sum over rows, so the gradients of micro-batches add up, whatever kinds of
images they hold. Only two things need the whole step: the signs of the brackets and the caps of `max_ratio`. The signs
of the previous step are assumed, which costs a second pass only in the rare step where they change. (Computing all
losses first and then each micro-batch's gradient, as in gradient caching by Gao et al. 2021, is as exact but costs
another forward pass in every step. The caps, which only the paper's DDPMs use, are computed in this way.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from sd_unlearn.data.batch import Batch, join
from sd_unlearn.objectives.base import LOGGED, Objective
from sd_unlearn.objectives.pu import limits
from sd_unlearn.training.checkpoint import random_state, restore_random_state
from sd_unlearn.training.memory import together

Losses = Callable[[Batch], Tensor]  # l [B] of a batch, differentiable


def accumulate_gradients(
    accelerator: Accelerator,
    model: torch.nn.Module,
    losses: Losses,
    objective: Objective,
    batch: Batch,
    size: int,
    previous: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Leave the whole step's gradient in the parameters, whose .grad must be empty.

    batch: this process's share of the step; size: of the micro-batches. The sign of a bracket is that of the whole
    step: all micro-batches of all processes. If this is only one, it is known before the backward pass. Otherwise the
    signs of the previous step's brackets (`previous`) are assumed, and the step is repeated if its own brackets turn
    out to have other signs.

    Returns:
        (metrics [LOGGED], brackets [groups]) of the whole step.

    Raises:
        OutOfMemoryInStep: in all processes, if one ran out of memory; parameters may have a part of the gradient.
    """
    micro_batches = batch.cut(size)
    if len(micro_batches) == 1 and accelerator.num_processes == 1:
        return _pass(accelerator, model, losses, objective, micro_batches, None)
    state = random_state()
    if objective.max_ratio is not None and len(micro_batches) > 1:
        micro_batches = _limited(accelerator, losses, batch, size, objective.max_ratio)
        restore_random_state(state)
    elif objective.max_ratio is not None:
        together(accelerator, lambda: None)  # other processes may have more micro-batches, and wait for this one
    if previous is None:
        previous = torch.ones(objective.num_brackets, device=accelerator.device)
    metrics, brackets = _pass(accelerator, model, losses, objective, micro_batches, previous)
    if not objective.same_signs(brackets, previous):
        model.zero_grad()
        restore_random_state(state)  # the same dropout gives the same brackets
        metrics, _ = _pass(accelerator, model, losses, objective, micro_batches, brackets)
    _average_gradients(accelerator, model)
    return metrics, brackets


def _pass(
    accelerator: Accelerator,
    model: torch.nn.Module,
    losses: Losses,
    objective: Objective,
    micro_batches: Sequence[Batch],
    signs: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One forward and backward pass with the signs of these brackets; None: those of the only micro-batch.

    Processes communicate only after it, so that one that runs out of memory does not leave the others waiting.
    """
    total = torch.zeros(len(LOGGED) + objective.num_brackets, device=accelerator.device)

    def accumulate() -> None:
        with accelerator.no_sync(model):
            for part in micro_batches:
                batch = part.to(accelerator.device)
                terms = objective.terms(losses(batch), batch)
                loss = objective.loss(terms, signs)
                accelerator.backward(loss)
                total.add_(torch.cat([objective.metrics(terms, loss), terms.brackets]))

    together(accelerator, accumulate)
    metrics, brackets = accelerator.reduce(total, "mean").split([len(LOGGED), objective.num_brackets])
    return metrics, brackets


@torch.no_grad()
def _limited(accelerator: Accelerator, losses: Losses, batch: Batch, size: int, max_ratio: float) -> list[Batch]:
    """The micro-batches with their caps, which need the losses of images in other micro-batches (of this process:
    images that share a timestep are in the same process)."""

    def find() -> Tensor:
        values = join([losses(part.to(accelerator.device)) for part in batch.cut(size)])
        return limits(values, batch.to(accelerator.device), max_ratio)

    limit = together(accelerator, find)
    return replace(batch, limit=limit.to(batch.label.device)).cut(size)


def _average_gradients(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """Replace the gradient of each process by the mean over all."""
    if accelerator.num_processes == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:  # a process without images has no gradient
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    gradients = [p.grad for p in parameters if p.grad is not None]
    for handle in [torch.distributed.all_reduce(gradient, async_op=True) for gradient in gradients]:
        assert handle is not None
        handle.wait()
    torch._foreach_div_(gradients, accelerator.num_processes)
