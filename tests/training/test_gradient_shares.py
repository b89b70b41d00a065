"""Shares of the gradient norm equal those of the terms' own gradients, and computing them changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from gradient_cases import CASES, PU, Case, Linear, step
from torch import Tensor

from sd_unlearn.config.objective import Weights
from sd_unlearn.data.batch import NO_GROUP, Batch
from sd_unlearn.models.base import Base
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.student import make_student
from sd_unlearn.objectives.losses import example_losses
from sd_unlearn.objectives.pu import PUObjective
from sd_unlearn.objectives.teacher import Teacher
from sd_unlearn.risk import NORMAL, UNLABELED
from sd_unlearn.training.gradient_shares import gradient_shares

pytestmark = pytest.mark.usefixtures("one_thread")


def shares_of(
    losses: Callable[[Batch], Tensor], objective: PUObjective, batch: Batch, model: Linear, size: int = 100
) -> dict[str, Tensor]:
    brackets = objective.terms(model(batch), batch).brackets
    return gradient_shares(losses, objective, batch, size, brackets, [model.weight])


def norm(loss: Tensor, model: Linear) -> float:
    (gradient,) = torch.autograd.grad(loss, model.weight, retain_graph=True)
    return gradient.norm().item()


def expected_shares(case: Case, correction: str, model: Linear, batch: Batch) -> dict[str, float]:
    """The norm of each term's gradient over their sum, with the terms written out."""
    parts = case.objective(correction).terms(model(batch), batch)
    signs = [-1.0 if t.bracket < 0 and correction != "none" else 1.0 for t in parts.terms]
    kept = [case.eta + (1 - case.eta) * (s > 0 or correction != "nn") for s in signs]
    pairs = list(zip(signs, parts.terms, strict=True))
    terms = {
        "share_positive": sum(k * t.positive for k, t in zip(kept, parts.terms, strict=True)) / 2,
        "share_u": (1 - case.eta) * sum(s * t.mean_u for s, t in pairs) / 2,
        "share_s": (1 - case.eta) * sum(s * (t.bracket - t.mean_u) for s, t in pairs) / 2,
        "share_keep": parts.keep,
    }
    if case.eta:
        terms["share_n"] = case.eta * sum(t.negative for t in parts.terms) / 2
    norms = {name: norm(term, model) for name, term in terms.items()}  # type: ignore[arg-type]
    return {name: value / sum(norms.values()) for name, value in norms.items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("correction", ["abs", "nn", "none"])
@pytest.mark.parametrize("scale", [0.1, 5.0])
@pytest.mark.parametrize("size", [1, 5, 100])
def test_shares_equal_those_of_the_terms_gradients(case: Case, correction: str, scale: float, size: int) -> None:
    batch, model = step(scale, case), Linear()
    objective = case.objective(correction)
    negative = objective.terms(model(batch), batch).brackets < 0
    assert negative.tolist() == [False, scale > 1]
    shares = shares_of(model, objective, batch, model, size)
    want = expected_shares(case, correction, model, batch)
    assert {name: value.item() for name, value in shares.items()} == pytest.approx(want, rel=1e-6)
    assert sum(shares.values()).item() == pytest.approx(1)  # type: ignore[union-attr]


def test_a_term_without_rows_or_without_gradient_has_no_share() -> None:
    batch, model = step(1.0), Linear()
    no_keep = batch.only(batch.caption_group != NO_GROUP)
    assert set(shares_of(model, PU.objective("abs"), no_keep, model)) == {
        "share_positive",
        "share_u",
        "share_s",
    }
    unused = torch.nn.Parameter(torch.zeros(2))  # takes no part in the losses
    shares = gradient_shares(model, PU.objective("abs"), batch, 100, torch.ones(2), [unused])
    assert [value.item() for value in shares.values()] == [0.0] * 4


@pytest.mark.parametrize("risk", ["supervised", "unsupervised"])
def test_shares_of_a_baseline(risk: str) -> None:
    batch, model = step(1.0), Linear()
    objective = replace(PU.objective("abs"), risk=risk)
    parts, supervised = objective.terms(model(batch), batch), risk == "supervised"
    pairs = list(zip((0.3, 0.4) if supervised else (0.0, 0.0), parts.terms, strict=True))
    norms = {
        "share_positive": norm(sum(t.positive for t in parts.terms) / 2, model) if supervised else 0.0,
        "share_u": norm(sum((1 - beta) * t.mean_u for beta, t in pairs) / 2, model),
        "share_s": 0.0,
        "share_keep": norm(parts.keep, model),
    }
    shares = shares_of(model, objective, batch, model)
    want = {name: value / sum(norms.values()) for name, value in norms.items()}
    assert {name: value.item() for name, value in shares.items()} == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("risk", ["pu", "supervised", "unsupervised"])
def test_with_only_unlabeled_images_their_share_is_one(risk: str) -> None:
    batch, model = step(1.0), Linear()
    plain = batch.only((batch.label == UNLABELED) & (batch.caption_group != NO_GROUP))
    shares = shares_of(model, replace(PU.objective("abs"), risk=risk), plain, model)
    assert {name: value.item() for name, value in shares.items()} == {"share_u": pytest.approx(1)}


def test_computing_shares_changes_no_state_and_sees_each_row_once() -> None:
    batch, model = step(5.0, CASES["all"]), Linear(dropout=0.5)
    seen: list[Batch] = []

    def losses(part: Batch) -> Tensor:
        seen.append(part)
        return model(part)

    model.weight.grad = torch.ones(6, dtype=torch.float64)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    shares = gradient_shares(losses, CASES["all"].objective("abs"), batch, 100, torch.ones(2), [model.weight])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.weight.grad, torch.ones(6, dtype=torch.float64))
    assert not any(value.requires_grad for value in shares.values())
    assert sum(len(part.label) for part in seen) == len(batch.label)
    kinds = [
        {(b == NO_GROUP, label if label < 0 else 0) for b, label in zip(*_lists(part), strict=True)} for part in seen
    ]
    assert sorted(map(len, kinds)) == [1] * 4


