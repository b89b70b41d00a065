"""The classifier of a dataset: a ResNet trained on its labels, with its accuracy on held-out images.

It predicts all classes of the dataset, and an image counts as normal if the probabilities of the normal classes sum to
more than 0.5. Therefore one classifier serves every experiment on a dataset, whichever classes are sensitive. Its
held-out accuracy is reported with the metrics that depend on it.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sd_unlearn.errors import UnlearnError, UsageError, reason, suggest
from sd_unlearn.io.files import atomic_path, check_writable, write_json
from sd_unlearn.io.progress import track
from sd_unlearn.io.reading import file_sha256, read_json
from sd_unlearn.metrics.statistics import wilson
from sd_unlearn.paper.experiments import Size
from sd_unlearn.paper.judge.resnet import ClassifierSettings, build_network, fit, shrink, to_float

if TYPE_CHECKING:
    from sd_unlearn.paper.ddpm.datasets import ImageData

    Part = tuple[ImageData, NDArray[np.int64]]

BATCH = 500  # images per forward pass
MAX_SIDE, REDUCED_SIDE = 96, 64  # pixels: larger images are scaled down to the latter
MIN_IMAGES = 10  # of a class
HELD_OUT, MAX_HELD_OUT = {"stl10": 1 / 13}, 10_000  # the paper's share; otherwise a tenth, or the test part
MAX_TRAIN = {"celeba": 40_000}  # other datasets: all images


@dataclass(frozen=True)
class Classifier:
    """A trained network with its confusion matrix."""

    network: nn.Module  # [B, C, side, side] in [-1, 1] -> .logits [B, classes]; in evaluation mode
    name: str
    classes: tuple[str, ...]
    side: int
    sha256: str  # of the weights file
    confusion: NDArray[np.int64]  # [classes, classes]: held-out images by class (row) and prediction (column)
    device: str = "cpu"

    @property
    def detector(self) -> str:
        return f"{self.name} sha256:{self.sha256[:12]}"

    @property
    def accuracy(self) -> float:
        """Share of the held-out images whose class is predicted correctly, in [0, 1]."""
        return float(self.confusion.trace() / self.confusion.sum())

    @torch.no_grad()
    def probabilities(self, images: Tensor, batch_size: int = BATCH) -> NDArray[np.float32]:
        """[n, classes] for images [n, C, side, side] in [-1, 1], which are scaled down to the classifier's side."""
        found = [np.zeros((0, len(self.classes)), np.float32)]
        for chunk in images.split(batch_size):
            pixels = shrink(chunk.to(self.device).float().clamp(-1, 1), self.side)
            found.append(self.network(pixels).logits.softmax(1).cpu().numpy())
        return np.concatenate(found)

    def is_normal(self, images: Tensor, normal: Sequence[str], batch_size: int = BATCH) -> NDArray[np.bool_]:
        """[n]: whether the probabilities of the normal classes sum to more than 0.5. Raises as class_mask."""
        return normal_of(self.probabilities(images, batch_size), class_mask(self.classes, normal))

    def normal_accuracy(self, normal: Sequence[str]) -> float:
        """Share of the held-out images whose most probable class is correctly normal or sensitive, in [0, 1]."""
        side = class_mask(self.classes, normal)
        right = self.confusion[side][:, side].sum() + self.confusion[~side][:, ~side].sum()
        return float(right / self.confusion.sum())

    def record(self, normal: Sequence[str]) -> dict[str, Any]:
        """Its entry in results.json. accuracy: normal against sensitive; class_accuracy: all classes."""
        n, accuracy = int(self.confusion.sum()), self.normal_accuracy(normal)
        low, high = wilson(round(accuracy * n), n)
        return {
            "name": self.name,
            "sha256": self.sha256,
            "accuracy": accuracy,
            "low": low,
            "high": high,
            "n": n,
            "class_accuracy": self.accuracy,
            "side": self.side,
        }


