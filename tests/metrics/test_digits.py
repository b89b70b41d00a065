"""The digits metric matches the definitions of its values."""

from __future__ import annotations

import numpy as np
import pytest
from metric_tools import make_prompted

from sd_unlearn.data.concept import Concept
from sd_unlearn.errors import UsageError
from sd_unlearn.metrics.base import DetectorOutput
from sd_unlearn.metrics.digits import DIGITS, INKS, READER, DigitsMetric, make_digits
from sd_unlearn.metrics.drift import feature_drift
from sd_unlearn.metrics.frechet import frechet_distance
from sd_unlearn.results import Row

pytestmark = pytest.mark.usefixtures("one_thread")
SEVEN = Concept("seven", "the digit seven", "a digit", label="seven", kind="digit")
RED = Concept("red ink", "red ink", "a digit", label="red", kind="ink")
CELLS = [
    *[("direct", "the digit seven", ())] * 12,
    *[("held_out", "sept", ())] * 7,
    *[("generic", "a digit", ())] * 9,
    *[("alike", "the digit one", ("one",))] * 60,
    *[("alike", "a red two", ("red", "two"))] * 20,
    *[("general", "green ink", ("green",))] * 8,
    *[("general", "a cat", ("a cat",))] * 3,
    *[("general", "x", ())] * 2,
]


def random_output(seed: int, count: int = len(CELLS)) -> DetectorOutput:
    rng = np.random.default_rng(seed)
    sharp = [rng.dirichlet(np.full(n, 0.05), count) for n in (10, 5)]
    return {"digit": sharp[0], "ink": sharp[1], "features": rng.random((count, 64)).astype(np.float32)}


@pytest.mark.parametrize("concept", [SEVEN, RED])
def test_metrics_match_their_definitions(concept: Concept) -> None:
    metric, prompted = DigitsMetric(), make_prompted(concept, CELLS)
    base, other = random_output(0), random_output(1)
    axis, labels = ("digit", DIGITS) if concept.label in DIGITS else ("ink", INKS)
    read = {name: other[name].argmax(1) for name in ("digit", "ink")}
    leak, right = metric.count(prompted, other)
    assert leak.metric == "leakage"
    hits = (read[axis] == labels.index(concept.label))[prompted.in_groups("direct", "held_out", "generic")]
    assert leak.values[~np.isnan(leak.values)].tolist() == hits.tolist()
    asked = [(n, p.expect) for n, p in enumerate(prompted.prompts) if p.expect and "a cat" not in p.expect]
    wanted = [all(w in (DIGITS[read["digit"][n]], INKS[read["ink"][n]]) for w in words) for n, words in asked]
    assert right.values[~np.isnan(right.values)].tolist() == wanted

    rows = {(row.metric, row.subject): row for row in metric.compare(prompted, base, other)}
    sure = other[axis].max(1) >= 0.9
    good = (sure & (read[axis] != labels.index(concept.label)))[prompted.in_groups("direct")].mean()
    usual = (base[axis].max(1) >= 0.9)[prompted.in_groups("generic")].mean()
    assert rows["clean_replacement", ""].value == pytest.approx(good / usual)
    kept, alike = prompted.in_groups("alike", "general"), prompted.in_groups("alike")
    drift = feature_drift(base["features"][kept], other["features"][kept])
    assert rows["drift", ""].value == pytest.approx(drift.mean())
    held = READER.held_apart()
    without = held["features"][held[axis] != labels.index(concept.label)]
    for subject, output in (("base", base), ("", other)):
        row = rows["fid-digits", subject]
        assert row.value == pytest.approx(frechet_distance(output["features"][alike], without))
        assert row.low < row.high  # the basic interval turns a bias back, so the value itself may lie outside


def test_distances_to_real_digits() -> None:
    held = READER.held_apart()
    sevens, others = held["features"][held["digit"] == 7], held["features"][held["digit"] != 7]
    count = min(len(sevens), 60)
    cells = [("alike", "a", ())] * count

    def kid_of(drawn: np.ndarray) -> Row:
        output = {**random_output(0, count), "features": drawn}
        rows = DigitsMetric().compare(make_prompted(SEVEN, cells), output, output)
        assert [r.metric for r in rows] == ["drift", "kid-digits", "kid-digits"]
        assert [r.subject for r in rows] == ["", "base", ""]
        assert "fid-digits" in rows[1].note  # says why there is none
        assert (rows[1].value, rows[1].low) == (rows[2].value, rows[2].low)
        return rows[1]

    real, wrong = kid_of(others[:: len(others) // count][:count]), kid_of(sevens[:count])
    assert real.low is not None
    assert wrong.low is not None
    assert real.high is not None
    assert real.low <= 0 <= real.high
    assert wrong.low > real.high


def test_comparison_without_prompts() -> None:
    prompted = make_prompted(SEVEN, CELLS[:12])
    assert DigitsMetric().compare(prompted, random_output(0, 12), random_output(1, 12)) == []
    few = make_prompted(SEVEN, [("alike", "a", ())] * 9)
    rows = DigitsMetric().compare(few, random_output(0, 9), random_output(1, 9))
    assert [r.metric for r in rows] == ["drift"]


def test_ratio_over_zero_is_unknown() -> None:
    unsure = random_output(0, 28) | {"digit": np.full((28, 10), 0.1)}
    (row,) = DigitsMetric().compare(make_prompted(SEVEN, CELLS[:28]), unsure, random_output(1, 28))
    assert (row.metric, row.value, row.low, row.high) == ("clean_replacement", None, None, None)


def test_images_end_to_end() -> None:
    from metric_tools import pictures

    metric, images = make_digits(SEVEN), pictures(5)
    found = metric.read(images)
    assert {k: v.shape for k, v in found.items()} == {"digit": (5, 10), "ink": (5, 5), "features": (5, 64)}
    assert {k: v.shape for k, v in metric.read([]).items()} == {"digit": (0, 10), "ink": (0, 5), "features": (0, 64)}
    for key, values in metric.read(images[::-1]).items():
        assert values[::-1] == pytest.approx(found[key], abs=1e-6)
    digit, ink = metric.words(found, 3).split()
    assert (digit, ink) == (DIGITS[found["digit"][3].argmax()], INKS[found["ink"][3].argmax()])
    card = metric.card()
    assert card.detector == metric.name
    assert card.weights.startswith("sha256:")


def test_concept_that_is_not_a_digit_is_refused() -> None:
    sven = Concept("sven", "sven", "a digit", label="sevn")
    with pytest.raises(UsageError, match=r'"sevn".*Did you mean "seven"'):
        make_digits(sven)
    with pytest.raises(UsageError, match="sevn"):
        DigitsMetric().count(make_prompted(sven, CELLS), random_output(0))
