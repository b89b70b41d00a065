"""The objective of a training step: one risk per caption group, and the plain loss for keep images.

p_U = beta p_S + (1 - beta) p_N holds for the images seen under one caption. So each caption under which both unlabeled
images and positives are seen forms a caption group with a bracket mean_U[l] - beta mean_S[l] of its own. Images seen
under other captions (keep images) get the plain loss.

Nothing in the risk stops the push on positives before their loss is 1 / beta times that of U; `max_ratio` stops it
earlier (`limits`).

The paper's two baselines use another risk: unsupervised learns from the unlabeled images only, supervised treats all
unlabeled images as normal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sd_unlearn.choices import Correction, Risk
from sd_unlearn.data.batch import NO_GROUP, Batch
from sd_unlearn.objectives.base import Objective, StepTerms
from sd_unlearn.risk import UNLABELED, PUTerms, pnu_corrected, pu_terms, supervised, unsupervised


@dataclass(frozen=True)
class PUObjective(Objective):
    """Mean of the risk over caption groups, plus the mean loss of the keep images.

    pu: the PU risk, or the PNU risk with images known to be normal. The baselines use neither correction nor eta, and
    no sign affects their gradient. All metrics are logged for every risk.
    """

    betas: Sequence[Sequence[float]]  # for each caption group, of each set of positives (if any)
    correction: Correction = "abs"
    eta: float = 0.0  # in [0, 1], weight of the images known to be normal; 0 without such images
    risk: Risk = "pu"
    max_ratio: float | None = None  # see `limits`

    @property
    def num_brackets(self) -> int:
        """One for each caption group."""
        return len(self.betas)

    def with_beta(self, beta: float) -> PUObjective:
        """The objective with this beta in every caption group."""
        return replace(self, betas=[[beta]] * len(self.betas))

    def terms(self, nll: Tensor, batch: Batch) -> StepTerms:
        """nll [B] of the batch's examples -> the terms, differentiable."""
        limit = batch.limit if self.max_ratio is None or batch.limit is not None else limits(nll, batch, self.max_ratio)
        nll = nll if limit is None else bounded(nll, limit)
        terms = []
        for group, betas in zip(range(batch.num_groups), self.betas, strict=True):
            weight = torch.where(batch.caption_group == group, batch.weight, 0)
            terms.append(pu_terms(nll, batch.label, betas, weight))
        keep = torch.where(batch.caption_group == NO_GROUP, batch.weight * nll, 0).sum()
        return StepTerms(tuple(terms), keep)

    def loss(self, parts: StepTerms, brackets: Tensor | None = None) -> Tensor:
        """The scalar to minimise. `brackets` [groups]: the whole step's, which determine the signs.

        d|R| = sign(R) dR: with the whole step's signs, the parts' gradients add up to the whole's.
        """
        brackets = parts.brackets if brackets is None else brackets
        risks = [self._risk(*each) for each in zip(parts.terms, self.betas, brackets, strict=True)]
        return torch.stack(risks).mean() + parts.keep

    def _risk(self, terms: PUTerms, betas: Sequence[float], bracket: Tensor) -> Tensor:
        if self.risk == "unsupervised":
            return unsupervised(terms)
        if self.risk == "supervised":
            return supervised(terms, sum(betas))
        return pnu_corrected(terms, self.correction, self.eta, bracket)

    def same_signs(self, brackets: Tensor, others: Tensor) -> bool:
        """Whether two sets of brackets lead to the same gradient."""
        return self.risk != "pu" or self.correction == "none" or bool(((brackets < 0) == (others < 0)).all())


def limits(nll: Tensor, batch: Batch, max_ratio: float) -> Tensor:
    """The cap on the loss of each row, [B]: for positives `max_ratio` (>= 1) times the loss of U at the same timestep.

    The reference is the mean loss of the unlabeled images in the same caption group with the positive's timestep, which
    `share_timesteps` provides; a positive without such images is not capped (infinity), nor are other images. With
    max_ratio < 1 / beta, the bracket over such pairs is never negative.
    """
    values = nll.detach()
    is_reference = (
        (batch.timesteps[:, None] == batch.timesteps)
        & (batch.caption_group[:, None] == batch.caption_group)
        & (batch.label == UNLABELED)
    )  # [B, B]: whether the column's image is a reference for the row's
    count = is_reference.sum(1)
    limit = max_ratio * torch.where(is_reference, values, 0).sum(1) / count.clamp(min=1)
    return torch.where(batch.is_positive & (count > 0), limit, torch.inf)


def bounded(nll: Tensor, limit: Tensor) -> Tensor:
    """nll [B], capped. At the cap the loss is constant, so a positive that is predicted badly enough is not pushed
    further."""
    return torch.where(nll.detach() > limit, limit, nll)