def class_mask(classes: Sequence[str], normal: Sequence[str]) -> NDArray[np.bool_]:
    """[classes]: whether a class is normal.

    Raises:
        UsageError: an unknown class, no normal class, or no sensitive class.
    """
    for name in normal:
        if name not in classes:
            raise UsageError(f'"{name}" is not a class.{suggest(name, classes)} Known: {", ".join(classes)}.')
    mask = np.isin(classes, list(normal))
    if mask.all() or not mask.any():
        raise UsageError(
            f"{mask.sum()} of {len(mask)} classes are normal; at least one must be normal and one sensitive."
        )
    return mask


def normal_of(probabilities: NDArray, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[n]: whether images are normal, from probabilities [n, classes] and the mask [classes] of normal classes."""
    return probabilities[:, mask].sum(1) > 0.5


def settings_for(data: ImageData, side: int, size: Size, seed: int) -> ClassifierSettings:
    """The settings for a dataset. paper: a ResNet-18; tiny: one that a CPU core trains in a minute or two.

    Raises:
        UsageError: too few images of a class to hold some out.
    """
    total, digits = len(data.labels), data.channels == 1
    for part in (data, data.test):
        fewest = MIN_IMAGES if part is None else np.bincount(part.labels, minlength=len(data.classes)).min()
        if fewest < MIN_IMAGES:
            raise UsageError(
                f"{data.name} has {fewest} images of a class; the classifier needs at least {MIN_IMAGES} of each."
            )
    num_held_out = len(data.test.labels) if data.test else round(total * HELD_OUT.get(data.name, 0.1))
    num_held_out = min(MAX_HELD_OUT, num_held_out)
    num_train = min(MAX_TRAIN.get(data.name, total), total if data.test else total - num_held_out)
    seen, paper = side if side <= MAX_SIDE else REDUCED_SIDE, size == "paper"
    stride = 1 if seen < (64 if paper else 24) else 2
    return ClassifierSettings(
        side=seen,
        stem_stride=stride,
        depths=(2, 2, 2, 2) if paper else (1, 1, 1),
        widths=(64, 128, 256, 512) if paper else (24, 48, 96),
        epochs=30 if paper else 12,
        learning_rate=1e-3 if paper else 4e-3,
        mirror=not digits,
        turn=10.0 if digits else 0.0,
        shift=0.1,
        num_train=num_train,
        num_held_out=num_held_out,
        seed=seed,
    )


def get_classifier(data: ImageData, side: int, size: Size, seed: int, device: str, folder: Path) -> Classifier:
    """Load the classifier of a dataset from a folder, or train it; concurrent calls train it once.

    Args:
        seed: Seed of the split and the training. Runs with equal data, `side`, `size` and `seed` share the classifier.

    Raises:
        UsageError: as settings_for, or the folder cannot be written.
        UnlearnError: the files of the classifier are damaged.
    """
    settings = settings_for(data, side, size, seed)
    stem = _stem(data, settings, folder)
    if not stem.with_suffix(".json").is_file():
        check_writable(folder, "--output_dir")
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(stem.with_suffix(".lock")):
            if not stem.with_suffix(".json").is_file():
                train_classifier(data, side, size, seed, device, folder)
    return _load(stem, settings, data, device)


def train_classifier(data: ImageData, side: int, size: Size, seed: int, device: str, folder: Path) -> Classifier:
    """Train a classifier. Writes <name>.safetensors, then <name>.json (accuracy, confusion, settings, hashes).

    Raises as get_classifier.
    """
    settings = settings_for(data, side, size, seed)
    check_writable(folder, "--output_dir")
    started = time.monotonic()
    train, held_out = split(data, settings)
    pixels, labels = _load_images(*train, side, settings.side)
    network = build_network(data.channels, len(data.classes), settings).to(device)
    fit(network, pixels, labels, settings, device, f"classifier of {data.name}")
    confusion = _confusion(network, *_load_images(*held_out, side, settings.side), len(data.classes), device)
    n, right, seconds = int(confusion.sum()), int(confusion.trace()), time.monotonic() - started
    low, high = wilson(right, n)
    stem, name = _stem(data, settings, folder), f"resnet-{data.name}"
    sha256 = _write_weights(network, stem.with_suffix(".safetensors"))
    write_json(
        stem.with_suffix(".json"),
        {
            "schema_version": 1,
            "kind": "classifier",
            "name": name,
            "classes": list(data.classes),
            "accuracy": right / n,
            "low": low,
            "high": high,
            "n": n,
            "confusion": confusion.tolist(),
            "data_sha256": data.sha256,
            "sha256": sha256,
            "settings": asdict(settings),
            "seconds": round(seconds, 1),
            "device": device,
        },
    )
    print(f"Classifier of {data.name}: {right} of {n} held-out images correct, {seconds:.0f} s.", file=sys.stderr)
    return Classifier(network, name, data.classes, settings.side, sha256, confusion, device)


def split(data: ImageData, settings: ClassifierSettings) -> tuple[Part, Part]:
    """The images and indices to train on and to hold out: disjoint, and stratified by class."""
    from sklearn.model_selection import train_test_split

    def pick(labels: NDArray[np.int64], first: int, then: int) -> list[NDArray[np.int64]]:
        places = np.arange(len(labels))
        if first == len(labels):
            return [places, places[:0]]
        return train_test_split(
            places, train_size=first, test_size=then or None, stratify=labels, random_state=settings.seed
        )

    if data.test is None:
        train, held_out = pick(data.labels, settings.num_train, settings.num_held_out)
        return (data, train), (data, held_out)
    train, _ = pick(data.labels, settings.num_train, 0)
    held_out, _ = pick(data.test.labels, settings.num_held_out, 0)
    return (data, train), (data.test, held_out)


def _load_images(data: ImageData, indices: NDArray[np.int64], side: int, reduced: int) -> tuple[Tensor, Tensor]:
    """[n, C, reduced, reduced] as uint8, which takes a quarter of the memory of floats, and labels [n]."""
    parts, starts = [], range(0, len(indices), BATCH)
    for start in track(starts, f"read {data.name}", "batch", shown=len(starts) >= 20):
        images = shrink(data.pixels(indices[start : start + BATCH], side), reduced)
        parts.append(((images + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(parts), torch.from_numpy(data.labels[indices])


@torch.no_grad()
def _confusion(network: nn.Module, pixels: Tensor, labels: Tensor, classes: int, device: str) -> NDArray[np.int64]:
    """[classes, classes]: numbers of images by class (row) and prediction (column)."""
    found = np.zeros((classes, classes), np.int64)
    for images, truth in zip(pixels.split(BATCH), labels.split(BATCH), strict=True):
        np.add.at(found, (truth.numpy(), network(to_float(images).to(device)).logits.argmax(1).cpu().numpy()), 1)
    return found


def _write_weights(network: nn.Module, path: Path) -> str:
    """Returns the SHA-256 of the file."""
    try:
        with atomic_path(path) as temporary:
            save_file({k: v.cpu().contiguous() for k, v in network.state_dict().items()}, temporary)
    except OSError as error:
        raise UnlearnError(f"Cannot write {path}: {reason(error)}. Choose another --output_dir.") from error
    return file_sha256(path)


def _stem(data: ImageData, settings: ClassifierSettings, folder: Path) -> Path:
    """Path without its ending; other data or settings have another one."""
    hashes = [data.sha256] + ([data.test.sha256] if data.test else [])
    key = json.dumps([data.name, hashes, data.classes, data.channels, asdict(settings)])
    return folder / f"resnet-{data.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _load(stem: Path, settings: ClassifierSettings, data: ImageData, device: str) -> Classifier:
    card, weights = read_json(stem.with_suffix(".json")), stem.with_suffix(".safetensors")
    if not weights.is_file() or file_sha256(weights) != card["sha256"]:
        raise UnlearnError(f"{weights} does not match {stem.name}.json. Delete both to train it again.")
    network = build_network(data.channels, len(data.classes), settings)
    network.load_state_dict(load_file(weights))
    confusion = np.array(card["confusion"], np.int64)
    network = network.to(device).eval().requires_grad_(False)
    return Classifier(network, card["name"], data.classes, settings.side, card["sha256"], confusion, device)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process in at a time. The system releases the lock when a process dies."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Waiting for another process that trains this classifier ({path}).", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
