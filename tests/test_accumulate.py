"""One step's gradient, whole or cut: equal to 1e-5, also where the parts' own signs differ from the whole's."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sd_unlearn.batches import PLAIN, Batch
from sd_unlearn.objectives.accumulate import accumulate_gradients
from sd_unlearn.objectives.pu import LOGGED, PUObjective
from sd_unlearn.risk import NORMAL, UNLABELED, Risk

pytestmark = pytest.mark.usefixtures("one_thread")
KEEP = [(PLAIN, UNLABELED)] * 8


def kinds(*labels: int) -> list[tuple[int, int]]:
    """(bracket, label) of a step: eight unlabeled images in each bracket, four of each other label, then keep."""
    brackets = [[(b, UNLABELED)] * 8 + [(b, label) for label in labels for _ in range(4)] for b in (0, 1)]
    return [*brackets[0], *brackets[1], *KEEP]


@dataclass(frozen=True)
class Case:
    """An objective and the images it is about."""

    kinds: list[tuple[int, int]]
    betas: tuple[tuple[float, ...], ...]
    eta: float = 0.0
    risk: Risk = "pu"

    def objective(self, correction: str) -> PUObjective:
        return PUObjective(self.betas, correction, self.eta, self.risk)  # type: ignore[arg-type]


PU = Case(kinds(0), ((0.3,), (0.4,)))
CASES = {
    "pu": PU,
    "pnu": Case(kinds(0, NORMAL), ((0.3,), (0.4,)), eta=0.35),
    "sets": Case(kinds(0, 1), ((0.1, 0.2), (0.3, 0.1))),
    "all": Case(kinds(0, 1, NORMAL), ((0.1, 0.2), (0.3, 0.1)), eta=0.35),
}
TWO_PROCESSES = {name: CASES[name] for name in ("pu", "all")} | {"supervised": replace(PU, risk="supervised")}


class Linear(nn.Module):
    """l = (w . x)^2 + dropout's share of it: some network with a loss for every example."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch: Batch) -> Tensor:
        return (self.dropout(batch.latents) @ self.weight).square()


