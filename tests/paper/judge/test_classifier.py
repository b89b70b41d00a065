"""The classifier of a dataset: it learns, is trained once, and its record is correct."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paper_images import Images, brightness_reader, left_or_right, uniform

from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.metrics.statistics import wilson
from sd_unlearn.paper.experiments import STL10
from sd_unlearn.paper.judge import classifier
from sd_unlearn.paper.judge.classifier import class_mask, get_classifier, settings_for, split
from sd_unlearn.paper.judge.resnet import augment, build_network, shrink

pytestmark = pytest.mark.usefixtures("one_thread")
FOLDER = Path("classifiers")


def get(data: Images, seed: int = 0, folder: Path = FOLDER) -> classifier.Classifier:
    return get_classifier(data, 8, "tiny", seed, "cpu", folder)  # type: ignore[arg-type]


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry per training; networks keep their initial weights."""
    done: list[str] = []

    def fit(network: Any, pixels: Any, labels: Any, settings: Any, device: str, title: str) -> None:
        done.append(title)
        time.sleep(0.05)  # long enough for another thread to start
        network.eval()

    monkeypatch.setattr(classifier, "fit", fit)
    return done


def test_it_learns_and_records_its_accuracy() -> None:
    data = left_or_right(480)
    before = torch.get_rng_state()
    found = get(data)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random state is unchanged
    assert found.accuracy > 0.9
    fresh = left_or_right(600)  # the last 120 were not in the training data
    assert (found.probabilities(fresh.data[480:]).argmax(1) == fresh.labels[480:]).mean() > 0.9

    (card_file,) = FOLDER.glob("*.json")
    card = json.loads(card_file.read_text())
    confusion = np.array(card["confusion"])
    assert card["n"] == confusion.sum() == 48
    assert confusion.sum(1).tolist() == [24, 24]  # each class with its share
    assert card["accuracy"] == confusion.trace() / 48 == found.accuracy
    assert (card["low"], card["high"]) == wilson(int(confusion.trace()), 48)
    assert (card["classes"], card["data_sha256"], card["sha256"]) == (["a", "b"], data.sha256, found.sha256)
    assert {p.suffix for p in FOLDER.iterdir()} <= {".json", ".safetensors", ".lock"}
    again = get(data)
    assert again.detector == found.detector == f"resnet-toy sha256:{card['sha256'][:12]}"
    assert np.array_equal(again.probabilities(data.data[:9]), found.probabilities(data.data[:9]))


def test_it_is_trained_once_for_the_same_data_and_settings(fits: list[str]) -> None:
    data = left_or_right()
    first = get(data)
    assert get(data).sha256 == first.sha256
    assert len(fits) == 1
    get(replace(data, sha256="1" * 64))
    get(data, seed=1)
    get(replace(data, test=left_or_right(40)))
    assert len(fits) == 4
    assert get(data).sha256 == first.sha256
    assert len(fits) == len(list(FOLDER.glob("*.json"))) == 4


def test_concurrent_calls_train_once(fits: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(get(left_or_right()).sha256)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fits) == 1
    assert len(found) == 3
    assert len(set(found)) == 1


