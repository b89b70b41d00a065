"""Splits are disjoint, have the requested sizes, are reproducible by seed, and are shared by all objectives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sd_unlearn.errors import UsageError
from sd_unlearn.paper.ddpm.split import Split, split, with_contamination
from sd_unlearn.paper.experiments import EXPERIMENTS, Counts

LABELS = np.arange(1000) % 10  # 100 of each class
EVEN, ODD = (0, 2, 4, 6, 8), (1, 3, 5, 7, 9)
COUNTS = Counts(normal=300, mixed_in=60, positive=50)


def _parts(result: Split) -> list[list[int]]:
    return [result.normal.tolist(), result.mixed_in.tolist(), result.positive.tolist(), result.negative.tolist()]


def test_parts_are_disjoint_and_have_the_requested_sizes_and_classes() -> None:
    result = split(LABELS, EVEN, ODD, COUNTS, seed=3, num_negative=70)
    parts = _parts(result)
    assert [len(part) for part in parts] == [300, 60, 50, 70]
    everything = sum(parts, [])
    assert len(set(everything)) == len(everything)
    assert set(LABELS[result.normal]) | set(LABELS[result.negative]) == set(EVEN)
    assert set(LABELS[result.mixed_in]) == set(LABELS[result.positive]) == set(ODD)


def test_all_images_can_be_used() -> None:
    result = split(LABELS, EVEN, ODD, Counts(450, 400, 100), seed=0, num_negative=50)
    assert sorted(sum(_parts(result), [])) == list(range(1000))


def test_classes_that_are_neither_normal_nor_sensitive_are_not_used() -> None:
    result = split(LABELS, (0,), (1, 2), Counts(100, 150, 50), seed=0)
    assert set(LABELS[sum(_parts(result), [])]) == {0, 1, 2}


def test_the_split_depends_on_the_seed() -> None:
    one, same, other = (_parts(split(LABELS, EVEN, ODD, COUNTS, seed=s, num_negative=9)) for s in (3, 3, 4))
    assert one == same
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_objectives_share_their_images() -> None:
    base = split(LABELS, EVEN, ODD, COUNTS, seed=3)
    more_mixed_in = split(LABELS, EVEN, ODD, replace(COUNTS, mixed_in=120), seed=3)
    fewer_positive = split(LABELS, EVEN, ODD, replace(COUNTS, positive=20), seed=3)
    with_negative = split(LABELS, EVEN, ODD, COUNTS, seed=3, num_negative=40)
    for other in (more_mixed_in, fewer_positive, with_negative):
        assert other.normal.tolist() == base.normal.tolist()
        assert other.mixed_in[:60].tolist() == base.mixed_in.tolist()
        assert other.positive.tolist() == base.positive[: len(other.positive)].tolist()


def test_missing_classes_are_mixed_in_but_never_labeled() -> None:
    base = split(LABELS, EVEN, ODD, COUNTS, seed=3)
    result = split(LABELS, EVEN, ODD, COUNTS, seed=3, missing=(7, 9))
    assert set(LABELS[result.positive]) == {1, 3, 5}
    assert len(result.positive) == COUNTS.positive
    assert result.mixed_in.tolist() == base.mixed_in.tolist()
    assert {7, 9} < set(LABELS[result.mixed_in])
    assert not set(result.positive) & set(result.mixed_in)


@pytest.mark.parametrize("share", [0, 0.05, 1 / 11, 0.3, 0.5, 0.9])
def test_contamination_is_the_requested_share(share: float) -> None:
    result = with_contamination(Counts(2000, 200, 150), share)
    assert (result.normal, result.positive) == (2000, 150)
    assert result.contamination == pytest.approx(share, abs=0.5 / 2000)
    assert with_contamination(result, result.contamination) == result


def test_the_default_contamination_keeps_the_counts() -> None:
    for experiment in EXPERIMENTS.values():
        assert with_contamination(experiment.counts, experiment.counts.contamination) == experiment.counts


@pytest.mark.parametrize("share", [1.0, -0.1, 1.5, float("nan"), 1e-6])
def test_invalid_shares_are_rejected(share: float) -> None:
    with pytest.raises(UsageError, match="--contamination"):
        with_contamination(COUNTS, share)


@pytest.mark.parametrize(
    ("changed", "negative", "message"),
    [
        ({"normal": 450}, 51, r"501 images of its normal classes \(450 unlabeled \+ 51 by --num_negative\).*500"),
        ({"mixed_in": 451}, 0, r"501 images of its sensitive classes.*--contamination"),
        ({}, -1, "--num_negative -1"),
    ],
)
def test_too_few_images_are_rejected_with_the_numbers_needed(
    changed: dict[str, int], negative: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        split(LABELS, EVEN, ODD, replace(COUNTS, **changed), seed=0, num_negative=negative)


@pytest.mark.parametrize(
    ("missing", "positive", "message"),
    [((2,), 50, "--missing 2 is not one"), (ODD, 50, "--missing lists all"), ((1, 3, 5, 7), 101, "--missing leaves")],
)
def test_invalid_missing_classes_are_rejected(missing: tuple[int, ...], positive: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        split(LABELS, EVEN, ODD, replace(COUNTS, positive=positive), seed=0, missing=missing)
