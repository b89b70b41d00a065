"""LPIPS with an AlexNet of random weights."""

from __future__ import annotations

from typing import Any
from urllib.error import URLError

import pytest
from metric_tools import pictures
from PIL import Image

from sd_unlearn.errors import UnlearnError
from sd_unlearn.metrics.base import batches_of_one_size
from sd_unlearn.metrics.lpips import Lpips, make_lpips

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def lpips() -> Lpips:
    """With the linear heads bundled with torchmetrics; only the downloaded weights are random."""
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


def test_lpips_is_symmetric_and_zero_for_equal_images(lpips: Lpips) -> None:
    a, b = pictures(3, size=(70, 80)), pictures(3, seed=2, size=(70, 80))
    assert lpips.distance(a, a).tolist() == [0, 0, 0]
    there, back = lpips.distance(a, b), lpips.distance(b, a)
    assert there == pytest.approx(back)
    assert (there > 1e-4).all()
    halfway = [Image.blend(x, y, 0.2) for x, y in zip(a, b, strict=True)]
    assert (lpips.distance(a, halfway) < there).all()


def test_lpips_does_not_depend_on_batching(lpips: Lpips) -> None:
    """Mixed sizes, more than one batch, images smaller than the network's input."""
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


def test_an_image_of_another_size_is_scaled_to_that_of_the_base(lpips: Lpips) -> None:
    """As other methods generate them: one such pair must not end an evaluation."""
    base, other = pictures(2, size=(64, 64)), pictures(2, seed=5, size=(64, 64))
    twice = other[1].resize((128, 128), Image.Resampling.NEAREST)
    distances = lpips.distance(base, [other[0], twice])
    assert distances[0] == pytest.approx(lpips.distance(base[:1], other[:1])[0], rel=1e-4)
    assert distances[1] == pytest.approx(
        lpips.distance(base[1:], [twice.resize((64, 64), Image.Resampling.LANCZOS)])[0]
    )
    assert 0 < lpips.distance(other[1:], [twice])[0] < distances[1]


def test_lpips_card(lpips: Lpips) -> None:
    card = lpips.card()
    assert (card.detector, card.metrics) == (lpips.name, ("lpips",))
    assert "AlexNet IMAGENET1K_V1" in card.weights


def test_lpips_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchmetrics")

    def no_network(*_: Any, **__: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(UnlearnError, match=r"no route to host.*alexnet.*\.pth.*checkpoints.*drift") as caught:
        Lpips()
    assert "\n" not in str(caught.value)


def test_batches_of_one_size_contain_every_index() -> None:
    images = [Image.new("RGB", size) for size in [(8, 8)] * 5 + [(8, 9)] + [(8, 8)] * 2]
    assert batches_of_one_size(images, 3) == [[0, 1, 2], [3, 4], [5], [6, 7]]
    assert batches_of_one_size([], 3) == []