def test_an_interrupted_training_does_not_count_as_finished(fits: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(classifier, "save_file", broken)
        with pytest.raises(UnlearnError, match="No space left"):
            get(left_or_right())
    assert [p for p in FOLDER.iterdir() if p.suffix != ".lock"] == []
    with monkeypatch.context() as patched:
        patched.setattr(classifier, "write_json", broken)
        with pytest.raises(OSError, match="No space left"):
            get(left_or_right())
    get(left_or_right())  # weights without their record are ignored
    assert len(fits) == 3
    assert len(list(FOLDER.glob("*.json"))) == 1


def test_damaged_weights_are_rejected(fits: list[str]) -> None:
    get(left_or_right())
    (weights,) = FOLDER.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(UnlearnError, match=r"Delete both"):
        get(left_or_right())
    weights.unlink()
    with pytest.raises(UnlearnError, match=r"Delete both"):
        get(left_or_right())


def test_probabilities_do_not_depend_on_batch_size_or_image_size() -> None:
    torch.manual_seed(0)
    settings = settings_for(left_or_right(), 8, "tiny", 0)  # type: ignore[arg-type]
    network = build_network(1, 10, replace(settings, side=32)).eval()
    found = replace(brightness_reader(), network=network)
    images = torch.rand(7, 1, 32, 32) * 2 - 1
    whole = found.probabilities(images)
    assert whole.shape == (7, 10)
    assert whole.sum(1) == pytest.approx(1, abs=1e-5)
    for size in (1, 3):
        assert found.probabilities(images, size) == pytest.approx(whole, abs=1e-5)
    assert found.probabilities(images[:0]).shape == (0, 10)
    large = uniform([4, 7], side=64)
    assert brightness_reader().probabilities(large).argmax(1).tolist() == [4, 7]
    assert shrink(large, 32) == pytest.approx(uniform([4, 7]), abs=1e-6)


def test_accuracy_of_normal_against_sensitive() -> None:
    confusion = np.diag([8] * 10)
    confusion[0, 2] = confusion[4, 1] = 5  # 0 is taken for 2, both even; 4 for 1
    found = brightness_reader(confusion)
    assert found.accuracy == 80 / 90
    assert found.normal_accuracy(("0", "2", "4", "6", "8")) == 85 / 90
    record = found.record(("0", "2", "4", "6", "8"))
    assert (record["accuracy"], record["n"], record["class_accuracy"]) == (85 / 90, 90, 80 / 90)
    assert record["low"] < record["accuracy"] < record["high"]


def test_some_but_not_all_classes_are_normal() -> None:
    assert class_mask(("a", "b", "c"), ("c", "a")).tolist() == [True, False, True]
    with pytest.raises(UsageError, match=r'"horze" is not a class. Did you mean "horse"'):
        class_mask(STL10, ("horze",))
    for none_or_all in ((), STL10):
        with pytest.raises(UsageError, match="are normal"):
            class_mask(STL10, none_or_all)


def labelled(count: int, name: str, test: Images | None = None) -> Images:
    return Images(torch.zeros(1, 3, 8, 8), np.arange(count) % 10, STL10, name, test=test)


@pytest.mark.parametrize(
    ("name", "total", "test", "counts"),
    [
        ("mnist5k", 5_000, 0, (4_500, 500)),
        ("stl10", 13_000, 0, (12_000, 1_000)),
        ("cifar10", 500, 100, (500, 100)),
        ("celeba", 200_000, 0, (40_000, 10_000)),
        ("celeba", 70_000, 20_000, (40_000, 10_000)),
        ("celeba", 1_000, 0, (900, 100)),
    ],
)
def test_held_out_images_are_stratified_and_disjoint(name: str, total: int, test: int, counts: tuple[int, int]) -> None:
    apart = labelled(test, name) if test else None
    data = labelled(total, name, apart)
    settings = settings_for(data, 256, "paper", 3)  # type: ignore[arg-type]
    assert (settings.num_train, settings.num_held_out) == counts
    (source, train), (other, held_out) = split(data, settings)  # type: ignore[arg-type]
    assert (len(train), len(held_out)) == counts
    assert source is data
    assert other is (apart or data)
    assert len(np.unique(train)) == len(train)
    if not apart:
        assert not np.intersect1d(train, held_out).size
    for labels in (data.labels[train], other.labels[held_out]):
        assert np.ptp(np.bincount(labels)) <= 1


def test_settings_depend_on_the_images() -> None:
    digits, colour = left_or_right(), left_or_right(channels=3)
    assert not settings_for(digits, 32, "tiny", 0).mirror  # type: ignore[arg-type]
    assert settings_for(colour, 32, "tiny", 0).mirror  # type: ignore[arg-type]
    sides = [settings_for(colour, side, "paper", 0).side for side in (32, 96, 256)]  # type: ignore[arg-type]
    assert sides == [32, 96, 64]
    strides = [settings_for(digits, side, "tiny", 0).stem_stride for side in (12, 32)]  # type: ignore[arg-type]
    assert strides == [1, 2]  # twelve pixels leave nothing to skip
    with pytest.raises(UsageError, match=r"toy has 9 images of a class"):
        settings_for(left_or_right(18), 8, "tiny", 0)  # type: ignore[arg-type]
    json.dumps(asdict(settings_for(colour, 32, "paper", 0)))  # type: ignore[arg-type]


def test_the_network_of_the_paper_is_resnet_18() -> None:
    settings = settings_for(labelled(500, "cifar10"), 32, "paper", 0)  # type: ignore[arg-type]
    with torch.device("meta"):
        network = build_network(3, 10, settings)
    assert sum(p.numel() for p in network.parameters()) == 11_173_962  # as known for images of CIFAR10


def test_augmentations() -> None:
    still = replace(settings_for(left_or_right(), 8, "tiny", 0), turn=0.0, shift=0.0, flatten=0.0, noise=0.0)  # type: ignore[arg-type]
    images, generator = torch.rand(40, 1, 8, 8), torch.Generator().manual_seed(0)
    assert torch.allclose(augment(images, still, generator), images, atol=1e-5)
    mirrored = augment(images, replace(still, mirror=True), generator)
    same = torch.isclose(mirrored, images, atol=1e-5).flatten(1).all(1)
    turned = torch.isclose(mirrored, images.flip(-1), atol=1e-5).flatten(1).all(1)
    assert (same ^ turned).all()
    assert 5 < same.sum() < 35
    moved = augment(uniform([9] * 4), replace(still, turn=20.0, shift=0.2), generator)
    assert torch.allclose(moved, torch.ones_like(moved), atol=1e-5)  # nothing dark comes in at the edge


def test_contrast_and_noise_stay_within_bounds() -> None:
    still = replace(settings_for(left_or_right(), 8, "tiny", 0), turn=0.0, shift=0.0, flatten=0.0, noise=0.0)  # type: ignore[arg-type]
    images, generator = uniform([0, 9] * 50), torch.Generator().manual_seed(0)
    faded = augment(images, replace(still, flatten=0.4), generator)
    assert faded.flatten(1).std(1).max() < 1e-5  # constant within an image
    lost = (faded - images).abs().flatten(1).mean(1)
    assert 0.3 < lost.max() <= 0.8  # at most from one end to 0.4 of the other
    grainy = augment(torch.zeros(100, 1, 32, 32), replace(still, noise=0.2), generator).flatten(1).std(1)
    assert grainy.min() < 0.02
    assert 0.18 < grainy.max() < 0.22
    assert augment(images, replace(still, noise=0.5), generator).abs().max() == 1
