"""From --objective to the loss of each example and how these losses are combined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from sd_unlearn.choices import Risk
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.batch import Batch
from sd_unlearn.data.layout import BASELINES
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.objectives.base import Objective
from sd_unlearn.objectives.baselines import MeanObjective, Targets, anchor, baseline_losses, esd, retained
from sd_unlearn.objectives.losses import example_losses
from sd_unlearn.objectives.pu import PUObjective
from sd_unlearn.objectives.teacher import Teacher

LossesOf = Callable[[Denoiser, Batch, Teacher | None], Tensor]  # l [B] of a batch, differentiable
RISKS: dict[str, Risk] = {"pu": "pu", "supervised": "supervised", "unsupervised": "unsupervised"}


def make_losses(config: TrainConfig) -> LossesOf:
    """The losses of an objective's examples."""
    if config.objective in RISKS:
        return lambda denoiser, batch, teacher: example_losses(
            denoiser, batch, config.reduction, teacher, config.snr_gamma
        )
    to_esd: Targets = partial(esd, eta=config.erase_guidance)
    targets: dict[str, Targets] = {"esd-x": to_esd, "esd-u": to_esd, "anchor": anchor, "neggrad": retained}
    return partial(
        baseline_losses,
        targets=targets[config.objective],
        reduction=config.reduction,
        snr_gamma=config.snr_gamma,
        maximized=config.objective == "neggrad",
    )


def make_objective(config: TrainConfig, betas: Sequence[float], eta: float, captions: int) -> Objective:
    """How an objective combines the losses of a step.

    betas: of each set of positives; eta: 0 without images known to be normal; captions: number of caption groups.
    """
    if config.objective in RISKS:
        return PUObjective([list(betas)] * captions, config.correction, eta, RISKS[config.objective])
    step = BASELINES[config.objective]
    kinds = (captions - step.has_generic) * (len(betas) if step.images == "positive" else 1)
    return MeanObjective(kinds, -config.forget_weight if config.objective == "neggrad" else 1.0, step.has_generic)
