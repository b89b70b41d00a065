"""How strongly each term of the objective pulls: its share of the gradient norm, logged every N steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sd_unlearn.data.batch import NO_GROUP, Batch
from sd_unlearn.objectives.pu import PUObjective
from sd_unlearn.risk import NORMAL, UNLABELED
from sd_unlearn.training.gradients import Losses


def gradient_shares(
    losses: Losses, objective: PUObjective, batch: Batch, parameters: Sequence[nn.Parameter]
) -> dict[str, Tensor]:
    """Norm of each term's gradient over the sum of these norms: scalars in [0, 1] that add up to 1 (or all 0).

    share_positive: beta mean_S[-log(1 - exp(-l))]; share_u and share_s: mean_U[l] and beta mean_S[l] of the bracket;
    share_keep: keep images; share_n: images known to be normal. Each term as it enters the loss, over all caption
    groups. A kind of image that the batch lacks has no share.

    batch: one micro-batch of this process. It determines the signs, so the shares estimate those of the whole step.
    losses: of the bare model, since a DDP wrapper would wait for the other processes. The rows of each term pass
    through the network separately, and those of positives are differentiated twice: about one and a half steps of
    computation. Neither the parameters' .grad nor any random state changes.
    """
    devices = [batch.latents.device] if batch.latents.is_cuda else []
    with torch.random.fork_rng(devices):
        rows = {name: selected for name, selected in _rows(batch).items() if selected.any()}
        nll_of = {name: losses(batch.only(selected)) for name, selected in rows.items()}
        nll = torch.zeros_like(batch.weight, dtype=next(iter(nll_of.values())).dtype)
        for name, selected in rows.items():
            nll[selected] = nll_of[name].detach()
        of_bracket, of_rest = _slopes(objective, nll, batch)
        terms = {"positive": ("s", of_rest), "u": ("u", of_bracket + of_rest), "s": ("s", of_bracket)}
        terms |= {name: (name, of_rest) for name in ("keep", "n")}
        norms = {
            f"share_{term}": _norm(nll_of[name], slope[rows[name]], parameters)
            for term, (name, slope) in terms.items()
            if name in rows
        }
    total = torch.stack(list(norms.values())).sum().clamp(min=torch.finfo(torch.float32).tiny)
    return {name: norm / total for name, norm in norms.items()}


def _rows(batch: Batch) -> dict[str, Tensor]:
    keep = batch.caption_group == NO_GROUP
    labels = {"u": batch.label == UNLABELED, "s": batch.is_positive, "n": batch.label == NORMAL}
    return {name: selected & ~keep for name, selected in labels.items()} | {"keep": keep}


def _slopes(objective: PUObjective, nll: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """d loss / d l of every row, [B] each: through the brackets, and through everything else."""
    leaf = nll.requires_grad_()
    parts = objective.terms(leaf, batch)
    constant = replace(parts, terms=tuple(replace(t, bracket=t.bracket.detach()) for t in parts.terms))
    (whole,) = torch.autograd.grad(objective.loss(parts), leaf, retain_graph=True)
    (rest,) = torch.autograd.grad(objective.loss(constant), leaf)
    return whole - rest, rest


def _norm(nll: Tensor, slope: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Norm of sum_i slope_i dl_i / d parameters, a scalar."""
    gradients = torch.autograd.grad(nll, parameters, slope.to(nll.dtype), retain_graph=True, allow_unused=True)
    squares = [g.float().square().sum() for g in gradients if g is not None]
    return torch.stack(squares).sum().sqrt() if squares else slope.new_zeros(())
