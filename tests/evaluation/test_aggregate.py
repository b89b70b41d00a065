"""Rows and differences from values per image, against closed forms; no image is dropped."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from sd_unlearn.data.concept import Concept, Prompt
from sd_unlearn.evaluation import aggregate
from sd_unlearn.evaluation.detections import Detections
from sd_unlearn.metrics.base import DetectorOutput, ImageValues, PromptedImages
from sd_unlearn.metrics.statistics import holm, paired_rates, wilson
from sd_unlearn.report.formatting import per_seed
from sd_unlearn.results import Row, as_json

CONCEPT = Concept("seven", "a seven", "a digit")
GROUPS = ["direct"] * 4 + ["alike"] * 3 + ["general"] * 3


def make_prompted(groups: list[str] = GROUPS, seeds: list[int] | None = None) -> PromptedImages:
    prompts = tuple(Prompt(f"prompt of {group}", (group,)) for group in groups)
    return PromptedImages(CONCEPT, np.array(groups), prompts, np.array(seeds or [0] * len(groups)))


class Bright:
    """Leakage where "x" is 1, accuracy where it is 0; brightness is "x" itself."""

    name = "bright v1"

    def card(self) -> Any: ...

    def read(self, images: Any) -> DetectorOutput:
        return {"x": np.array([image for image in images], dtype=float)}

    def count(self, prompted: PromptedImages, output: DetectorOutput) -> list[ImageValues]:
        x = output["x"]
        leak = np.where(prompted.in_groups("direct"), (x == 1).astype(float), np.nan)
        right = np.where(prompted.in_groups("alike", "general"), (x == 0).astype(float), np.nan)
        return [
            ImageValues("leakage", ("direct",), leak, note="is 1"),
            ImageValues("accuracy", ("alike", "general"), right),
            ImageValues("brightness", ("direct", "alike"), x, is_rate=False),
        ]

    def compare(self, prompted: PromptedImages, base: DetectorOutput, output: DetectorOutput) -> list[Row]:
        moved = float(np.abs(base["x"] - output["x"]).mean())
        return [Row("moved", "kept", "", moved, len(prompted)), Row("start", "kept", "base", 1.0, len(prompted))]

    def words(self, output: DetectorOutput, index: int) -> str:
        return str(output["x"][index])


def see(subject: str, x: list[float], readable: list[bool] | None = None) -> Detections:
    kept = np.array(readable or [True] * len(x))
    return Detections(subject, {"x": np.array(x, dtype=float)[kept]}, kept)


def rows(
    seen: Detections, base: Detections | None = None, prompted: PromptedImages | None = None
) -> dict[tuple[str, str], Row]:
    prompted, metric = prompted or make_prompted(), Bright()
    counted = aggregate.image_values(metric, prompted, seen)
    before = aggregate.image_values(metric, prompted, base) if base else None
    return {(r.metric, r.group): r for r in aggregate.subject_rows(metric, prompted, seen.subject, counted, before)}


def test_rate_has_a_wilson_interval() -> None:
    found = rows(see("mine", [1, 0, 0, 0, 0, 1, 1, 0, 0, 0]))
    leak = found["leakage", "direct"]
    assert (leak.value, leak.n, leak.low, leak.high) == (0.25, 4, *wilson(1, 4))
    assert (leak.subject, leak.concept, leak.detector, leak.note) == ("mine", "seven", "bright v1", "is 1")
    assert found["accuracy", "alike"].value == pytest.approx(1 / 3)
    assert found["accuracy", "kept"].value == pytest.approx(4 / 6)  # both groups that must stay, together
    assert ("leakage", "kept") not in found
    assert found["brightness", "direct"].value == 0.25
    assert found["brightness", "direct"].interval == "bootstrap"


def test_means_of_equal_values_have_no_interval_without_width() -> None:
    """What 4 images without detections leave possible; other equal values do not say how much others vary."""
    none = rows(see("mine", [0] * 10))["brightness", "direct"]
    assert (none.value, none.low, none.interval) == (0, 0, "poisson")
    assert none.high == pytest.approx(3.69 / 4, abs=1e-3)
    two = rows(see("mine", [2] * 10))["brightness", "direct"]
    assert (two.value, two.low, two.high, two.interval) == (2, None, None, "none")


def test_unreadable_images_are_unknown_in_rates_and_left_out_of_means() -> None:
    found = rows(see("mine", [1, 1, 9, 1, 0, 9, 0, 0, 0, 9], [n not in (2, 5, 9) for n in range(10)]))
    leak, kept = found["leakage", "direct"], found["accuracy", "kept"]
    assert (leak.value, leak.n, leak.low, leak.high) == (1.0, 4, wilson(3, 4)[0], wilson(4, 4)[1])
    assert (kept.value, kept.n, kept.low, kept.high) == (1.0, 6, wilson(4, 6)[0], wilson(6, 6)[1])
    assert leak.note == "is 1; 1 of 4 unknown: unreadable images"
    assert (found["brightness", "direct"].value, found["brightness", "direct"].n) == (1.0, 3)


def test_prompts_with_only_unreadable_images_stay_in_n() -> None:
    """E.g. one image per prompt, or a damaged folder: the readable images must not stand for all."""
    found = rows(see("mine", [9, 9, 9, 9, 9, 9, 9, 0, 0, 0], [False] * 7 + [True] * 3))
    leak, kept = found["leakage", "direct"], found["accuracy", "kept"]
    assert (leak.value, leak.n, leak.low, leak.high) == (None, 4, wilson(0, 4)[0], wilson(4, 4)[1])
    assert (kept.value, kept.n, kept.low, kept.high) == (1.0, 6, wilson(3, 6)[0], wilson(6, 6)[1])
    assert ("brightness", "direct") not in found
    nothing = rows(see("mine", [9] * 10, [False] * 10), see("base", [1] * 4 + [0] * 6))
    assert (nothing["leakage", "direct"].n, nothing["retention", "kept"].value) == (4, None)


def test_interval_of_retention_covers_unreadable_images() -> None:
    base = see("base", [1] * 4 + [0] * 6)
    row = rows(see("mine", [0] * 4 + [0, 0, 0, 9, 9, 9], [True] * 7 + [False] * 3), base)["retention", "kept"]
    assert (row.value, row.n) == (1, 6)
    assert row.low is not None
    assert row.low < 0.5 < 1 <= (row.high or 0)
    assert "3 of 6 unknown" in row.note


def test_undefined_images_are_in_no_rate() -> None:
    """The alike prompt has no known label, so its images are in no rate, readable or not."""

    class Picky(Bright):
        def count(self, prompted: PromptedImages, output: DetectorOutput) -> list[ImageValues]:
            values = np.where(prompted.in_groups("general"), (output["x"] == 0).astype(float), np.nan)
            return [ImageValues("accuracy", ("alike", "general"), values)]

    seen = see("mine", [0] * 10, [True] * 6 + [False, True, True, False])
    (counted,) = aggregate.image_values(Picky(), make_prompted(), seen)
    assert np.isnan(counted.values[4:7]).all()
    assert counted.values[7:9].tolist() == [1, 1]
    assert np.isnan(counted.values[9])
    assert counted.unknown is not None
    assert counted.unknown.tolist() == [False] * 9 + [True]  # not image 6, which is unreadable and undefined


def test_retention_is_accuracy_over_base_accuracy() -> None:
    base = see("base", [1, 1, 1, 1, 0, 0, 0, 0, 1, 1])
    found = rows(see("mine", [0, 0, 0, 0, 0, 1, 1, 0, 0, 1]), base)
    assert found["retention", "alike"].value == pytest.approx(1 / 3)
    assert found["retention", "general"].value == pytest.approx(2.0)
    assert found["retention", "kept"].value == pytest.approx(3 / 4)
    assert ("retention", "direct") not in found
    nothing = see("base", [1] * 10)
    unknown = rows(see("mine", [0] * 10), nothing)["retention", "kept"]
    assert (unknown.value, unknown.low, unknown.high) == (None, None, None)  # over zero: null, not NaN


def test_several_seeds_have_their_own_values() -> None:
    prompted = make_prompted(["direct"] * 6, [0, 0, 0, 1, 1, 1])
    found = rows(see("mine", [1, 1, 0, 0, 0, 0]), prompted=prompted)
    assert found["leakage", "direct"].seeds == pytest.approx((2 / 3, 0))
    assert rows(see("mine", [1] * 10))["leakage", "direct"].seeds is None


def test_a_seed_with_only_unreadable_images_has_no_value_and_no_nan() -> None:
    prompted = make_prompted(["direct"] * 4, [0, 0, 1, 1])
    found = rows(see("mine", [1, 0, 9, 9], [True, True, False, False]), prompted=prompted)
    assert found["leakage", "direct"].seeds == (0.5, None)
    assert json.dumps(as_json(found["leakage", "direct"]), allow_nan=False)
    assert per_seed(found["leakage", "direct"]) == "by seed 50 %, –"


def test_sets_are_compared_on_images_readable_for_both() -> None:
    base = see("base", [0] * 10, [n != 0 for n in range(10)])
    mine = see("mine", [1] * 10, [n != 9 for n in range(10)])
    found = aggregate.comparison_rows(Bright(), make_prompted(), base, mine)
    assert [(r.metric, r.subject, r.value, r.n) for r in found] == [
        ("moved", "mine", 1.0, 8),
        ("start", "base", 1.0, 8),
    ]
    nobody = see("mine", [1] * 10, [False] * 10)
    assert aggregate.comparison_rows(Bright(), make_prompted(), base, nobody) == []


def differences(subjects: dict[str, list[float]], main: list[str]) -> dict[tuple[str, str, str, str], Any]:
    prompted, metric = make_prompted(), Bright()
    counted = {name: aggregate.image_values(metric, prompted, see(name, x)) for name, x in subjects.items()}
    found = aggregate.differences(metric, prompted, counted, main)
    return {(d.metric, d.group, d.subject, d.against): d for d in found}


def test_differences_are_paired_signed_and_corrected() -> None:
    subjects = {"base": [1] * 4 + [0] * 6, "a": [0] * 10, "b": [1, 0, 0, 0] + [0] * 6, "weak": [1] * 4 + [0] * 6}
    found = differences(subjects, ["a", "b"])
    a = found["leakage", "direct", "a", "base"]
    assert (a.value, a.n, a.low, a.high, a.interval) == (-1, 4, *paired_rates(0, 4, 4), "bonett-price")
    assert a.p == pytest.approx(2 * 0.5**4)  # McNemar: all four disagree in one direction
    assert found["leakage", "direct", "weak", "base"].p == 1
    assert found["leakage", "direct", "b", "a"].value == 0.25  # of main, against each other
    assert ("leakage", "direct", "weak", "a") not in found
    family = [d for key, d in found.items() if key[:2] == ("leakage", "direct")]
    assert [d.p_holm for d in family] == holm([d.p for d in family])
    of_means = found["brightness", "direct", "a", "base"]
    assert (of_means.value, of_means.low, of_means.interval) == (-1, None, "none")  # on all images
    assert found["brightness", "direct", "b", "a"].interval == "paired-bootstrap"


def test_differences_without_a_base() -> None:
    found = differences({"a": [0] * 10, "b": [1] * 10}, ["a", "b"])
    assert {key[2:] for key in found} == {("b", "a")}


def test_values_keep_their_order() -> None:
    seen = see("mine", [1, 5, 1, 0, 0, 0, 0, 0, 0, 0], [True, False] + [True] * 8)
    leak = aggregate.image_values(Bright(), make_prompted(), seen)[0]
    assert np.isnan(leak.values[1])
    assert leak.values[[0, 2, 3]].tolist() == [1, 1, 0]
