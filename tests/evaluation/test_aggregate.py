"""What was counted becomes rows and differences: against closed forms, and nothing is dropped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sd_unlearn.data.concept import Concept, Prompt
from sd_unlearn.evaluation import aggregate
from sd_unlearn.evaluation.aggregate import Seen
from sd_unlearn.metrics.base import Columns, Counted, Shots
from sd_unlearn.metrics.statistics import holm, paired_difference, paired_ratio, wilson
from sd_unlearn.results import Row

CONCEPT = Concept("seven", "a seven", "a digit")
GROUPS = ["direct"] * 4 + ["alike"] * 3 + ["general"] * 3


def make_shots(groups: list[str] = GROUPS, seeds: list[int] | None = None) -> Shots:
    prompts = tuple(Prompt(f"prompt of {group}", (group,)) for group in groups)
    return Shots(CONCEPT, np.array(groups), prompts, np.array(seeds or [0] * len(groups)))


class Bright:
    """Leakage where "x" is 1, accuracy where it is 0; brightness is "x" itself."""

    name = "bright v1"

    def card(self) -> Any: ...

    def read(self, images: Any) -> Columns:
        return {"x": np.array([image for image in images], dtype=float)}

    def count(self, shots: Shots, columns: Columns) -> list[Counted]:
        x = columns["x"]
        leak = np.where(shots.of("direct"), (x == 1).astype(float), np.nan)
        right = np.where(shots.of("alike", "general"), (x == 0).astype(float), np.nan)
        return [
            Counted("leakage", ("direct",), leak, note="is 1"),
            Counted("accuracy", ("alike", "general"), right),
            Counted("brightness", ("direct", "alike"), x, is_rate=False),
        ]

    def compare(self, shots: Shots, base: Columns, columns: Columns) -> list[Row]:
        moved = float(np.abs(base["x"] - columns["x"]).mean())
        return [Row("moved", "kept", "", moved, len(shots)), Row("start", "kept", "base", 1.0, len(shots))]

    def words(self, columns: Columns, index: int) -> str:
        return str(columns["x"][index])


def see(subject: str, x: list[float], readable: list[bool] | None = None) -> Seen:
    kept = np.array(readable or [True] * len(x))
    return Seen(subject, {"x": np.array(x, dtype=float)[kept]}, kept)


def rows(seen: Seen, base: Seen | None = None, shots: Shots | None = None) -> dict[tuple[str, str], Row]:
    shots, question = shots or make_shots(), Bright()
    counted = aggregate.count(question, shots, seen)
    before = aggregate.count(question, shots, base) if base else None
    return {(r.metric, r.group): r for r in aggregate.rows_of(question, shots, seen, counted, before)}


def test_a_rate_is_hits_over_all_with_wilsons_interval() -> None:
    found = rows(see("mine", [1, 0, 0, 0, 0, 1, 1, 0, 0, 0]))
    leak = found["leakage", "direct"]
    assert (leak.value, leak.n, leak.low, leak.high) == (0.25, 4, *wilson(1, 4))
    assert (leak.subject, leak.concept, leak.detector, leak.note) == ("mine", "seven", "bright v1", "is 1")
    assert found["accuracy", "alike"].value == pytest.approx(1 / 3)
    assert found["accuracy", "kept"].value == pytest.approx(4 / 6)  # both groups that must stay, together
    assert ("leakage", "kept") not in found
    assert found["brightness", "direct"].value == 0.25
    assert found["brightness", "direct"].interval == "bootstrap"


def test_an_unreadable_picture_stays_in_n_of_a_rate_and_is_left_out_of_a_mean() -> None:
    found = rows(see("mine", [1, 1, 9, 1, 0, 9, 0, 0, 0, 9], [n not in (2, 5, 9) for n in range(10)]))
    assert (found["leakage", "direct"].value, found["leakage", "direct"].n) == (0.75, 4)
    assert (found["accuracy", "kept"].value, found["accuracy", "kept"].n) == (pytest.approx(4 / 6), 6)
    assert (found["brightness", "direct"].value, found["brightness", "direct"].n) == (1.0, 3)


def test_a_prompt_none_of_whose_pictures_can_be_read_stays_in_n() -> None:
    """As where every prompt has one picture, or a whole folder is damaged: the rest must not speak for them."""
    found = rows(see("mine", [9, 9, 9, 9, 9, 9, 9, 0, 0, 0], [False] * 7 + [True] * 3))
    assert (found["leakage", "direct"].value, found["leakage", "direct"].n) == (0, 4)
    assert (found["accuracy", "kept"].value, found["accuracy", "kept"].n) == (0.5, 6)
    assert ("brightness", "direct") not in found
    nothing = rows(see("mine", [9] * 10, [False] * 10), see("base", [1] * 4 + [0] * 6))
    assert (nothing["leakage", "direct"].n, nothing["retention", "kept"].value) == (4, 0)


def test_a_picture_of_a_prompt_that_is_not_asked_about_counts_nowhere() -> None:
    """The alike prompt says nothing a judge knows: read or unreadable, its pictures are in no rate."""

    class Picky(Bright):
        def count(self, shots: Shots, columns: Columns) -> list[Counted]:
            values = np.where(shots.of("general"), (columns["x"] == 0).astype(float), np.nan)
            return [Counted("accuracy", ("alike", "general"), values)]

    seen = see("mine", [0] * 10, [True] * 6 + [False, True, True, False])
    (counted,) = aggregate.count(Picky(), make_shots(), seen)
    assert np.isnan(counted.values[4:7]).all()
    assert counted.values[7:].tolist() == [1, 1, 0]


def test_retention_is_accuracy_over_the_bases() -> None:
    base = see("base", [1, 1, 1, 1, 0, 0, 0, 0, 1, 1])
    found = rows(see("mine", [0, 0, 0, 0, 0, 1, 1, 0, 0, 1]), base)
    assert found["retention", "alike"].value == pytest.approx(1 / 3)
    assert found["retention", "general"].value == pytest.approx(2.0)
    assert found["retention", "kept"].value == pytest.approx(3 / 4)
    assert ("retention", "direct") not in found
    nothing = see("base", [1] * 10)
    unknown = rows(see("mine", [0] * 10), nothing)["retention", "kept"]
    assert (unknown.value, unknown.low, unknown.high) == (None, None, None)  # over zero: null, not NaN


def test_each_seed_has_its_own_value_where_there_are_several() -> None:
    shots = make_shots(["direct"] * 6, [0, 0, 0, 1, 1, 1])
    found = rows(see("mine", [1, 1, 0, 0, 0, 0]), shots=shots)
    assert found["leakage", "direct"].seeds == pytest.approx((2 / 3, 0))
    assert rows(see("mine", [1] * 10))["leakage", "direct"].seeds is None


def test_sets_are_compared_on_the_pictures_both_have() -> None:
    base = see("base", [0] * 10, [n != 0 for n in range(10)])
    mine = see("mine", [1] * 10, [n != 9 for n in range(10)])
    found = aggregate.compared(Bright(), make_shots(), base, mine)
    assert [(r.metric, r.subject, r.value, r.n) for r in found] == [
        ("moved", "mine", 1.0, 8),
        ("start", "base", 1.0, 8),
    ]
    nobody = see("mine", [1] * 10, [False] * 10)
    assert aggregate.compared(Bright(), make_shots(), base, nobody) == []


def differences(subjects: dict[str, list[float]], main: list[str]) -> dict[tuple[str, str, str, str], Any]:
    shots, question = make_shots(), Bright()
    counted = {name: aggregate.count(question, shots, see(name, x)) for name, x in subjects.items()}
    found = aggregate.differences(question, shots, counted, main)
    return {(d.metric, d.group, d.subject, d.against): d for d in found}


def test_differences_are_paired_signed_and_corrected() -> None:
    subjects = {"base": [1] * 4 + [0] * 6, "a": [0] * 10, "b": [1, 0, 0, 0] + [0] * 6, "weak": [1] * 4 + [0] * 6}
    found = differences(subjects, ["a", "b"])
    a = found["leakage", "direct", "a", "base"]
    assert (a.value, a.n, a.low, a.high) == (-1, 4, -1, -1)
    assert a.p == pytest.approx(2 * 0.5**4)  # McNemar: all four disagree in one direction
    assert found["leakage", "direct", "weak", "base"].p == 1
    assert found["leakage", "direct", "b", "a"].value == 0.25  # of main, against each other
    assert ("leakage", "direct", "weak", "a") not in found
    family = [d for key, d in found.items() if key[:2] == ("leakage", "direct")]
    assert [d.p_holm for d in family] == holm([d.p for d in family])
    assert found["brightness", "direct", "a", "base"].value == -1


def test_without_a_base_there_are_differences_between_subjects_alone() -> None:
    found = differences({"a": [0] * 10, "b": [1] * 10}, ["a", "b"])
    assert {key[2:] for key in found} == {("b", "a")}


# -- the statistics behind it --


def test_paired_difference_of_equals_is_zero_and_it_is_antisymmetric() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 2, 80).astype(float), rng.integers(0, 2, 80).astype(float)
    assert paired_difference(a, a, True) == (0, 0, 0, 1)
    assert paired_difference(a, a, False)[3] == 1
    one, other = paired_difference(a, b, True), paired_difference(b, a, True)
    assert one[0] == pytest.approx(-other[0])
    assert (one[1], one[2]) == pytest.approx((-other[2], -other[1]), abs=1e-12)
    assert one[3] == pytest.approx(other[3])


def test_the_bootstrap_of_a_difference_is_the_normal_interval() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(1, 1, 500), rng.normal(0, 1, 500)
    value, low, high, p = paired_difference(a, b, False)
    half = 1.96 * (a - b).std() / np.sqrt(500)
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.02)
    assert p < 0.001


def test_p_values_are_uniform_when_nothing_differs() -> None:
    """At level 0.1 about a tenth of the comparisons of equals is called a difference; McNemar's is conservative."""
    rng = np.random.default_rng(3)
    called = [paired_difference(rng.normal(size=30), rng.normal(size=30), False)[3] <= 0.1 for _ in range(200)]
    assert 0.04 < np.mean(called) < 0.17
    rates = [paired_difference(*rng.integers(0, 2, (2, 40)).astype(float), True)[3] <= 0.1 for _ in range(200)]
    assert np.mean(rates) < 0.15


