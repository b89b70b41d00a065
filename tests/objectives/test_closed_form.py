"""Closed-form edits, checked on numbers small enough for paper, and by what defines them."""

from __future__ import annotations

import pytest
import torch

from sd_unlearn.objectives.closed_form import Edit, null_space, rece, returning_embedding, speed, uce

WEIGHT = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, -1.0]])
E1, E2 = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_uce_by_hand() -> None:
    """One concept e1 with anchor e2, nothing preserved, lam 0.5: the first column becomes (0.5 w1 + w2) / 1.5."""
    edited = uce([WEIGHT], E1, E2, torch.zeros(0, 2))[0].apply(WEIGHT)
    assert torch.allclose(edited[:, 0], ((0.5 * WEIGHT[:, 0] + WEIGHT[:, 1]) / 1.5).double())
    assert torch.allclose(edited[:, 1], WEIGHT[:, 1].double())


@pytest.mark.parametrize("own_weight", [1.0, 10.0])
def test_uce_is_the_formula_of_the_paper(own_weight: float) -> None:
    """With `erase_weight` 1."""
    weight, concepts, anchors, preserved = random(5, 4), random(2, 4), random(2, 4) + 1, random(3, 4)
    lam = 0.7
    first = lam * weight + own_weight * weight @ anchors.T @ concepts + weight @ preserved.T @ preserved
    second = lam * torch.eye(4, dtype=torch.float64) + own_weight * concepts.T @ concepts + preserved.T @ preserved
    (edit,) = uce([weight], concepts, anchors, preserved, own_weight, lam)
    assert torch.allclose(edit.apply(weight), first @ torch.linalg.inv(second))
    assert edit.up.shape == (5, 2)
    assert edit.down.shape == (2, 4)
    singular = torch.linalg.svdvals(edit.up @ edit.down)
    assert (singular[2:] < 1e-12).all()  # its rank is the number of concepts


def test_uce_minimizes_its_loss() -> None:
    """|W c - W0 a|^2 + |W p - W0 p|^2 + lam |W - W0|^2 has a vanishing gradient."""
    weight, concepts, anchors, preserved = random(3, 4), random(1, 4), random(1, 4) + 1, random(2, 4)
    edited = uce([weight], concepts, anchors, preserved, strength=0.5)[0].apply(weight).requires_grad_()
    loss = (edited @ concepts.T - weight @ anchors.T).square().sum()
    loss = loss + ((edited - weight) @ preserved.T).square().sum() + 0.5 * (edited - weight).square().sum()
    loss.backward()
    assert edited.grad is not None
    assert edited.grad.abs().max() < 1e-10


def test_the_null_space() -> None:
    preserved = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.1, 0.0]])
    assert torch.allclose(null_space(preserved, 0.1), torch.diag(torch.tensor([0.0, 1.0, 1.0])).double())
    assert torch.allclose(null_space(preserved, 1e-6), torch.diag(torch.tensor([0.0, 0.0, 1.0])).double())
    assert torch.allclose(null_space(torch.zeros(0, 3), 0.1), torch.eye(3).double())


def test_speed_changes_nothing_that_is_preserved() -> None:
    weight, concepts, anchors, preserved = random(5, 6), random(1, 6), random(1, 6) + 1, 3 * random(2, 6)
    edited = speed([weight], concepts, anchors, preserved, 1e-6)[0].apply(weight)
    assert torch.allclose(edited @ preserved.T, weight @ preserved.T)
    before = (weight @ concepts.T - weight @ anchors.T).norm()
    assert (edited @ concepts.T - weight @ anchors.T).norm() < before


def test_speed_by_hand() -> None:
    """e1 -> e2 with nothing preserved: D = W0 (e2 - e1) e1' / 2, half of the way to the anchor."""
    edited = speed([WEIGHT], E1, E2, torch.zeros(0, 2))[0].apply(WEIGHT)
    assert torch.allclose(edited[:, 0], (WEIGHT[:, 0] + WEIGHT[:, 1]).double() / 2)
    assert torch.allclose(edited[:, 1], WEIGHT[:, 1].double())
    (unchanged,) = speed([WEIGHT], E1, E2, 5 * E1)  # the concept itself is preserved
    assert torch.equal(unchanged.apply(WEIGHT), WEIGHT.double())


def test_the_embedding_that_returns() -> None:
    """Without an edit it is the concept's own embedding, shrunk by the regularization; by hand for W = 2 I."""
    weight = 2 * torch.eye(2)
    found = returning_embedding([weight], [weight], E1, regularization=1.0)
    assert torch.allclose(found, 0.8 * E1.double())


def test_rece_edits_what_uce_leaves() -> None:
    weights = [random(8, 6), random(9, 6)]
    concepts, anchors, preserved = random(1, 6), random(1, 6) + 1, random(2, 6)
    none = rece(weights, concepts, anchors, preserved, epochs=0)
    for edit, weight in zip(none, weights, strict=True):
        assert torch.allclose(edit.apply(weight), uce([weight], concepts, anchors, preserved)[0].apply(weight))

    def distance(epochs: int) -> float:
        """How closely the best embedding still gives the concept's projections."""
        edited = [
            e.apply(w) for e, w in zip(rece(weights, concepts, anchors, preserved, epochs=epochs), weights, strict=True)
        ]
        back = returning_embedding(weights, edited, concepts, 0.1)
        return float(
            sum((new @ back.T - old @ concepts.T).square().sum() for new, old in zip(edited, weights, strict=True))
        )

    assert distance(3) > distance(0)
    assert rece(weights, concepts, anchors, preserved, epochs=3)[0].up.shape == (8, 4)


def test_edits_add_up() -> None:
    one, other = Edit(random(3, 1), random(1, 2)), Edit(random(3, 2), random(2, 2))
    both = one.plus(other).apply(torch.zeros(3, 2))
    assert torch.allclose(both, one.up @ one.down + other.up @ other.down)


def test_the_closest_change_of_a_rank() -> None:
    edit = Edit(random(5, 3), random(3, 4))
    exact = edit.up @ edit.down
    for rank in (3, 6):  # its own, and padded
        same = edit.of_rank(rank)
        assert same.down.shape == (rank, 4)
        assert torch.allclose(same.up @ same.down, exact)
        assert torch.allclose(same.up.norm(dim=0), same.down.norm(dim=1))
    lower = edit.of_rank(1)
    error = (lower.up @ lower.down - exact).norm()
    assert torch.isclose(error, torch.linalg.svdvals(exact)[1:].norm())  # Eckart and Young
    more = Edit(random(2, 3), random(3, 4)).of_rank(3)  # of rank 2: there are two outputs
    assert more.up.shape == (2, 3)
