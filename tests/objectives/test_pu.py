"""The PU objective of a step: one risk per caption group, the plain loss for keep images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sd_unlearn.data.batch import NO_GROUP, Batch
from sd_unlearn.objectives.base import LOGGED
from sd_unlearn.objectives.pu import PUObjective, bounded, limits
from sd_unlearn.risk import (
    NORMAL,
    UNLABELED,
    PUTerms,
    corrected,
    pnu_risk,
    pu_risk,
    pu_terms,
    several_pu_risk,
    supervised_risk,
    unsupervised_risk,
)

pytestmark = pytest.mark.usefixtures("one_thread")
BETA = 0.2
#        first group (bracket > 0), second group (bracket < 0), keep
GROUP = [0, 0, 0, 0, 1, 1, 1, 1, NO_GROUP, NO_GROUP, NO_GROUP]
POSITIVE = [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0]
NLL = torch.tensor([3.0, 5.0, 1.0, 2.0, 3.0, 5.0, 40.0, 60.0, 1.0, 2.0, 6.0], dtype=torch.float64)


def batch(group: list[int], positive: list[int]) -> Batch:
    """positive: 0 for unlabeled images, k + 1 for those of set k, -1 for those known to be normal."""
    zeros = torch.zeros(len(group))
    kinds = list(zip(group, positive, strict=True))
    weight = torch.tensor([1 / kinds.count(kind) for kind in kinds], dtype=torch.float64)
    label, caption_group = torch.tensor(positive) - 1, torch.tensor(group)
    return Batch(zeros, zeros, zeros, label, caption_group, max(group) + 1, zeros, zeros, zeros, weight)


WHOLE = batch(GROUP, POSITIVE)


def loss_of(objective: PUObjective, nll: Tensor, batch: Batch) -> Tensor:
    return objective.loss(objective.terms(nll, batch))


def metrics_of(objective: PUObjective, nll: Tensor, batch: Batch) -> dict[str, float]:
    parts = objective.terms(nll, batch)
    return dict(zip(LOGGED, objective.metrics(parts, objective.loss(parts)).tolist(), strict=True))


def risk_of(group: int, correction: str, nll: Tensor = NLL) -> Tensor:
    here = WHOLE.caption_group == group
    return pu_risk(nll[here], WHOLE.is_positive[here], BETA, correction)  # type: ignore[arg-type]


def terms_of(group: int) -> PUTerms:
    here = WHOLE.caption_group == group
    return pu_terms(NLL[here], WHOLE.label[here], [BETA])


@pytest.mark.parametrize("correction", ["abs", "nn", "none"])
def test_loss_is_the_mean_over_caption_groups_plus_the_keep_images(correction: str) -> None:
    got = loss_of(PUObjective(((BETA,), (BETA,)), correction), NLL, WHOLE)  # type: ignore[arg-type]
    want = (risk_of(0, correction) + risk_of(1, correction)) / 2 + 3.0
    assert got.item() == pytest.approx(want.item())


def test_each_caption_group_has_its_own_sign() -> None:
    """In one group, the bracket of all would be +4 - 0.2 * 25.75 = -1.15."""
    leaf = NLL.clone().requires_grad_()
    loss_of(PUObjective(((BETA,), (BETA,))), leaf, WHOLE).backward()
    gradient = leaf.grad
    assert gradient is not None
    assert gradient[:2].tolist() == pytest.approx([0.25, 0.25])  # bracket > 0: the loss of unlabeled images falls
    assert gradient[4:6].tolist() == pytest.approx([-0.25, -0.25])  # bracket < 0: it rises
    assert gradient[6:8].tolist() == pytest.approx([0.05, 0.05])
    assert gradient[8:].tolist() == pytest.approx([1 / 3] * 3)


def test_each_caption_group_has_its_own_beta() -> None:
    terms = PUObjective(((0.1,), (0.4,))).terms(NLL, WHOLE).terms
    assert [t.bracket.item() for t in terms] == pytest.approx([4 - 0.1 * 1.5, 4 - 0.4 * 50])


def test_one_caption_group_without_keep_images_is_the_pu_risk() -> None:
    alone = batch(GROUP[:4], POSITIVE[:4])
    got = loss_of(PUObjective(((BETA,),)), NLL[:4], alone)
    assert got.item() == pytest.approx(risk_of(0, "abs").item())
    assert metrics_of(PUObjective(((BETA,),)), NLL[:4], alone)["mean_keep"] == 0


def test_metrics_are_means_over_caption_groups_without_gradient() -> None:
    objective = PUObjective(((BETA,), (BETA,)))
    parts = objective.terms(NLL.clone().requires_grad_(), WHOLE)
    assert not objective.metrics(parts, objective.loss(parts)).requires_grad
    assert not parts.brackets.requires_grad
    metrics = metrics_of(objective, NLL, WHOLE)
    assert metrics["mean_u"] == pytest.approx(4)
    assert metrics["mean_s"] == pytest.approx((1.5 + 50) / 2)
    assert metrics["bracket"] == pytest.approx(4 - BETA * (1.5 + 50) / 2)
    assert metrics["mean_keep"] == pytest.approx(3)
    assert metrics["loss"] == pytest.approx(loss_of(objective, NLL, WHOLE).item())
    terms = [terms_of(c) for c in (0, 1)]
    assert metrics["positive_term"] == pytest.approx(sum(t.positive.item() for t in terms) / 2)


@pytest.mark.parametrize("correction", ["abs", "nn"])
def test_the_sign_is_that_of_the_whole_step(correction: str) -> None:
    """Another part makes the first bracket negative: ours uses that sign with the size of its own gradient."""
    objective, leaf = PUObjective(((BETA,), (BETA,)), correction), NLL.clone().requires_grad_()  # type: ignore[arg-type]
    loss = objective.loss(objective.terms(leaf, WHOLE), torch.tensor([-1.0, -1.0]))
    terms = [terms_of(c) for c in (0, 1)]
    want = torch.stack([corrected(t, correction, torch.tensor(-1.0)) for t in terms]).mean() + 3  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(want.item())
    loss.backward()
    assert leaf.grad is not None
    assert leaf.grad[:2].tolist() == pytest.approx([-0.25, -0.25])


def test_minimising_the_loss_moves_both_means_towards_their_equilibrium() -> None:
    """At equilibrium mean_S l = mean_U l / beta."""
    logs = torch.tensor([0.0, 0.0, 0.0, 0.0], requires_grad=True)  # l = exp(logs), free parameters
    optimizer = torch.optim.SGD([logs], lr=0.02)
    target = torch.tensor([1.0, 1.0, 0.0, 0.0])  # unlabeled losses are pulled to e, as by data
    small = batch([0, 0, 0, 0], [0, 0, 1, 1])
    for _ in range(1000):
        optimizer.zero_grad()
        nll = logs.exp()
        pull = ((logs - target)[:2] ** 2).sum() * 20
        (loss_of(PUObjective(((BETA,),)), nll, small) + pull).backward()
        optimizer.step()
    u, s = logs.exp()[:2].mean().item(), logs.exp()[2:].mean().item()
    assert s == pytest.approx(u / BETA, rel=0.1)


#        unlabeled, sets 0 and 1, normal of the first group, then of the second, then keep
ALL = batch([0] * 7 + [1] * 7 + [NO_GROUP], [0, 0, 1, 1, 2, -1, -1] * 2 + [0])
MANY = torch.tensor([3, 5, 1, 2, 0.5, 2, 6, 3, 5, 40, 60, 20, 1, 3, 2], dtype=torch.float64)


@pytest.mark.parametrize("correction", ["abs", "nn", "none"])
def test_each_caption_group_has_the_pnu_risk(correction: str) -> None:
    one_set = ALL.only(ALL.label != 1)
    nll, eta = MANY[ALL.label != 1], 0.4
    risks = []
    for group in (0, 1):
        here = one_set.caption_group == group
        positive, normal = one_set.is_positive[here], one_set.label[here] == NORMAL
        risks.append(pnu_risk(nll[here], positive, normal, BETA, eta, correction).item())  # type: ignore[arg-type]
    objective = PUObjective(((BETA,), (BETA,)), correction, eta)  # type: ignore[arg-type]
    assert loss_of(objective, nll, one_set).item() == pytest.approx(sum(risks) / 2 + 2)
    assert metrics_of(objective, nll, one_set)["mean_n"] == pytest.approx((4 + 2) / 2)
    signs = objective.terms(nll, one_set).brackets < 0
    assert signs.tolist() == [False, True]


@pytest.mark.parametrize("correction", ["abs", "nn", "none"])
def test_sets_of_positives_share_one_bracket(correction: str) -> None:
    betas = (0.2, 0.3)
    unlabeled_or_positive = ALL.label != NORMAL
    several = ALL.only(unlabeled_or_positive)
    nll = MANY[unlabeled_or_positive]
    risks = [
        several_pu_risk(
            nll[several.caption_group == b], several.label[several.caption_group == b], betas, correction
        ).item()  # type: ignore[arg-type]
        for b in (0, 1)
    ]
    objective = PUObjective((betas, betas), correction)  # type: ignore[arg-type]
    assert loss_of(objective, nll, several).item() == pytest.approx(sum(risks) / 2 + 2)
    assert objective.terms(nll, several).brackets.tolist() == pytest.approx([4 - 0.3 - 0.15, 4 - 10 - 6])


def test_normal_images_do_not_count_at_eta_zero() -> None:
    leaf = MANY.clone().requires_grad_()
    loss_of(PUObjective(((0.2, 0.3),) * 2), leaf, ALL).backward()
    assert leaf.grad is not None
    assert (leaf.grad[ALL.label == NORMAL] == 0).all()
    assert (leaf.grad[ALL.label != NORMAL] != 0).all()


# A bound on how far positives are pushed

# Positives with reference images at their timestep; at 30 the only one is in another caption group
PAIRED = replace(WHOLE, timesteps=torch.tensor([10, 20, 10, 30, 30, 20, 20, 20, 10, 20, 30]))
#                  U        U        S at 10, S at 30    U of the other group, S at 20 twice    keep
NLL_OF_PAIRS = torch.tensor([3.0, 5.0, 100.0, 100.0, 3.0, 5.0, 9.0, 60.0, 1.0, 2.0, 6.0], dtype=torch.float64)


def test_positives_far_above_their_reference_are_not_pushed_further() -> None:
    leaf = NLL_OF_PAIRS.clone().requires_grad_()
    found = bounded(leaf, limits(leaf, PAIRED, 4.0))
    assert found.tolist() == [3, 5, 12, 100, 3, 5, 9, 20, 1, 2, 6]  # 4 * 3, no reference at 30, below the cap, 4 * 5
    found.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1]  # the cap gives unlabeled images no gradient


def test_the_reference_is_the_mean_at_the_same_timestep() -> None:
    both = replace(WHOLE, timesteps=torch.full((11,), 7))
    assert bounded(NLL_OF_PAIRS, limits(NLL_OF_PAIRS, both, 2.0)).tolist() == [3, 5, 8, 8, 3, 5, 8, 8, 1, 2, 6]


def test_only_positives_are_capped() -> None:
    same_timestep = replace(ALL, timesteps=torch.zeros(len(MANY), dtype=torch.long))
    changed = bounded(MANY, limits(MANY, same_timestep, 1.0)) != MANY
    assert changed.any()
    assert (changed <= same_timestep.is_positive).all()


@pytest.mark.parametrize("correction", ["abs", "nn", "none"])
def test_a_bounded_bracket_of_pairs_is_never_negative(correction: str) -> None:
    """With max_ratio below 1 / beta, all corrections are the same."""
    pairs = replace(batch([0, 0, 0, 0], [0, 0, 1, 1]), timesteps=torch.tensor([1, 2, 1, 2]))
    nll = torch.tensor([3.0, 5.0, 900.0, 4000.0], dtype=torch.float64)
    objective = PUObjective(((BETA,),), correction, max_ratio=4.0)  # type: ignore[arg-type]
    assert PUObjective(((BETA,),)).terms(nll, pairs).brackets.item() < 0
    assert objective.terms(nll, pairs).brackets.item() == pytest.approx((1 - 4 * BETA) * 4)
    uncorrected = PUObjective(((BETA,),), "none", max_ratio=4.0)
    assert loss_of(objective, nll, pairs).item() == loss_of(uncorrected, nll, pairs).item()


# The baselines of the paper


@pytest.mark.parametrize("signs", [None, torch.tensor([-1.0, 1.0])])
def test_supervised_is_its_risk_in_each_caption_group_whatever_the_signs(signs: Tensor | None) -> None:
    objective = PUObjective(((0.1,), (0.4,)), risk="supervised")
    parts = objective.terms(NLL, WHOLE)
    risks = []
    for group, beta in enumerate((0.1, 0.4)):
        here = WHOLE.caption_group == group
        risks.append(supervised_risk(NLL[here], WHOLE.is_positive[here], beta).item())
    assert objective.loss(parts, signs).item() == pytest.approx(sum(risks) / 2 + 3)
    assert objective.same_signs(torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 1.0]))


def test_supervised_uses_all_sets() -> None:
    several, nll = ALL.only(ALL.label != NORMAL), MANY[ALL.label != NORMAL]
    parts = PUObjective(((0.2, 0.3),) * 2, risk="supervised").terms(nll, several)
    terms = [
        pu_terms(nll[several.caption_group == b], several.label[several.caption_group == b], (0.2, 0.3)) for b in (0, 1)
    ]
    want = sum(0.5 * t.mean_u.item() + t.positive.item() for t in terms) / 2 + 2
    assert PUObjective(((0.2, 0.3),) * 2, risk="supervised").loss(parts).item() == pytest.approx(want)


def test_unsupervised_is_the_unlabeled_mean_without_positives() -> None:
    objective = PUObjective(((BETA,), (BETA,)), risk="unsupervised")
    leaf = NLL.clone().requires_grad_()
    loss = loss_of(objective, leaf, WHOLE)
    loss.backward()
    here = WHOLE.caption_group != NO_GROUP
    assert loss.item() == pytest.approx(unsupervised_risk(NLL[here], WHOLE.is_positive[here]).item() + 3)
    assert leaf.grad is not None
    assert (leaf.grad[WHOLE.is_positive] == 0).all()
    assert (leaf.grad[~WHOLE.is_positive] > 0).all()


@pytest.mark.parametrize("risk", ["supervised", "unsupervised"])
def test_a_baseline_logs_the_same_metrics_as_pu(risk: str) -> None:
    of_baseline = metrics_of(PUObjective(((BETA,), (BETA,)), risk=risk), NLL, WHOLE)  # type: ignore[arg-type]
    of_pu = metrics_of(PUObjective(((BETA,), (BETA,))), NLL, WHOLE)
    assert of_baseline.pop("loss") != of_pu.pop("loss")
    assert of_baseline == of_pu


@pytest.mark.parametrize("risk", ["pu", "supervised", "unsupervised"])
@pytest.mark.parametrize("betas", [(), (BETA,)])
def test_a_batch_without_positives(risk: str, betas: tuple[float, ...]) -> None:
    plain = WHOLE.only(WHOLE.label == UNLABELED)
    objective = PUObjective((betas, betas), risk=risk)  # type: ignore[arg-type]
    metrics = metrics_of(objective, NLL[WHOLE.label == UNLABELED], plain)
    assert (metrics["mean_s"], metrics["positive_term"], metrics["bracket"]) == (0, 0, pytest.approx(4))
    scale = 1 - sum(betas) if risk == "supervised" else 1
    assert metrics["loss"] == pytest.approx(4 * scale + 3)