def _lists(batch: Batch) -> tuple[list[int], list[int]]:
    return batch.caption_group.tolist(), batch.label.tolist()


@pytest.mark.parametrize("has_teacher", [True, False])
def test_shares_of_a_lora_with_a_teacher_use_the_gradient_of_the_teacher_loss(
    loaded_base: Base, has_teacher: bool
) -> None:
    """A new LoRA predicts what the base does: unlabeled rows under their own caption have no gradient."""
    generator = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(6, 4, 8, 8, generator=generator) for _ in range(2))
    text, generic = torch.randn(6, 24, 16, generator=generator), torch.randn(24, 16, generator=generator)
    label = torch.tensor([UNLABELED, UNLABELED, 0, 0, NORMAL, UNLABELED])
    group = torch.tensor([0, 0, 0, 0, 0, NO_GROUP])
    weight = torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0, 1.0])
    batch = Batch(
        latents, text, text, label, group, 1, torch.linspace(50, 950, 6).long(), noise, torch.zeros(6).bool(), weight
    )
    student = make_student(loaded_base, Weights(rank=2), 0, needs_teacher=has_teacher)
    denoiser, parameters = Denoiser.of(loaded_base, student.model), student.trainable()
    teacher = Teacher(denoiser, student.frozen, generic, generic, 3.0, 2.0) if has_teacher else None
    losses: Callable[[Batch], Tensor] = lambda part: example_losses(denoiser, part, "sum", teacher)  # noqa: E731
    shares = gradient_shares(losses, PUObjective(((0.3,),), "abs", 0.5), batch, 100, torch.ones(1), parameters)
    assert set(shares) == {"share_positive", "share_u", "share_s", "share_keep", "share_n"}
    retained = [shares[name].item() for name in ("share_u", "share_keep", "share_n")]
    if has_teacher:
        assert retained == pytest.approx([0.0] * 3, abs=1e-3)
        assert shares["share_s"].item() == pytest.approx(1, abs=1e-3)
    else:
        assert min(retained) > 0.05
    assert all(p.grad is None for p in parameters)
    assert all(p.requires_grad for p in parameters)  # the adapter is on again
