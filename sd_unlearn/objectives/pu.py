"""The PU objective of a training step: one bracket a caption, plain noise prediction for what must stay.

p_U = beta p_S + (1 - beta) p_N holds for the images seen under one caption, so every caption under which both
unlabeled images and positives are seen has its own bracket; images seen under other captions (keep prompts)
are plain unlabeled data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sd_unlearn.dataset import PLAIN, Batch
from sd_unlearn.risk import Correction, corrected, pu_terms, unsupervised_risk

Reduce = Callable[[Tensor], Tensor]  # the mean over all processes


@dataclass(frozen=True)
class StepLoss:
    """The loss to follow and the detached figures [6] to log, in the order of LOGGED."""

    loss: Tensor
    logs: Tensor


LOGGED = ("loss", "mean_u", "mean_s", "bracket", "positive_term", "mean_keep")


@dataclass(frozen=True)
class PUObjective:
    """Mean over captions of the PU risk, plus the keep images' mean loss."""

    beta: float
    correction: Correction = "abs"

    def __call__(self, nll: Tensor, batch: Batch, reduce: Reduce = lambda x: x) -> StepLoss:
        """nll [B] of the batch's examples -> loss.

        `reduce` averages over processes, so that the bracket's sign is that of the whole batch.
        """
        terms = []
        for caption in range(batch.captions):
            here = batch.bracket == caption
            terms.append(pu_terms(nll[here], batch.is_positive[here], self.beta))
        brackets = reduce(torch.stack([t.bracket.detach() for t in terms]))
        loss = torch.stack([corrected(t, self.correction, b) for t, b in zip(terms, brackets, strict=True)]).mean()
        keep = nll[batch.bracket == PLAIN]
        kept = unsupervised_risk(keep) if len(keep) else nll.sum() * 0
        loss = loss + kept
        figures = [
            loss,
            *(torch.stack([getattr(t, n) for t in terms]).mean() for n in ("mean_u", "mean_s", "bracket", "positive")),
            kept,
        ]
        return StepLoss(loss, reduce(torch.stack([f.detach().float() for f in figures])))
