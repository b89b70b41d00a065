"""Drift between pairs: LPIPS with a backbone of random weights, and the distance of features."""

from __future__ import annotations

from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
from metric_tools import make_shots, pictures
from PIL import Image

from sd_unlearn.data.concept import Concept
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.metrics.digits import DigitsQuestion
from sd_unlearn.metrics.drift import FeatureDrift, LpipsDrift, drift_rows, make_lpips, same_sizes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def lpips() -> LpipsDrift:
    """With the heads that torchmetrics bundles; only what would be fetched is random."""
    pytest.importorskip("torchmetrics")
    import torch
    import torchvision

    def random_weights(url: str, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        assert "alexnet" in url
        return weights

    torch.manual_seed(0)
    weights = torchvision.models.alexnet(weights=None).state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.models._api.load_state_dict_from_url", random_weights)
        return make_lpips()


def test_lpips_is_zero_for_equals_and_symmetric(lpips: LpipsDrift) -> None:
    a, b = pictures(3, size=(70, 80)), pictures(3, seed=2, size=(70, 80))
    assert lpips.distance(a, a).tolist() == [0, 0, 0]
    there, back = lpips.distance(a, b), lpips.distance(b, a)
    assert there == pytest.approx(back)
    assert (there > 1e-4).all()
    halfway = [Image.blend(x, y, 0.2) for x, y in zip(a, b, strict=True)]
    assert (lpips.distance(a, halfway) < there).all()


def test_lpips_of_a_pair_is_the_same_in_any_company(lpips: LpipsDrift) -> None:
    """Sizes that change in between, more than one batch, sides that are too small for the network."""
    sizes = [(70, 64)] * 18 + [(32, 32)] + [(64, 100)] * 2
    a = [pictures(1, i, size)[0] for i, size in enumerate(sizes)]
    b = [pictures(1, 100 + i, size)[0] for i, size in enumerate(sizes)]
    together = lpips.distance(a, b)
    assert together.shape == (21,)
    for i in (0, 16, 18, 20):
        assert lpips.distance([a[i]], [b[i]]) == pytest.approx(together[i : i + 1], rel=1e-4)
    assert lpips.distance(a[::-1], b[::-1]) == pytest.approx(together[::-1], rel=1e-4)
    assert lpips.distance([], []).shape == (0,)
    assert lpips.distance([Image.new("L", (64, 64))], [Image.new("RGB", (64, 64))]).tolist() == [0]


def test_lpips_refuses_a_pair_of_two_sizes(lpips: LpipsDrift) -> None:
    with pytest.raises(UsageError, match=r"Pair 1 .*\(64, 64\).*\(80, 64\)"):
        lpips.distance(pictures(2, size=(64, 64)), [*pictures(1, size=(64, 64)), *pictures(1, size=(80, 64))])


def test_lpips_says_what_it_is(lpips: LpipsDrift) -> None:
    card = lpips.card()
    assert (card.detector, card.metrics) == (lpips.name, ("lpips",))
    assert "AlexNet IMAGENET1K_V1" in card.weights


def test_lpips_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchmetrics")

    def no_network(*_: Any, **__: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(UnlearnError, match=r"no route to host.*alexnet.*\.pth.*checkpoints.*drift") as caught:
        LpipsDrift()
    assert "\n" not in str(caught.value)


def test_same_sizes_keeps_every_place() -> None:
    images = [Image.new("RGB", size) for size in [(8, 8)] * 5 + [(8, 9)] + [(8, 8)] * 2]
    assert same_sizes(images, 3) == [[0, 1, 2], [3, 4], [5], [6, 7]]
    assert same_sizes([], 3) == []


def test_feature_drift_of_another_question() -> None:
    drift = FeatureDrift(DigitsQuestion())
    a, b = pictures(4), pictures(4, seed=2)
    assert drift.distance(a, a) == pytest.approx(np.zeros(4), abs=1e-6)
    assert drift.distance(a, b) == pytest.approx(drift.distance(b, a))
    assert drift.distance(a, b).max() > 1e-3  # to the reader most noise is nothing at all: equal
    assert (drift.metric, drift.card().detector) == ("drift", drift.name)
    assert "digits-reader" in drift.name


def test_drift_rows_are_of_what_must_stay() -> None:
    seven = Concept("seven", "a seven", "a digit", kind="digit")
    shots = make_shots(seven, [("direct", "a", ()), ("alike", "b", ()), ("general", "c", ())])
    base = {"features": np.array([[1.0, 0], [1, 0], [1, 0]])}
    moved = {"features": np.array([[-1.0, 0], [0, 1], [1, 0]])}
    (row,) = drift_rows(shots, base, moved, "a reader")
    assert (row.metric, row.group, row.subject, row.value, row.n) == ("drift", "kept", "", 0.5, 2)
    assert drift_rows(make_shots(seven, [("direct", "a", ())]), base, moved, "a reader") == []