def step(parts: int, scale: float, case: Case = PU) -> list[Batch]:
    """A step's batch in parts. Positives of the second bracket are `scale` as large in every other image, so that
    the sign of its bracket differs from part to part."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(case.kinds), 6, generator=generator, dtype=torch.float64)
    bracket, label = torch.tensor(case.kinds).T
    order = torch.tensor([case.kinds[:n].count(kind) for n, kind in enumerate(case.kinds)])
    x[(bracket == 1) & (label == 0) & (order % 2 == 1)] *= scale
    count = torch.tensor([case.kinds.count(kind) for kind in case.kinds])
    whole = Batch(
        x, x, x, label, bracket, 2, order, x, torch.zeros_like(order).bool(), (parts / count).double()
    )  # fmt: skip
    return [whole.only(order % parts == part) for part in range(parts)]


def gradient(
    parts: int, scale: float, correction: str, assumed: Tensor | None = None, dropout: float = 0.0, case: Case = PU
) -> tuple[Tensor, dict[str, float], Tensor]:
    model, objective, batches = Linear(dropout), case.objective(correction), step(parts, scale, case)
    torch.manual_seed(0)
    logs, brackets = accumulate_gradients(Accelerator(cpu=True), model, model, objective, batches, assumed)
    assert model.weight.grad is not None
    return model.weight.grad, dict(zip(LOGGED, logs.tolist(), strict=True)), brackets


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_parts_here_differ_in_sign(case: Case) -> None:
    objective, model = case.objective("abs"), Linear()
    brackets = torch.stack([objective.terms(model(batch), batch).brackets for batch in step(4, 5.0, case)])
    assert (brackets[:, 1] < 0).any()
    assert (brackets[:, 1] > 0).any()
    assert brackets.mean(0)[1] < 0 < brackets.mean(0)[0]


@pytest.mark.parametrize("correction", ["abs", "nn", "none"])
@pytest.mark.parametrize(("parts", "scale"), product([2, 4], [0.1, 5.0]))
@pytest.mark.parametrize("assumed", [None, (1.0, -1.0), (-1.0, 1.0)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_micro_batches_give_the_whole_batchs_gradient(
    parts: int, scale: float, correction: str, assumed: tuple[float, float] | None, case: Case
) -> None:
    """Whatever was assumed of the signs before."""
    before = None if assumed is None else torch.tensor(assumed)
    want, logs, brackets = gradient(1, scale, correction, case=case)
    got, cut_logs, cut_brackets = gradient(parts, scale, correction, before, case=case)
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)
    assert torch.allclose(cut_brackets, brackets)
    assert cut_logs == pytest.approx(logs, rel=1e-5)


@pytest.mark.parametrize("risk", ["supervised", "unsupervised"])
@pytest.mark.parametrize("scale", [0.1, 5.0])
def test_micro_batches_of_a_baseline_are_gone_through_once(risk: str, scale: float) -> None:
    """No sign decides its gradient, so none is asked for again."""
    found = []
    for parts in (1, 4):
        model, seen = Linear(), []
        objective = replace(PU.objective("abs"), risk=risk)

        def losses(batch: Batch, model: Linear = model, seen: list[Batch] = seen) -> Tensor:
            seen.append(batch)
            return model(batch)

        batches, assumed = step(parts, scale), torch.tensor([-1.0, -1.0])
        logs, _ = accumulate_gradients(Accelerator(cpu=True), model, losses, objective, batches, assumed)
        assert len(seen) == parts
        assert model.weight.grad is not None
        found.append((model.weight.grad, logs))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-9, atol=1e-12)
    assert found[0][1].tolist() == pytest.approx(found[1][1].tolist(), rel=1e-5)


def test_a_second_pass_sees_the_same_dropout() -> None:
    _, _, brackets = gradient(4, 5.0, "abs", dropout=0.5)
    once, twice = (gradient(4, 5.0, "abs", assumed, dropout=0.5) for assumed in (brackets, -brackets))
    assert torch.equal(once[0], twice[0])
    assert once[1] == twice[1]


@pytest.mark.parametrize("correction", ["abs", "nn"])
def test_two_processes_give_the_whole_batchs_gradient(correction: str, tmp_path: Path) -> None:
    """Real ones, over gloo, one and two micro-batches each; the parts' own signs differ from the whole's."""
    # torchrun, because `accelerate launch --cpu --num_processes 2` starts a single process unless mpirun is there
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, __file__, correction, str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    for name, case in TWO_PROCESSES.items():
        want, logs, _ = gradient(1, 5.0, correction, case=case)
        for micro_batches in (1, 2):
            found = tmp_path / f"{name}-{micro_batches}.pt"
            assert found.is_file(), done.stderr
            got, cut_logs = torch.load(found)
            assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)
            assert dict(zip(LOGGED, cut_logs.tolist(), strict=True)) == pytest.approx(logs, rel=1e-5)


def one_of_two_processes(correction: str, folder: str) -> None:
    """What `accelerate launch` runs: this file."""
    accelerator = Accelerator(cpu=True)
    for (name, case), micro_batches in product(TWO_PROCESSES.items(), (1, 2)):
        model = accelerator.prepare(Linear())
        mine = step(2 * micro_batches, 5.0, case)[accelerator.process_index :: 2]
        logs, _ = accumulate_gradients(accelerator, model, model, case.objective(correction), mine, None)
        if accelerator.is_main_process:
            assert accelerator.num_processes == 2
            torch.save((model.module.weight.grad, logs), f"{folder}/{name}-{micro_batches}.pt")
    accelerator.wait_for_everyone()
    os._exit(0)  # all is saved: what gloo's threads do to each other while Python shuts down is no concern of ours


def test_signs_of_single_parts_would_give_another_gradient() -> None:
    """What this module is for: |R| of each micro-batch is not |R| of the step."""
    model, objective = Linear(), PU.objective("abs")
    for batch in step(4, 5.0):
        (objective.loss(objective.terms(model(batch), batch)) / 4).backward()
    want, _, _ = gradient(1, 5.0, "abs")
    assert model.weight.grad is not None
    assert (model.weight.grad - want).norm() > 0.1 * want.norm()


if __name__ == "__main__":
    one_of_two_processes(*sys.argv[1:])
