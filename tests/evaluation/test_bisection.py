"""The search for the strength from which a condition holds, on conditions that are known everywhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sd_unlearn.evaluation.bisection import exceptions, first_holding, strengths_up_to

VALUES = strengths_up_to(2.0, 0.05)


def test_strengths_end_at_the_maximum() -> None:
    assert strengths_up_to(0.3, 0.1) == [0.0, 0.1, 0.2, 0.3]
    assert strengths_up_to(0.25, 0.1) == [0.0, 0.1, 0.2, 0.25]
    assert (len(VALUES), VALUES[20], VALUES[-1]) == (41, 1.0, 2.0)


def counted(condition: Callable[[float], bool]) -> tuple[Callable[[float], bool], list[float]]:
    calls: list[float] = []

    def holds(value: float) -> bool:
        calls.append(value)
        return condition(value)

    return holds, calls


@pytest.mark.parametrize("threshold", VALUES)
def test_every_threshold_is_found_in_both_directions(threshold: float) -> None:
    holds, calls = counted(lambda value: value >= threshold)
    assert first_holding(VALUES, holds, [1.0]) == threshold
    assert len(calls) == len(set(calls)) <= 3 + 5  # the ends and 1, then 20 values halved
    holds, _ = counted(lambda value: value <= threshold)
    assert first_holding(VALUES[::-1], holds, [1.0]) == threshold


def test_nothing_is_found_where_nothing_holds() -> None:
    holds, calls = counted(lambda value: False)
    assert first_holding(VALUES, holds, [1.0]) is None
    assert calls == [0.0, 1.0, 2.0]
    assert exceptions(VALUES, None, {0.0: False}) == []


def test_a_condition_that_changes_twice_gives_an_edge_and_its_contradictions() -> None:
    outcomes: dict[float, bool] = {}

    def holds(value: float) -> bool:  # between 0.6 and 1.5 only
        return outcomes.setdefault(value, 0.6 <= value <= 1.5)

    found = first_holding(VALUES, holds, [1.0])
    assert found == 0.6
    assert exceptions(VALUES, found, outcomes) == [2.0]


def test_the_only_value() -> None:
    assert first_holding([0.0], lambda value: True) == 0.0
    assert first_holding([0.0], lambda value: False) is None
