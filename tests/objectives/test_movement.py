"""How far predictions have moved: closed forms, and sums that add up over micro-batches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sd_unlearn.data.batch import NO_GROUP, Batch
from sd_unlearn.objectives.movement import Movement
from sd_unlearn.risk import UNLABELED

ROWS = 6
GENERIC = torch.zeros(3, 4)


def same(values: Tensor) -> Tensor:
    return values


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
    assert movement.read(same)["moved"] == pytest.approx(share)


def test_what_moves_at_right_angles_is_not_counted(batch: Batch, reference: Tensor) -> None:
    other = torch.randn(reference.shape, generator=torch.Generator().manual_seed(1))
    for row in (0, 1):
        along = (other[row] * reference[row]).sum() / reference[row].square().sum()
        other[row] -= along * reference[row]
    movement = Movement()
    movement.add(other, reference, batch, GENERIC)
    assert movement.read(same)["moved"] == pytest.approx(0, abs=1e-6)


def test_positives_under_the_generic_caption_and_images_without_a_caption_do_not_count(
    batch: Batch, reference: Tensor
) -> None:
    change = 0.5 * reference
    movement = Movement()
    movement.add(change, reference, batch, GENERIC)
    expected = movement.read(same)
    assert expected == pytest.approx({"moved": 0.5, "spillover": 0.5})
    change[[2, 3, 5]] += 9
    movement.reset()
    movement.add(change, reference, batch, GENERIC)
    assert movement.read(same) == expected


def test_spillover_counts_any_direction(batch: Batch, reference: Tensor) -> None:
    change = torch.zeros_like(reference)
    change[4] = reference[4].flip(0)
    movement = Movement()
    movement.add(change, reference, batch, GENERIC)
    assert movement.read(same)["spillover"] == pytest.approx(1)


def test_micro_batches_and_processes_add_up(batch: Batch, reference: Tensor) -> None:
    change = torch.randn(reference.shape, generator=torch.Generator().manual_seed(2))
    movement = Movement()
    movement.add(change, reference, batch, GENERIC)
    whole = movement.read(same)
    movement.reset()
    for part in range(2):
        rows = slice(part, None, 2)
        movement.add(change[rows], reference[rows], batch.only(rows), GENERIC)
    assert movement.read(lambda sums: 2 * sums) == pytest.approx(whole)


def test_steps_without_such_images_have_no_value(batch: Batch, reference: Tensor) -> None:
    movement = Movement()
    assert movement.read(same) == {}
    unlabeled = replace(batch, label=torch.full((ROWS,), UNLABELED), caption_group=torch.zeros(ROWS).long())
    movement.add(reference, reference, unlabeled, GENERIC)
    assert all(math.isnan(value) for value in movement.read(same).values())
