"""The baselines of other papers against their formulas, on numbers small enough to check by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.batch import NO_GROUP, Batch
from sd_unlearn.data.layout import BASELINES
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.diffusion import Diffusion
from sd_unlearn.objectives.base import LOGGED
from sd_unlearn.objectives.baselines import MeanObjective, Targets, anchor, baseline_losses, esd, retained
from sd_unlearn.objectives.losses import example_losses
from sd_unlearn.objectives.registry import make_losses, make_objective
from sd_unlearn.objectives.teacher import Teacher
from sd_unlearn.risk import UNLABELED

CONCEPT, GENERIC, DOG, EMPTY = 3.0, 2.0, 4.0, 0.5  # captions are single numbers
POSITIVE, KEEP = (0, 0), (NO_GROUP, UNLABELED)  # (caption group, label)
ESD = partial(esd, eta=2.0)


class Toy(nn.Module):
    """e(x, c) = c (x + w), the base with w = 0. The student has w = 0.1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.on = nn.Parameter(torch.tensor(0.1)), True

    def forward(self, noisy: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=encoder_hidden_states[..., None] * (noisy + self.weight * self.on))

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        self.on = False
        yield self
        self.on = True


class Step:
    """Rows of x_0 = (1, 2) and noise (0.5, -1) with abar = 0.64: x_t = 0.8 x_0 + 0.6 noise = (1.1, 1)."""

    def __init__(self, *rows: tuple[tuple[int, int], float]) -> None:
        self.model = Toy()
        self.denoiser = Denoiser(self.model, Diffusion(torch.tensor([0.64, 0.1])))
        (group, label), text = torch.tensor([kind for kind, _ in rows]).T, torch.tensor([c for _, c in rows])
        count, text = len(rows), text.view(-1, 1, 1)
        self.batch = Batch(
            torch.tensor([[[[1.0, 2.0]]]]).expand(count, -1, -1, -1),
            text,
            torch.full_like(text, 9.0),  # the caption of each image's own, which no baseline uses
            label,
            group,
            2,
            torch.zeros(count).long(),
            torch.tensor([[[[0.5, -1.0]]]]).expand(count, -1, -1, -1),
            text.flatten() == EMPTY,
            torch.ones(count),
        )
        captions = (torch.tensor([[value]]) for value in (GENERIC, EMPTY))
        self.teacher = Teacher(self.denoiser, self.model.frozen, *captions, guidance_scale=2.0)

    def losses(self, targets: Targets, teacher: bool = True, **options: object) -> Tensor:
        behind = self.teacher if teacher else None
        return baseline_losses(self.denoiser, self.batch, behind, targets, **options)  # type: ignore[arg-type]

    def slopes(self, losses: Tensor) -> list[float]:
        """dl / dw of every row."""
        return [
            torch.autograd.grad(loss, self.model.weight, retain_graph=True)[0].item() if loss.requires_grad else 0.0
            for loss in losses
        ]


@pytest.mark.parametrize(("reduction", "scale"), [("sum", 1.0), ("mean", 0.5)])
def test_esd_by_hand(reduction: str, scale: float) -> None:
    """Target 3x - 2 (3x - 0.5x) = -2x; prediction 3x + 0.3; the difference is 5x + 0.3 = (5.8, 5.3)."""
    step = Step((POSITIVE, CONCEPT))
    losses = step.losses(ESD, reduction=reduction)
    assert losses.tolist() == pytest.approx([scale * (5.8**2 + 5.3**2)])
    assert step.slopes(losses) == pytest.approx([scale * 2 * 3 * (5.8 + 5.3)])


def test_with_eta_0_esd_learns_the_base() -> None:
    """The difference is 0.3 everywhere."""
    assert Step((POSITIVE, CONCEPT)).losses(partial(esd, eta=0.0)).tolist() == pytest.approx([2 * 0.09])


def test_anchor_by_hand() -> None:
    """Under c the target is the model's own 2x + 0.2, without gradient; the difference is x + 0.1 = (1.2, 1.1).

    Under a the target is the noise; the difference is 2x + 0.2 - noise = (1.9, 3.2).
    """
    step = Step(((0, UNLABELED), GENERIC), ((1, UNLABELED), CONCEPT))
    losses = step.losses(anchor)
    assert losses.tolist() == pytest.approx([1.9**2 + 3.2**2, 1.2**2 + 1.1**2])
    assert step.slopes(losses) == pytest.approx([2 * 2 * (1.9 + 3.2), 2 * 3 * (1.2 + 1.1)])


