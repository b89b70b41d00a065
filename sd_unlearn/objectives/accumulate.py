"""The gradient of a whole step, however it is cut into processes and micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from sd_unlearn.batches import Batch
from sd_unlearn.objectives.pu import PUObjective

Losses = Callable[[Batch], Tensor]


def accumulate_gradients(
    accelerator: Accelerator, model: torch.nn.Module, losses: Losses, objective: PUObjective, parts: Sequence[Batch],
    assumed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Leave the whole step's gradient in the parameters, which hold none. Returns (figures [LOGGED], brackets).

    A bracket's sign is that of the whole step: all micro-batches of all processes. With one micro-batch it is known
    before the backward pass. With several it is assumed to be the previous step's (`assumed`, what this function
    returned); when the step's own brackets then disagree, which is rare, the step is gone through again with them.
    """
    state = _random_state() if len(parts) > 1 else None
    figures, brackets = _pass(accelerator, model, losses, objective, parts, assumed)
    if len(parts) > 1 and not objective.decided_alike(brackets, _assumed(assumed, brackets)):
        model.zero_grad()
        _restore(state)  # the same dropout, so that the brackets are those that were just seen
        figures, _ = _pass(accelerator, model, losses, objective, parts, brackets)
    return figures, brackets


def _assumed(assumed: Tensor | None, brackets: Tensor) -> Tensor:
    return torch.ones_like(brackets) if assumed is None else assumed


def _pass(
    accelerator: Accelerator, model: torch.nn.Module, losses: Losses, objective: PUObjective, parts: Sequence[Batch],
    assumed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One forward and backward pass over all parts, with these brackets' signs if there are several parts."""
    figures: Tensor = torch.zeros(())
    brackets: Tensor = torch.zeros(())
    for number, batch in enumerate(parts, 1):
        last = number == len(parts)
        with nullcontext() if last else accelerator.no_sync(model):
            terms = objective.terms(losses(batch), batch)
            signs = _assumed(assumed, terms.brackets)
            if len(parts) == 1:
                signs = accelerator.reduce(terms.brackets, "mean")
            accelerator.backward(objective.loss(terms, signs) / len(parts))
        figures = figures.to(signs.device) + objective.figures(terms, signs) / len(parts)
        brackets = brackets.to(signs.device) + terms.brackets / len(parts)
    return accelerator.reduce(figures, "mean"), accelerator.reduce(brackets, "mean")


def _random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _restore(state: dict[str, Any] | None) -> None:
    if state is not None:
        torch.set_rng_state(state["cpu"])
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])
