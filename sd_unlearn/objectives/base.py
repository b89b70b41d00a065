"""What the training loop needs of an objective: terms that add up over micro-batches, and the loss made of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from sd_unlearn.data.batch import Batch
from sd_unlearn.risk import PUTerms

LOGGED = ("loss", "mean_u", "mean_s", "mean_n", "bracket", "positive_term", "mean_keep")


@dataclass(frozen=True)
class StepTerms:
    """The terms of the objective for one Batch. Added up over the micro-batches of a process and averaged over the
    processes, they are the whole step's: each is a weighted sum over rows, also that of -log(1 - exp(-l))."""

    terms: tuple[PUTerms, ...]  # of each caption group
    keep: Tensor  # mean loss of the keep images, a scalar

    @property
    def brackets(self) -> Tensor:
        """[groups], detached. Those of the whole step determine the signs."""
        return torch.stack([t.bracket.detach() for t in self.terms])


class Objective(ABC):
    """Combines the losses of a step's examples."""

    max_ratio: float | None = None  # the cap on the losses of positives, see `pu.limits`; None: no cap

    @property
    @abstractmethod
    def num_brackets(self) -> int:
        """How many brackets the terms have."""

    @abstractmethod
    def terms(self, nll: Tensor, batch: Batch) -> StepTerms:
        """nll [B] of the batch's examples -> the terms, differentiable."""

    @abstractmethod
    def loss(self, parts: StepTerms, brackets: Tensor | None = None) -> Tensor:
        """The scalar to minimise. `brackets` [groups]: the whole step's, which determine the signs."""

    def metrics(self, parts: StepTerms, loss: Tensor) -> Tensor:
        """[len(LOGGED)], detached: the metrics to log, in the order of LOGGED; means over caption groups."""
        names = ("mean_u", "mean_s", "mean_n", "bracket", "positive")
        means = [torch.stack([getattr(t, name) for t in parts.terms]).mean() for name in names]
        return torch.stack([loss, *means, parts.keep]).detach().float()

    def same_signs(self, brackets: Tensor, others: Tensor) -> bool:
        """Whether two sets of brackets lead to the same gradient."""
        return True

    def with_beta(self, beta: float) -> Self:
        """The objective with another share of the concept among the unlabeled images."""
        return self