def test_neggrad_by_hand() -> None:
    """Caption -0.2: the prediction -0.2x - 0.02 differs from the noise by (-0.74, 0.78).

    Caption 3: the difference (3.1, 4.3) is more than the noise itself, (0.5, -1), so the loss is constant.
    """
    step = Step((POSITIVE, -0.2), (POSITIVE, CONCEPT))
    losses = step.losses(retained, maximized=True)
    assert losses.tolist() == pytest.approx([0.74**2 + 0.78**2, 1.25])
    assert step.slopes(losses) == pytest.approx([2 * -0.2 * (-0.74 + 0.78), 0.0])


@pytest.mark.parametrize("targets", [ESD, anchor, retained])
def test_keep_images_learn_as_with_pu(targets: Targets) -> None:
    """Under a caption: the base's 4x, moved by half of what the student moved under the empty caption, 0.05."""
    step = Step((KEEP, DOG), (KEEP, EMPTY), (POSITIVE, CONCEPT))
    losses = step.losses(targets, maximized=targets is retained)[:2]
    assert losses.tolist() == pytest.approx([2 * (0.4 - 0.025) ** 2, 2 * 0.05**2])
    assert step.slopes(losses) == pytest.approx([2 * 2 * 4 * 0.375, 2 * 2 * 0.5 * 0.05])
    keep = step.batch.only(slice(0, 2))
    keep = Batch(**{**keep._fields(), "teacher_text": keep.text})  # a keep image is taught under the caption it has
    assert torch.equal(example_losses(step.denoiser, keep, "sum", step.teacher), losses)


def test_without_a_teacher_keep_images_of_neggrad_learn_the_noise() -> None:
    """4x + 0.4 - noise = (4.3, 5.4); only the loss of positives is limited."""
    losses = Step((KEEP, DOG), (POSITIVE, CONCEPT)).losses(retained, teacher=False, maximized=True)
    assert losses.tolist() == pytest.approx([4.3**2 + 5.4**2, 1.25])


def test_min_snr_weighs_each_row() -> None:
    step = Step((POSITIVE, CONCEPT), (KEEP, DOG))
    weight = step.denoiser.process.snr_weight(step.batch.timesteps, 0.7)
    assert weight[0] < 1
    assert torch.allclose(step.losses(ESD, snr_gamma=0.7), weight * step.losses(ESD))


@pytest.mark.parametrize(
    ("objective", "loss"),
    [
        # sets {3, 5} and {7, 9} under one caption: the mean of 4 and 8
        (MeanObjective(2), 6 + 2),
        (MeanObjective(2, weight=-0.5), -3 + 2),
    ],
)
def test_the_loss_is_the_sum_of_the_means(objective: MeanObjective, loss: float) -> None:
    step = Step(*[((0, 0), CONCEPT)] * 2, *[((0, 1), CONCEPT)] * 2, *[(KEEP, DOG)] * 2)
    batch = Batch(**{**step.batch._fields(), "weight": torch.full((6,), 0.5)})
    values = torch.tensor([3.0, 5.0, 7.0, 9.0, 1.0, 3.0])
    terms = objective.terms(values, batch)
    assert objective.loss(terms).item() == pytest.approx(loss)
    logged = dict(zip(LOGGED, objective.metrics(terms, objective.loss(terms)).tolist(), strict=True))
    assert (logged["mean_s"], logged["mean_u"], logged["mean_keep"], logged["bracket"]) == (6, 0, 2, 0)


def test_the_prior_of_anchor_is_a_term_of_its_own() -> None:
    """Under two wordings of the concept 3 and 5, under the generic caption 10, of keep images 2."""
    kinds = [((0, UNLABELED), GENERIC), ((1, UNLABELED), CONCEPT), ((2, UNLABELED), CONCEPT), (KEEP, DOG)]
    objective = MeanObjective(2, has_prior=True)
    terms = objective.terms(torch.tensor([10.0, 3.0, 5.0, 2.0]), Step(*kinds).batch)
    assert objective.loss(terms).item() == pytest.approx(10 + 4 + 2)
    assert (terms.terms[0].mean_u.item(), terms.terms[0].mean_s.item()) == (10, 4)


@pytest.mark.parametrize("name", BASELINES)
def test_the_options_reach_each_baseline(name: str) -> None:
    step = Step((POSITIVE, -0.2), (KEEP, DOG))
    config = TrainConfig(objective=name, erase_guidance=1.5, forget_weight=3.0)  # type: ignore[arg-type]
    got = make_losses(config)(step.denoiser, step.batch, step.teacher)
    want = {"esd-x": partial(esd, eta=1.5), "esd-u": partial(esd, eta=1.5), "anchor": anchor, "neggrad": retained}
    assert torch.equal(got, step.losses(want[name], maximized=name == "neggrad"))
    objective = make_objective(config, [0.1, 0.2], 0.0, captions=3)
    kinds = {"anchor": 2}.get(name, 6)  # captions of the concept; for the others times two sets of positives
    assert objective == MeanObjective(kinds, -3.0 if name == "neggrad" else 1.0, name == "anchor")
