"""How strongly each term of the objective pulls: its share of the gradient norm, logged every N steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sd_unlearn.data.batch import NO_GROUP, Batch
from sd_unlearn.objectives.base import Objective
from sd_unlearn.risk import NORMAL, UNLABELED
from sd_unlearn.training.gradients import Losses


def gradient_shares(
    losses: Losses,
    objective: Objective,
    batch: Batch,
    size: int,
    brackets: Tensor,
    parameters: Sequence[nn.Parameter],
) -> dict[str, Tensor]:
    """Norm of each term's gradient over the sum of these norms: scalars in [0, 1] that add up to 1 (or all 0).

    share_positive: beta mean_S[-log(1 - exp(-l))]; share_u and share_s: mean_U[l] and beta mean_S[l] of the bracket;
    share_keep: keep images; share_n: images known to be normal. Each term as it enters the loss, over all caption
    groups. A kind of image that the batch lacks has no share.

    batch: this process's images of a step, which pass through the network at most `size` at a time; brackets: [groups]
    of the whole step. losses: of the bare model, since a DDP wrapper would wait for the other processes. The rows of
    each term pass separately, and those of positives are differentiated twice: about one and a half steps of
    computation. Neither the parameters' .grad nor any random state changes.
    """
    devices = [batch.latents.device] if batch.latents.is_cuda else []
    gradients: dict[str, list[Tensor]] = {}
    with torch.random.fork_rng(devices):
        for kind, rows in _rows(batch).items():
            for part in batch.only(rows).cut(size) if rows.any() else ():
                nll = losses(part)
                of_bracket, of_rest = _slopes(objective, nll.detach(), part, brackets)
                slopes = {"u": {"u": of_bracket + of_rest}, "s": {"positive": of_rest, "s": of_bracket}}
                for term, slope in slopes.get(kind, {kind: of_rest}).items():
                    _add(gradients.setdefault(f"share_{term}", []), nll, slope, parameters)
    norms = {term: torch.stack([g.square().sum() for g in found]).sum().sqrt() for term, found in gradients.items()}
    total = torch.stack(list(norms.values())).sum().clamp(min=torch.finfo(torch.float32).tiny)
    return {name: norm / total for name, norm in norms.items()}


def _rows(batch: Batch) -> dict[str, Tensor]:
    keep = batch.caption_group == NO_GROUP
    labels = {"u": batch.label == UNLABELED, "s": batch.is_positive, "n": batch.label == NORMAL}
    return {name: selected & ~keep for name, selected in labels.items()} | {"keep": keep}


def _slopes(objective: Objective, nll: Tensor, batch: Batch, brackets: Tensor) -> tuple[Tensor, Tensor]:
    """d loss / d l of every row, [B] each: through the brackets, and through everything else."""
    leaf = nll.requires_grad_()
    parts = objective.terms(leaf, batch)
    constant = replace(parts, terms=tuple(replace(t, bracket=t.bracket.detach()) for t in parts.terms))
    (whole,) = torch.autograd.grad(objective.loss(parts, brackets), leaf, retain_graph=True)
    (rest,) = torch.autograd.grad(objective.loss(constant, brackets), leaf)
    return whole - rest, rest


def _add(total: list[Tensor], nll: Tensor, slope: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Add sum_i slope_i dl_i / d parameters to the total of each parameter (an empty list: zeros)."""
    gradients = torch.autograd.grad(
        nll, parameters, slope.to(nll.dtype), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    if total:
        torch._foreach_add_(total, [g.float() for g in gradients])
    else:
        total += [g.float() for g in gradients]
