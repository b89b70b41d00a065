"""Batches and a linear model small enough to know the gradient of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sd_unlearn.choices import Risk
from sd_unlearn.data.batch import NO_GROUP, Batch
from sd_unlearn.objectives.pu import PUObjective
from sd_unlearn.risk import NORMAL, UNLABELED

KEEP = [(NO_GROUP, UNLABELED)] * 8


def kinds(*labels: int) -> list[tuple[int, int]]:
    """(caption group, label) of each image of a step: per group 8 unlabeled and 4 of each other label, then keep."""
    groups = [[(g, UNLABELED)] * 8 + [(g, label) for label in labels for _ in range(4)] for g in (0, 1)]
    return [*groups[0], *groups[1], *KEEP]


@dataclass(frozen=True)
class Case:
    """An objective and the kinds of images of its step."""

    kinds: list[tuple[int, int]]
    betas: tuple[tuple[float, ...], ...]
    eta: float = 0.0
    risk: Risk = "pu"

    max_ratio: float | None = None

    def objective(self, correction: str) -> PUObjective:
        return PUObjective(self.betas, correction, self.eta, self.risk, self.max_ratio)  # type: ignore[arg-type]


PU = Case(kinds(0), ((0.3,), (0.4,)))


CASES = {
    "pu": PU,
    "pnu": Case(kinds(0, NORMAL), ((0.3,), (0.4,)), eta=0.35),
    "sets": Case(kinds(0, 1), ((0.1, 0.2), (0.3, 0.1))),
    "all": Case(kinds(0, 1, NORMAL), ((0.1, 0.2), (0.3, 0.1)), eta=0.35),
}
CAPPED = Case(kinds(0), ((0.3,), (0.4,)), max_ratio=1.5)
ALL_CASES = CASES | {"capped": CAPPED}


class Linear(nn.Module):
    """A network with a loss for every example: l = (w . x)^2, with dropout on x."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch: Batch) -> Tensor:
        return (self.dropout(batch.latents) @ self.weight).square()


def step(scale: float, case: Case = PU, processes: int = 1) -> Batch:
    """A step's batch. Every other positive of the second caption group is scaled by `scale`, so that the sign of its
    bracket differs between micro-batches. A positive has the timestep of an unlabeled image."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(case.kinds), 6, generator=generator, dtype=torch.float64)
    group, label = torch.tensor(case.kinds).T
    order = torch.tensor([case.kinds[:n].count(kind) for n, kind in enumerate(case.kinds)])
    x[(group == 1) & (label == 0) & (order % 2 == 1)] *= scale
    count = torch.tensor([case.kinds.count(kind) for kind in case.kinds])
    weight = (processes / count).double()
    return Batch(x, x, x, label, group, 2, order, x, torch.zeros_like(order).bool(), weight)
