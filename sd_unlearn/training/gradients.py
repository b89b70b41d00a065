"""The gradient of a whole step, however it is cut into processes and micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor

from sd_unlearn.data.batches import Batch
from sd_unlearn.objectives.pu import LOGGED, PUObjective

Losses = Callable[[Batch], Tensor]


def accumulate_gradients(
    accelerator: Accelerator,
    model: torch.nn.Module,
    losses: Losses,
    objective: PUObjective,
    parts: Sequence[Batch],
    assumed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Leave the whole step's gradient in the parameters, which hold none. Returns (figures [LOGGED], brackets).

    A bracket's sign is that of the whole step: all micro-batches of all processes. With one micro-batch it is known
    before the backward pass. With several it is assumed to be the previous step's (`assumed`, what this function
    returned); when the step's own brackets then disagree, which is rare, the step is gone through again with them.
    """
    if len(parts) == 1:
        return _pass(accelerator, model, losses, objective, parts, None)
    if assumed is None:
        assumed = torch.ones(len(objective.betas), device=accelerator.device)
    state = _random_state()
    figures, brackets = _pass(accelerator, model, losses, objective, parts, assumed)
    if not objective.decided_alike(brackets, assumed):
        model.zero_grad()
        _restore(state)  # the same dropout, so that the brackets are those that were just seen
        figures, _ = _pass(accelerator, model, losses, objective, parts, brackets)
    return figures, brackets


def _pass(
    accelerator: Accelerator,
    model: torch.nn.Module,
    losses: Losses,
    objective: PUObjective,
    parts: Sequence[Batch],
    signs: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One forward and backward pass over all parts, with these brackets' signs; None: with those of the only part."""
    total = torch.zeros(len(LOGGED) + len(objective.betas), device=accelerator.device)
    for number, batch in enumerate(parts, 1):
        with nullcontext() if number == len(parts) else accelerator.no_sync(model):
            terms = objective.terms(losses(batch), batch)
            loss = objective.loss(terms, accelerator.reduce(terms.brackets, "mean") if signs is None else signs)
            accelerator.backward(loss / len(parts))
        total += torch.cat([objective.figures(terms, loss), terms.brackets]) / len(parts)
    figures, brackets = accelerator.reduce(total, "mean").split([len(LOGGED), len(objective.betas)])
    return figures, brackets


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all()


def _restore(state: tuple[Tensor, list[Tensor]]) -> None:
    cpu, cuda = state
    torch.set_rng_state(cpu)
    torch.cuda.set_rng_state_all(cuda)
