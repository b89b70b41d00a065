"""A few images in the file formats of MNIST, CIFAR10, STL10 and CelebA, with matching checksums."""

from __future__ import annotations

import gzip
import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

CELEBA_LISTS = (
    "list_attr_celeba.txt",
    "list_eval_partition.txt",
    "identity_CelebA.txt",
    "list_bbox_celeba.txt",
    "list_landmarks_align_celeba.txt",
)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _idx(array: NDArray[np.uint8]) -> bytes:
    """MNIST's format: two zeros, the type, the number of dimensions, each dimension, the bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes() + array.tobytes()


def make_mnist(
    root: Path, monkeypatch: pytest.MonkeyPatch, train: int = 12, test: int = 4, packed: bool = False
) -> NDArray[np.uint8]:
    """`train` images with label i % 10, and `test` images; packed: as .gz. Returns [train, 28, 28]."""
    from torchvision.datasets import MNIST

    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    resources = []
    for part, count, seed in (("train", train, 0), ("t10k", test, 1)):
        labels = np.arange(count, dtype=np.uint8) % 10
        contents = {"images-idx3": noise(count, 28, 28, seed=seed), "labels-idx1": labels}
        for kind, array in contents.items():
            path = folder / f"{part}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(_idx(array)) if packed else _idx(array))
            resources.append((f"{part}-{kind}-ubyte.gz", md5(path)))
    monkeypatch.setattr(MNIST, "resources", resources)
    return noise(train, 28, 28)


def make_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> NDArray[np.uint8]:
    """Five batches of two images, labels 0 to 9, and a test batch of two. Returns [10, 32, 32, 3]."""
    from torchvision.datasets import CIFAR10

    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    images = noise(12, 3, 32, 32)
    names = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]

    def write(name: str, content: Any) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, md5(folder / name)]

    sums = [
        write(name, {"data": images[2 * n : 2 * n + 2].reshape(2, -1), "labels": [2 * n % 10, (2 * n + 1) % 10]})
        for n, name in enumerate(names)
    ]
    classes = "airplane automobile bird cat deer dog frog horse ship truck".split()
    meta = write("batches.meta", {"label_names": classes})
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return images[:10].transpose(0, 2, 3, 1)


def make_stl10(root: Path, monkeypatch: pytest.MonkeyPatch) -> NDArray[np.uint8]:
    """Ten training images, labels 0 to 9, and three test images, labels 9, 8, 7. Returns [13, 96, 96, 3]."""
    from torchvision.datasets import STL10

    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    images = noise(13, 96, 96, 3)
    files = {
        "train_X.bin": images[:10].transpose(0, 3, 2, 1),
        "train_y.bin": np.arange(1, 11, dtype=np.uint8),
        "unlabeled_X.bin": noise(1, 3, 96, 96),
        "test_X.bin": images[10:].transpose(0, 3, 2, 1),
        "test_y.bin": np.array([10, 9, 8], dtype=np.uint8),
    }
    for name, array in files.items():
        (folder / name).write_bytes(array.tobytes())
    sums = [[name, md5(folder / name)] for name in files]
    monkeypatch.setattr(STL10, "train_list", sums[:3])
    monkeypatch.setattr(STL10, "test_list", sums[3:])
    return images


def make_celeba(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight images of 178x218 pixels, the n-th of grey 20 n; parts 0 0 0 0 1 1 2 2; odd n are male."""
    from torchvision.datasets import CelebA

    folder = root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{n + 1:06d}.jpg" for n in range(8)]
    for n, name in enumerate(names):
        Image.new("RGB", (178, 218), (20 * n,) * 3).save(folder / "img_align_celeba" / name, quality=100)
    rows = {
        "list_attr_celeba.txt": [
            "8",
            "Bald Male Young ",
            *(f"{a} -1 {1 if n % 2 else -1:2d}  1" for n, a in enumerate(names)),
        ],
        "list_eval_partition.txt": [f"{a} {part}" for a, part in zip(names, "00001122", strict=True)],
        "identity_CelebA.txt": [f"{a} {n}" for n, a in enumerate(names)],
        "list_bbox_celeba.txt": ["8", "image_id x_1 y_1 width height", *(f"{a}  1  2 30 40" for a in names)],
        "list_landmarks_align_celeba.txt": ["8", "lefteye_x lefteye_y", *(f"{a} 69 109" for a in names)],
    }
    for name, lines in rows.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    listed = [("id", md5(folder / name), name) for name in CELEBA_LISTS]
    monkeypatch.setattr(CelebA, "file_list", [("id", "0" * 32, "img_align_celeba.zip"), *listed])


def make_folders(place: Path, classes: tuple[str, ...], images: int = 2, side: int = 40) -> None:
    """One folder per class with `images` images; the i-th of class c has red 20 c + i."""
    for c, name in enumerate(classes):
        (place / name).mkdir(parents=True)
        for i in range(images):
            Image.new("RGB", (side, side), (20 * c + i, 0, 0)).save(place / name / f"{i}.png")
