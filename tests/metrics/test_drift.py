"""Feature drift against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from metric_tools import make_prompted

from sd_unlearn.data.concept import Concept
from sd_unlearn.metrics.drift import drift_rows, feature_drift

pytestmark = pytest.mark.usefixtures("one_thread")
RNG = np.random.default_rng(0)


def test_drift() -> None:
    a, b = RNG.normal(size=(20, 5)), RNG.normal(size=(20, 5))
    assert feature_drift(a, a).tolist() == [0] * 20
    assert feature_drift(a, b) == pytest.approx(feature_drift(b, a))
    assert feature_drift(a, 7 * a) == pytest.approx(np.zeros(20), abs=1e-12)
    corners = np.array([[1.0, 0], [1, 0], [1, 0], [0, 0], [0, 0]])
    others = np.array([[0.0, 1], [-1, 0], [1, 1], [0, 0], [1, 0]])
    assert feature_drift(corners, others) == pytest.approx([1, 2, 1 - 0.5**0.5, 0, 1])
    assert feature_drift(a, b)[3:4] == pytest.approx(feature_drift(a[3:4], b[3:4]))


def test_drift_rows_cover_keep_prompts() -> None:
    seven = Concept("seven", "a seven", "a digit", kind="digit")
    prompted = make_prompted(seven, [("direct", "a", ()), ("alike", "b", ()), ("general", "c", ())])
    base = {"features": np.array([[1.0, 0], [1, 0], [1, 0]])}
    moved = {"features": np.array([[-1.0, 0], [0, 1], [1, 0]])}
    (row,) = drift_rows(prompted, base, moved, "a reader")
    assert (row.metric, row.group, row.subject, row.value, row.n) == ("drift", "kept", "", 0.5, 2)
    assert drift_rows(make_prompted(seven, [("direct", "a", ())]), base, moved, "a reader") == []
    (same,) = drift_rows(prompted, base, base, "a reader")
    assert (same.value, same.low, same.high) == (0, 0, 0)
    (equal,) = drift_rows(prompted, base, {"features": -base["features"]}, "a reader")
    assert (equal.value, equal.low, equal.high, equal.interval) == (2, None, None, "none")