def test_holm() -> None:
    assert holm([]) == []
    assert holm([0.02]) == [0.02]
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # monotone: 0.04 is not below 0.03's 0.06
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert max(holm([1.0, 1.0, 1.0])) == 1.0


def test_counted_values_keep_their_place() -> None:
    seen = see("mine", [1, 5, 1, 0, 0, 0, 0, 0, 0, 0], [True, False] + [True] * 8)
    leak = aggregate.count(Bright(), make_shots(), seen)[0]
    assert leak.values[:4].tolist() == [1, 0, 1, 0]


def test_a_ratio_of_paired_rates_keeps_its_width_and_its_promise() -> None:
    """Of equals it holds 1 and is no point; over many draws the interval holds the true ratio about 95 times in 100."""
    ones = np.ones(50)
    value, low, high = paired_ratio(ones, ones)
    assert (value, low * high) == (1.0, pytest.approx(1.0))
    assert 0.94 < low < 0.98
    assert np.isnan(paired_ratio(ones, ones * 0)).all()
    assert paired_ratio(ones * 0, ones)[:2] == (0.0, 0.0)
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        base = rng.random(100) < 0.9
        mine = np.where(base, rng.random(100) < 0.8, rng.random(100) < 0.3)
        _, low, high = paired_ratio(mine.astype(float), base.astype(float))
        held += low <= (0.9 * 0.8 + 0.1 * 0.3) / 0.9 <= high
    assert 925 < held < 980
    a, b = mine.astype(float), base.astype(float)
    there, back = paired_ratio(a, b), paired_ratio(b, a)
    assert (there[1], there[2]) == pytest.approx((1 / back[2], 1 / back[1]))
