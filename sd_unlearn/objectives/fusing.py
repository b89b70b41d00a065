"""One change of a layer from those of several LoRAs, in closed form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sd_unlearn.objectives.closed_form import Edit

RIDGE = 0.01  # relative to the mean variance of the inputs


def summed(edits: Sequence[Edit]) -> Edit:
    """The sum of the changes."""
    return Edit(torch.cat([edit.up for edit in edits], dim=1), torch.cat([edit.down for edit in edits]))


def least_squares(edits: Sequence[Edit], own: Sequence[Tensor], kept: Tensor, keep_weight: float = 1.0) -> Edit:
    """The change D that keeps the effect of each change D_k on its own inputs, and none on the inputs to keep.

    D minimizes sum_k E_k |(D - D_k) x|^2 + w K E_kept |D x|^2 + r |D - sum_k D_k|^2, with w = `keep_weight` >= 0 and r
    a small ridge: D = (sum_k D_k G_k + r sum_k D_k) (sum_k G_k + w K G_kept + r I)^-1, where inputs that neither show
    get the sum. After MACE (Lu et al. 2024, arXiv 2403.06135), which fuses LoRAs of cross-attention's keys and values,
    and RegMean (Jin et al. 2023, arXiv 2212.09849), which takes the recorded inputs of any linear layer.

    own: G_k = E_k[x x'], [in, in] each; kept: G_kept. Computed in float64. The rank is the sum of the ranks.
    """
    total = _total(own, kept, keep_weight)
    ridge = RIDGE * total.diagonal().mean() * torch.eye(len(total), dtype=total.dtype, device=total.device)
    sides = [edit.down.double() @ (gram.double() + ridge) for edit, gram in zip(edits, own, strict=True)]
    down = torch.linalg.solve(total + ridge, torch.cat(sides).T).T
    return Edit(torch.cat([edit.up.double() for edit in edits], dim=1), down)


def least_squares_in_span(edits: Sequence[Edit], own: Sequence[Tensor], kept: Tensor, keep_weight: float = 1.0) -> Edit:
    """The same change, restricted to D = U C V with U all ups side by side and V all downs below one another, [R, in].

    Needs the inputs only as the downs see them, z = V x: own: E_k[z z'], [R, R] each; kept: E_kept[z z']. That makes it
    fit for convolutions, of whose patches x a whole E[x x'] would be too large. With P_k the projection onto the rows
    of V that change k has, and r relative to the mean variance of z over that of the downs, C = sum_k P_k (E_k[z z'] +
    r V V') (sum_k E_k[z z'] + w K E_kept[z z'] + r V V')^-1. Computed in float64.
    """
    whole = summed(edits)
    downs = whole.down.double()
    total, weights = _total(own, kept, keep_weight), downs @ downs.T
    ridge = RIDGE * total.diagonal().mean() / weights.diagonal().mean() * weights
    rows = torch.arange(len(downs), device=downs.device).split([len(edit.down) for edit in edits])
    sides = torch.cat([(gram.double() + ridge)[part] for gram, part in zip(own, rows, strict=True)])
    return Edit(whole.up.double(), sides @ torch.linalg.pinv(total + ridge, hermitian=True) @ downs)


def _total(own: Sequence[Tensor], kept: Tensor, keep_weight: float) -> Tensor:
    return torch.stack([gram.double() for gram in own]).sum(0) + keep_weight * len(own) * kept.double()
