"""Which term of the objective pulls how hard: shares of the gradient's norm, to be logged now and then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sd_unlearn.data.batches import PLAIN, Batch
from sd_unlearn.objectives.pu import PUObjective
from sd_unlearn.risk import NORMAL, UNLABELED
from sd_unlearn.training.gradients import Losses


def gradient_shares(
    losses: Losses, objective: PUObjective, batch: Batch, parameters: Sequence[nn.Parameter]
) -> dict[str, Tensor]:
    """Norm of each term's gradient over the sum of these norms: scalars in [0, 1] that add up to 1 (all 0 at rest).

    share_positive: beta mean_S[-log(1 - exp(-l))]; share_u and share_s: the bracket's mean_U[l] and beta mean_S[l];
    share_keep: what must stay; share_n: images known to be normal. Each as it enters the loss, over all brackets; a
    kind of images that the batch lacks has none. With a teacher `losses` has the gradient that is followed, and so
    have these.

    batch: one micro-batch of this process (its last, say), which decides the signs: an estimate, not the step's own
    gradient. losses: of the bare model, since a DDP wrapper would wait for the other processes. The rows of each term
    go through the network on their own, those of positives back twice: all costs about one and a half steps.
    Neither the parameters' .grad nor any random state is changed.
    """
    devices = [batch.latents.device] if batch.latents.is_cuda else []
    with torch.random.fork_rng(devices):
        rows = {name: here for name, here in _rows(batch).items() if here.any()}
        found = {name: losses(batch.only(here)) for name, here in rows.items()}
        nll = torch.zeros_like(batch.weight, dtype=next(iter(found.values())).dtype)
        for name, here in rows.items():
            nll[here] = found[name].detach()
        of_bracket, of_rest = _slopes(objective, nll, batch)
        terms = {"positive": ("s", of_rest), "u": ("u", of_bracket + of_rest), "s": ("s", of_bracket)}
        terms |= {name: (name, of_rest) for name in ("keep", "n")}
        norms = {
            f"share_{term}": _norm(found[name], slope[rows[name]], parameters)
            for term, (name, slope) in terms.items()
            if name in rows
        }
    total = torch.stack(list(norms.values())).sum().clamp(min=torch.finfo(torch.float32).tiny)
    return {name: norm / total for name, norm in norms.items()}


def _rows(batch: Batch) -> dict[str, Tensor]:
    keep = batch.bracket == PLAIN
    labels = {"u": batch.label == UNLABELED, "s": batch.is_positive, "n": batch.label == NORMAL}
    return {name: here & ~keep for name, here in labels.items()} | {"keep": keep}


def _slopes(objective: PUObjective, nll: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """d loss / d l of every row, [B] each: by way of the brackets, and by way of all else."""
    leaf = nll.requires_grad_()
    parts = objective.terms(leaf, batch)
    held = replace(parts, terms=tuple(replace(t, bracket=t.bracket.detach()) for t in parts.terms))
    (whole,) = torch.autograd.grad(objective.loss(parts), leaf, retain_graph=True)
    (rest,) = torch.autograd.grad(objective.loss(held), leaf)
    return whole - rest, rest


def _norm(nll: Tensor, slope: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Norm of sum_i slope_i dl_i / d parameters, a scalar."""
    found = torch.autograd.grad(nll, parameters, slope.to(nll.dtype), retain_graph=True, allow_unused=True)
    squares = [g.float().square().sum() for g in found if g is not None]
    return torch.stack(squares).sum().sqrt() if squares else slope.new_zeros(())
