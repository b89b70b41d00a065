"""The gradient of a whole step, however it is split into processes and micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor

from sd_unlearn.data.batch import Batch
from sd_unlearn.objectives.pu import LOGGED, PUObjective

Losses = Callable[[Batch], Tensor]  # l [B] of a batch, differentiable


def accumulate_gradients(
    accelerator: Accelerator,
    model: torch.nn.Module,
    losses: Losses,
    objective: PUObjective,
    micro_batches: Sequence[Batch],
    previous: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Leave the whole step's gradient in the parameters, whose .grad must be empty.

    The sign of a bracket is that of the whole step: all micro-batches of all processes. With one micro-batch it is
    known before the backward pass. With several, the signs of the previous step's brackets (`previous`) are assumed;
    if the step's own brackets turn out to have other signs, which is rare, the step is repeated with them.

    Returns:
        (metrics [LOGGED], brackets [groups]) of the whole step.
    """
    if len(micro_batches) == 1:
        return _pass(accelerator, model, losses, objective, micro_batches, None)
    if previous is None:
        previous = torch.ones(len(objective.betas), device=accelerator.device)
    state = _random_state()
    metrics, brackets = _pass(accelerator, model, losses, objective, micro_batches, previous)
    if not objective.same_signs(brackets, previous):
        model.zero_grad()
        _restore(state)  # the same dropout gives the same brackets
        metrics, _ = _pass(accelerator, model, losses, objective, micro_batches, brackets)
    return metrics, brackets


def _pass(
    accelerator: Accelerator,
    model: torch.nn.Module,
    losses: Losses,
    objective: PUObjective,
    micro_batches: Sequence[Batch],
    signs: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One forward and backward pass with the signs of these brackets; None: those of the only micro-batch."""
    total = torch.zeros(len(LOGGED) + len(objective.betas), device=accelerator.device)
    for number, batch in enumerate(micro_batches, 1):
        with nullcontext() if number == len(micro_batches) else accelerator.no_sync(model):
            terms = objective.terms(losses(batch), batch)
            loss = objective.loss(terms, accelerator.reduce(terms.brackets, "mean") if signs is None else signs)
            accelerator.backward(loss / len(micro_batches))
        total += torch.cat([objective.metrics(terms, loss), terms.brackets]) / len(micro_batches)
    metrics, brackets = accelerator.reduce(total, "mean").split([len(LOGGED), len(objective.betas)])
    return metrics, brackets


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all()


def _restore(state: tuple[Tensor, list[Tensor]]) -> None:
    cpu, cuda = state
    torch.set_rng_state(cpu)
    torch.cuda.set_rng_state_all(cuda)
