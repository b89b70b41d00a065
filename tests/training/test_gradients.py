"""The gradient of a step is the same whole or split, also where the parts' own signs differ from the whole's."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from accelerate import Accelerator
from gradient_cases import ALL_CASES, CAPPED, CASES, PU, Case, Linear, step
from gradient_pair import PLANNED, TWO_PROCESSES, one_of_two_processes
from torch import Tensor

from sd_unlearn.data.batch import Batch
from sd_unlearn.objectives.base import LOGGED
from sd_unlearn.training import gradients
from sd_unlearn.training.gradients import accumulate_gradients

pytestmark = pytest.mark.usefixtures("one_thread")


WHOLE = 100  # images at once, more than any step has


def gradient(
    size: int, scale: float, correction: str, assumed: Tensor | None = None, dropout: float = 0.0, case: Case = PU
) -> tuple[Tensor, dict[str, float], Tensor]:
    model, objective = Linear(dropout), case.objective(correction)
    torch.manual_seed(0)
    logs, brackets = accumulate_gradients(
        Accelerator(cpu=True), model, model, objective, step(scale, case), size, assumed
    )
    assert model.weight.grad is not None
    return model.weight.grad, dict(zip(LOGGED, logs.tolist(), strict=True)), brackets


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_parts_of_these_cases_differ_in_sign(case: Case) -> None:
    objective, model = case.objective("abs"), Linear()
    parts = step(5.0, case).cut(len(case.kinds) // 4)
    assert len(parts) == 4
    brackets = torch.stack([objective.terms(model(batch), batch).brackets for batch in parts])
    assert (brackets[:, 1] < 0).any()
    assert (brackets[:, 1] > 0).any()
    assert brackets.sum(0)[1] < 0 < brackets.sum(0)[0]


@pytest.mark.parametrize("correction", ["abs", "nn", "none"])
@pytest.mark.parametrize(("size", "scale"), product([1, 2, 5, 17], [0.1, 5.0]))
@pytest.mark.parametrize("assumed", [None, (1.0, -1.0), (-1.0, 1.0)])
@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES)
def test_micro_batches_of_any_size_give_the_gradient_of_the_whole_batch(
    size: int, scale: float, correction: str, assumed: tuple[float, float] | None, case: Case
) -> None:
    """Whatever signs were assumed, and although micro-batches of one image hold one kind of image."""
    before = None if assumed is None else torch.tensor(assumed)
    want, logs, brackets = gradient(WHOLE, scale, correction, case=case)
    got, cut_logs, cut_brackets = gradient(size, scale, correction, before, case=case)
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)
    assert torch.allclose(cut_brackets, brackets)
    assert cut_logs == pytest.approx(logs, rel=1e-5)


def test_the_cap_changes_this_gradient() -> None:
    """Otherwise its case above would test nothing."""
    got, plain = (gradient(5, 5.0, "abs", case=ALL_CASES[name])[0] for name in ("capped", "pu"))
    assert (got - plain).norm() > 0.1 * plain.norm()


@pytest.mark.parametrize("risk", ["supervised", "unsupervised"])
@pytest.mark.parametrize("scale", [0.1, 5.0])
def test_micro_batches_of_a_baseline_need_one_pass(risk: str, scale: float) -> None:
    """No sign affects its gradient, so the step is never repeated."""
    found = []
    for parts in (1, 4):
        model, seen = Linear(), []
        objective = replace(PU.objective("abs"), risk=risk)

        def losses(batch: Batch, model: Linear = model, seen: list[Batch] = seen) -> Tensor:
            seen.append(batch)
            return model(batch)

        size, assumed = len(PU.kinds) // parts, torch.tensor([-1.0, -1.0])
        logs, _ = accumulate_gradients(Accelerator(cpu=True), model, losses, objective, step(scale), size, assumed)
        assert len(seen) == parts
        assert model.weight.grad is not None
        found.append((model.weight.grad, logs))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-9, atol=1e-12)
    assert found[0][1].tolist() == pytest.approx(found[1][1].tolist(), rel=1e-5)


def test_a_repeated_step_has_the_same_dropout() -> None:
    _, _, brackets = gradient(8, 5.0, "abs", dropout=0.5)
    once, twice = (gradient(8, 5.0, "abs", assumed, dropout=0.5) for assumed in (brackets, -brackets))
    assert torch.equal(once[0], twice[0])
    assert once[1] == twice[1]


@pytest.mark.parametrize("correction", ["abs", "nn"])
def test_two_processes_give_the_gradient_of_the_whole_batch(correction: str, tmp_path: Path) -> None:
    """Real processes over gloo with one and two micro-batches each; the parts' own signs differ from the whole's."""
    outputs = forked.run_pair(one_of_two_processes, correction, str(tmp_path), name=str(tmp_path / "pair"))
    for name, case in TWO_PROCESSES.items():
        want, logs, _ = gradient(WHOLE, 5.0, correction, case=case)
        for micro_batches in (1, 2):
            found = tmp_path / f"{name}-{micro_batches}.pt"
            assert found.is_file(), outputs
            got, cut_logs = torch.load(found)
            assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)
            assert dict(zip(LOGGED, cut_logs.tolist(), strict=True)) == pytest.approx(logs, rel=1e-5)
    assert (tmp_path / "out-of-memory").is_file(), outputs
    assert (tmp_path / "batching-0").read_text() == (tmp_path / "batching-1").read_text() == repr(PLANNED[1])


@pytest.mark.parametrize("case", [CAPPED, PU], ids=["capped", "pu"])
def test_processes_communicate_as_often_however_many_micro_batches_they_have(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first processes of an uneven step have an image more, and may need a micro-batch more than the others."""
    counts, original = [], gradients.together
    monkeypatch.setattr(type(Accelerator(cpu=True)), "num_processes", 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: SimpleNamespace(wait=lambda: None))
    monkeypatch.setattr("accelerate.utils.operations.reduce", lambda tensor, *_, **__: tensor)
    monkeypatch.setattr("accelerate.accelerator.reduce", lambda tensor, *_, **__: tensor)
    for size in (WHOLE, 5):
        calls: list[object] = []
        monkeypatch.setattr(gradients, "together", lambda a, f, calls=calls: (calls.append(f), original(a, f))[1])
        objective, model = case.objective("none"), Linear()
        accumulate_gradients(Accelerator(cpu=True), model, model, objective, step(0.1, case), size, None)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def test_signs_of_single_parts_would_give_a_wrong_gradient() -> None:
    """|R| of each micro-batch is not |R| of the step."""
    model, objective = Linear(), PU.objective("abs")
    for batch in step(5.0).cut(8):
        objective.loss(objective.terms(model(batch), batch)).backward()
    want, _, _ = gradient(WHOLE, 5.0, "abs")
    assert model.weight.grad is not None
    assert (model.weight.grad - want).norm() > 0.1 * want.norm()
