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


def least_squares(edits: Sequence[Edit], effects: Sequence[Tensor], total: Tensor) -> Edit:
    """The change D that keeps the effect of each change D_k on its own inputs, and none on the inputs to keep.

    D minimizes sum_k E_k |(D - D_k) x|^2 + w K E_kept |D x|^2 + r |D - sum_k D_k|^2, with w >= 0 the weight of what is
    kept and r a small ridge: D = (sum_k D_k G_k + r sum_k D_k) (sum_k G_k + w K G_kept + r I)^-1, with G = E[x x'].
    Inputs that none of these means show get the sum. After MACE (Lu et al. 2024, arXiv 2403.06135), which fuses LoRAs
    of cross-attention's keys and values, and RegMean (Jin et al. 2023, arXiv 2212.09849), which takes the recorded
    inputs of any linear layer.

    effects: down_k G_k, [rank, in] each; total: sum_k G_k + w K G_kept, [in, in]. Computed in float64. The rank is the
    sum of the ranks.
    """
    whole, total = summed(edits), total.double()
    ridge = RIDGE * total.diagonal().mean()
    sides = torch.cat([effect.double() for effect in effects]) + ridge * whole.down.double()
    eye = torch.eye(len(total), dtype=total.dtype, device=total.device)
    return Edit(whole.up.double(), torch.linalg.solve(total + ridge * eye, sides.T).T)


def least_squares_in_span(edits: Sequence[Edit], own: Sequence[Tensor], total: Tensor) -> Edit:
    """The same change, restricted to D = U C V with U all ups side by side and V all downs below one another, [R, in].

    Needs the inputs only as the downs see them, z = V x. That makes it fit for convolutions, of whose patches x a whole
    E[x x'] would be too large. With P_k the projection onto the rows of V that change k has, and r relative to the mean
    variance of z over that of the downs, C = sum_k P_k (E_k[z z'] + r V V') (sum_k E_k[z z'] + w K E_kept[z z'] +
    r V V')^-1. Computed in float64.

    own: E_k[z z'], [R, R] each; total: sum_k E_k[z z'] + w K E_kept[z z'].
    """
    whole, total = summed(edits), total.double()
    downs = whole.down.double()
    weights = downs @ downs.T
    ridge = RIDGE * total.diagonal().mean() / weights.diagonal().mean() * weights
    rows = torch.arange(len(downs), device=downs.device).split([len(edit.down) for edit in edits])
    sides = torch.cat([gram.double()[part] for gram, part in zip(own, rows, strict=True)]) + ridge
    return Edit(whole.up.double(), sides @ torch.linalg.pinv(total + ridge, hermitian=True) @ downs)
