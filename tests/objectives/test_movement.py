"""How far predictions have moved: closed forms, and sums that add up over micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sd_unlearn.data.batch import NO_GROUP, Batch
from sd_unlearn.objectives.movement import GAIN, MAX_PULL, SMOOTHING, SPILLOVER, Movement
from sd_unlearn.risk import UNLABELED

ROWS = 6
GENERIC = torch.zeros(3, 4)


def measured(movement: Movement, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
    movement.smoothed = None
    movement.end_step(reduce)
    return movement.read()


@pytest.fixture
def batch() -> Batch:
    """Two positives under the concept's caption, one under the generic caption, an unlabeled image, two keep images, of
    which the last is seen under the empty caption."""
    text = torch.ones(ROWS, 3, 4)
    text[2] = GENERIC
    keep = NO_GROUP
    return Batch(
        latents=torch.zeros(ROWS, 2, 2, 2),
        text=text,
        teacher_text=torch.ones(ROWS, 3, 4),
        label=torch.tensor([0, 0, 0, UNLABELED, UNLABELED, UNLABELED]),
        caption_group=torch.tensor([0, 0, 1, 0, keep, keep]),
        num_groups=2,
        timesteps=torch.zeros(ROWS).long(),
        noise=torch.zeros(ROWS, 2, 2, 2),
        unconditional=torch.tensor([False] * 5 + [True]),
        weight=torch.ones(ROWS),
    )


@pytest.fixture
def reference() -> Tensor:
    """Zero for the unlabeled image and the keep image without a caption."""
    reference = torch.randn(ROWS, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    reference[3] = reference[5] = 0
    return reference


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0, 1.7])
def test_moving_a_share_of_the_way_to_the_generic_prediction_is_that_share(
    batch: Batch, reference: Tensor, share: float
) -> None:
    movement = Movement()
    movement.add(share * reference, reference, batch, GENERIC)
    assert measured(movement)["moved"] == pytest.approx(share)


def test_what_moves_at_right_angles_is_not_counted(batch: Batch, reference: Tensor) -> None:
    other = torch.randn(reference.shape, generator=torch.Generator().manual_seed(1))
    for row in (0, 1):
        along = (other[row] * reference[row]).sum() / reference[row].square().sum()
        other[row] -= along * reference[row]
    movement = Movement()
    movement.add(other, reference, batch, GENERIC)
    assert measured(movement)["moved"] == pytest.approx(0, abs=1e-6)


def test_positives_under_the_generic_caption_and_images_without_a_caption_do_not_count(
    batch: Batch, reference: Tensor
) -> None:
    change = 0.5 * reference
    movement = Movement()
    movement.add(change, reference, batch, GENERIC)
    expected = measured(movement)
    assert expected == pytest.approx({"moved": 0.5, "spillover": 0.5})
    change[[2, 3, 5]] += 9
    movement.start_step()
    movement.add(change, reference, batch, GENERIC)
    assert measured(movement) == expected


def test_spillover_counts_any_direction(batch: Batch, reference: Tensor) -> None:
    change = torch.zeros_like(reference)
    change[4] = reference[4].flip(0)
    movement = Movement()
    movement.add(change, reference, batch, GENERIC)
    assert measured(movement)["spillover"] == pytest.approx(1)


def test_micro_batches_and_processes_add_up(batch: Batch, reference: Tensor) -> None:
    change = torch.randn(reference.shape, generator=torch.Generator().manual_seed(2))
    movement = Movement()
    movement.add(change, reference, batch, GENERIC)
    whole = measured(movement)
    movement.start_step()
    for part in range(2):
        rows = slice(part, None, 2)
        movement.add(change[rows], reference[rows], batch.only(rows), GENERIC)
    assert measured(movement, lambda sums: 2 * sums) == pytest.approx(whole)


def test_steps_without_such_images_have_no_value(batch: Batch, reference: Tensor) -> None:
    movement = Movement()
    assert measured(movement) == {}
    unlabeled = replace(batch, label=torch.full((ROWS,), UNLABELED), caption_group=torch.zeros(ROWS).long())
    movement.add(reference, reference, unlabeled, GENERIC)
    assert all(math.isnan(value) for value in measured(movement).values())


def pulled(
    movement: Movement, batch: Batch, reference: Tensor, moved: float, push: float = 2.0, spillover: float = 0.0
) -> float:
    """The pull after a step in which positives had moved by `moved`, and keep images by `spillover`."""
    movement.start_step()
    change = torch.where(batch.is_positive.view(-1, 1, 1, 1), moved, spillover) * reference
    movement.add(change, reference, batch, GENERIC)
    movement.end_step(lambda sums: sums)
    return float(movement.pull(push))


def test_of_several_concepts_a_few_turns_count(batch: Batch, reference: Tensor) -> None:
    """Of one in a hundred, with five turns in 500 steps: the first, before anything has moved, is soon forgotten."""
    for every, least in ((1, 0.3), (100, 0.9)):
        movement = Movement(every)
        for moved in (0.0, 1.0, 1.0, 1.0, 1.0):
            pulled(movement, batch, reference, moved)
        found = movement.read()["moved"]
        assert least < found < 1
        assert (found < 0.4) == (every == 1)


def test_the_pull_is_full_at_first_and_falls_to_zero_where_positives_should_be(batch: Batch, reference: Tensor) -> None:
    assert Movement().pull(2.0) == 2 * MAX_PULL
    pulls = [pulled(Movement(), batch, reference, moved) for moved in (-1, 0, 1, 2.5, 2.9, 3, 5)]
    expected = [2 * MAX_PULL, 2 * MAX_PULL, 2 * MAX_PULL, GAIN * 0.5, GAIN * 0.1, 0, 0]
    assert pulls == pytest.approx(expected, abs=1e-5)


def test_the_pull_falls_to_a_tenth_with_the_spillover(batch: Batch, reference: Tensor) -> None:
    low, high = SPILLOVER
    pulls = [pulled(Movement(), batch, reference, 2.5, spillover=s) for s in (0, low, (low + high) / 2, high, 2)]
    assert pulls == pytest.approx([GAIN / 2, GAIN / 2, GAIN / 4, GAIN / 20, GAIN / 20], abs=1e-5)


def test_the_pull_follows_a_moving_average(batch: Batch, reference: Tensor) -> None:
    movement = Movement()
    assert pulled(movement, batch, reference, 3.0) == pytest.approx(0, abs=1e-5)
    assert pulled(movement, batch, reference, 2.0) == pytest.approx(GAIN * (1 - SMOOTHING), abs=1e-5)


def test_a_step_without_positives_leaves_the_pull_as_it_was(batch: Batch, reference: Tensor) -> None:
    movement = Movement()
    before = pulled(movement, batch, reference, 2.8)
    unlabeled = replace(batch, label=torch.full((ROWS,), UNLABELED))
    assert pulled(movement, unlabeled, reference, 1.0) == before
    assert movement.read()["moved"] == pytest.approx(2.8)


@pytest.mark.parametrize("ratio", [0.9, 1.8])
def test_concepts_that_yield_differently_come_equally_far(batch: Batch, reference: Tensor, ratio: float) -> None:
    """With a constant pull g, predictions settle at 1 + ratio * g. The controller settles between 80 and 90 % of the
    way, for a ratio of 1 to 2."""
    movement, moved, push = Movement(), 0.0, 2.5
    for _ in range(400):
        pull = pulled(movement, batch, reference, moved, push)
        moved += 0.02 * (1 + ratio * pull - moved)
    assert 0.77 < (moved - 1) / push < 0.9
