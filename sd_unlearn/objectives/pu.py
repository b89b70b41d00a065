"""The objective of a training step: one bracket a caption, the plain loss for what must stay.

p_U = beta p_S + (1 - beta) p_N holds for the images seen under one caption, so every caption under which both
unlabeled images and positives are seen has its own bracket; images seen under other captions (keep prompts)
are plain unlabeled data.

Nothing in the risk ends the push of positives before their loss is 1 / beta times that of U. `bounded` ends it sooner.

The paper's two baselines are the same step with another risk in place of the bracket's: unsupervised learns the
unlabeled images alone, supervised takes them for normal as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sd_unlearn.choices import Correction, Risk
from sd_unlearn.data.batches import PLAIN, Batch
from sd_unlearn.risk import (
    UNLABELED,
    PUTerms,
    pnu_corrected,
    pu_terms,
    supervised,
    unsupervised,
)

LOGGED = ("loss", "mean_u", "mean_s", "mean_n", "bracket", "positive_term", "mean_keep")


@dataclass(frozen=True)
class StepTerms:
    """The parts of the objective of one Batch: averaged over a step's batches, they are the whole step's."""

    terms: tuple[PUTerms, ...]  # of each bracket
    keep: Tensor  # mean loss of the keep images, a scalar

    @property
    def brackets(self) -> Tensor:
        """[captions], detached: what decides the signs, once averaged over the step."""
        return torch.stack([t.bracket.detach() for t in self.terms])


@dataclass(frozen=True)
class PUObjective:
    """Mean over captions of the risk, plus the keep images' mean loss.

    pu: the PU or, with images known to be normal, PNU risk. The baselines know neither correction nor eta, and no sign
    decides their gradient; the figures of every risk are logged all the same.
    """

    betas: Sequence[Sequence[float]]  # of each bracket (in StratifiedBatches' order), of each sensitive set, if any
    correction: Correction = "abs"
    eta: float = 0.0  # in [0, 1], the weight of the images known to be normal; 0 when there are none
    risk: Risk = "pu"
    max_ratio: float | None = None  # see `bounded`

    def terms(self, nll: Tensor, batch: Batch) -> StepTerms:
        """nll [B] of the batch's examples -> the parts, with their gradients."""
        nll = nll if self.max_ratio is None else bounded(nll, batch, self.max_ratio)
        found = []
        for caption, betas in zip(range(batch.captions), self.betas, strict=True):
            weight = torch.where(batch.bracket == caption, batch.weight, 0)
            found.append(pu_terms(nll, batch.label, betas, weight))
        return StepTerms(tuple(found), torch.where(batch.bracket == PLAIN, batch.weight * nll, 0).sum())

    def loss(self, parts: StepTerms, brackets: Tensor | None = None) -> Tensor:
        """The scalar to follow. `brackets` [captions] are the whole step's: only they know the signs.

        d|R| = sign(R) dR: with the whole step's signs, the average of the parts' gradients is the whole's gradient.
        """
        known = parts.brackets if brackets is None else brackets
        risks = [self._risk(*each) for each in zip(parts.terms, self.betas, known, strict=True)]
        return torch.stack(risks).mean() + parts.keep

    def _risk(self, terms: PUTerms, betas: Sequence[float], bracket: Tensor) -> Tensor:
        if self.risk == "unsupervised":
            return unsupervised(terms)
        if self.risk == "supervised":
            return supervised(terms, sum(betas))
        return pnu_corrected(terms, self.correction, self.eta, bracket)

    def figures(self, parts: StepTerms, loss: Tensor) -> Tensor:
        """[len(LOGGED)], detached: the figures to log, in the order of LOGGED, those of brackets as their mean."""
        names = ("mean_u", "mean_s", "mean_n", "bracket", "positive")
        means = [torch.stack([getattr(t, name) for t in parts.terms]).mean() for name in names]
        return torch.stack([loss, *means, parts.keep]).detach().float()

    def decided_alike(self, some: Tensor, others: Tensor) -> bool:
        """Whether two sets of brackets lead to the same step."""
        return self.risk != "pu" or self.correction == "none" or bool(((some < 0) == (others < 0)).all())


def bounded(nll: Tensor, batch: Batch, max_ratio: float) -> Tensor:
    """nll [B] with that of positives at most `max_ratio` (>= 1) times the loss of U at the same timestep and noise.

    There it is constant: a positive that is predicted badly enough is pushed no further. The loss to compare with is
    the mean over the unlabeled images of its bracket that share the positive's timestep, as `share_timesteps` deals
    them; where there is none, it stays as it is. With max_ratio < 1 / beta, no bracket over such pairs is negative.
    """
    values = nll.detach()
    beside = (
        (batch.timesteps[:, None] == batch.timesteps)
        & (batch.bracket[:, None] == batch.bracket)
        & (batch.label == UNLABELED)
    )  # [B, B]: who stands beside whom
    count = beside.sum(1)
    limit = max_ratio * torch.where(beside, values, 0).sum(1) / count.clamp(min=1)
    return torch.where(batch.is_positive & (count > 0) & (values > limit), limit, nll)
