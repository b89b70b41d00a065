"""The fused change of a layer, by what it is meant to do with the inputs of each LoRA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sd_unlearn.objectives.closed_form import Edit
from sd_unlearn.objectives.fusing import RIDGE, least_squares, least_squares_in_span, summed

pytestmark = pytest.mark.usefixtures("one_thread")
OUT, IN = 5, 8


def edits(count: int = 2, rank: int = 2) -> list[Edit]:
    rng = torch.Generator().manual_seed(0)
    made = [(torch.randn(OUT, rank, generator=rng), torch.randn(rank, IN, generator=rng)) for _ in range(count)]
    return [Edit(up.double(), down.double()) for up, down in made]


def whole(edit: Edit) -> Tensor:
    return edit.up @ edit.down


def fuse(pair: list[Edit], own: list[Tensor], kept: Tensor, weight: float = 1.0) -> Edit:
    """`least_squares` from the moments of each change's own inputs and of those to keep."""
    effects = [edit.down @ gram.double() for edit, gram in zip(pair, own, strict=True)]
    return least_squares(pair, effects, sum(own) + weight * len(own) * kept)


def gram(*rows: int) -> Tensor:
    """E[x x'] of inputs along some axes."""
    return torch.diag(torch.tensor([float(i in rows) for i in range(IN)]))


def test_the_sum() -> None:
    first, second = edits()
    assert torch.allclose(whole(summed([first, second])), whole(first) + whole(second))


def test_each_effect_stays_on_its_own_inputs_and_none_on_kept_ones() -> None:
    first, second = edits()
    fused = whole(fuse([first, second], [gram(0, 1), gram(2, 3)], gram(4, 5)))
    both = whole(first) + whole(second)
    assert torch.allclose(fused[:, :2], whole(first)[:, :2], atol=0.05)
    assert torch.allclose(fused[:, 2:4], whole(second)[:, 2:4], atol=0.05)
    assert fused[:, 4:6].abs().max() < 0.05
    assert torch.allclose(fused[:, 6:], both[:, 6:])  # inputs that nobody showed get the sum
    assert not torch.allclose(both[:, :2], whole(first)[:, :2], atol=0.5)  # which the naive way gets wrong


def example(seed: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs of two changes and of what is kept, and their grams."""
    rng = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(6, IN, generator=rng).double() for _ in range(3)]
    return inputs, [x.T @ x / len(x) for x in inputs]


def objective(change: Tensor, pair: list[Edit], inputs: list[Tensor], weight: float, ridge: Tensor) -> Tensor:
    own = sum(((change - whole(e)) @ x.T).square().sum() / len(x) for e, x in zip(pair, inputs[:2], strict=True))
    kept = 2 * weight * (change @ inputs[2].T).square().sum() / len(inputs[2])
    return own + kept + ridge * (change - whole(summed(pair))).square().sum()


def test_it_is_the_least_squares_solution() -> None:
    (inputs, grams), pair, weight = example(), edits(), 0.7
    ridge = RIDGE * (grams[0] + grams[1] + 2 * weight * grams[2]).diagonal().mean()
    change = whole(fuse(pair, grams[:2], grams[2], weight)).requires_grad_()
    (slope,) = torch.autograd.grad(objective(change, pair, inputs, weight, ridge), change)
    assert slope.abs().max() < 1e-9


def test_in_the_span_it_is_the_least_squares_solution_among_those_of_the_downs() -> None:
    (inputs, grams), pair, weight = example(), edits(), 0.7
    downs = summed(pair).down
    seen = [downs @ gram @ downs.T for gram in grams]
    total = seen[0] + seen[1] + 2 * weight * seen[2]
    ridge = RIDGE * total.diagonal().mean() / (downs @ downs.T).diagonal().mean()
    fused = least_squares_in_span(pair, seen[:2], total)
    assert torch.equal(fused.up, summed(pair).up)
    mixing = (fused.down @ torch.linalg.pinv(downs)).requires_grad_()
    change = fused.up @ mixing @ downs
    assert torch.allclose(change, whole(fused))
    (slope,) = torch.autograd.grad(objective(change, pair, inputs, weight, ridge), mixing)
    assert slope.abs().max() < 1e-8


def test_in_the_span_downs_that_agree_are_no_trouble() -> None:
    first, second = edits()
    same = [first, Edit(second.up, first.down)]
    downs = summed(same).down
    seen = downs @ gram(0, 1, 2).double() @ downs.T
    fused = whole(least_squares_in_span(same, [seen, seen], 2 * seen))
    assert torch.allclose(fused, whole(summed(same)) / 2, atol=0.02 * whole(first).abs().max())


def test_the_rank_is_the_sum_of_the_ranks() -> None:
    fused = fuse(edits(3, 1), [gram(0), gram(1), gram(2)], gram(3))
    assert torch.linalg.matrix_rank(whole(fused)) == 3
    assert torch.allclose(whole(fused.of_rank(3)), whole(fused))
    assert torch.linalg.matrix_rank(whole(fused.of_rank(1))) == 1
