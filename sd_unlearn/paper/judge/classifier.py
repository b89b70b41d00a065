"""The judge of a dataset: a residual network that tells its classes apart, trained on its labels, its accuracy stated.

It reads all classes of the dataset, and a picture is normal when the probabilities of the normal ones sum to more than
a half. So one classifier serves every experiment on a dataset, whichever classes that calls sensitive. Figures by it
hold as far as it is right: its accuracy on images it was not trained on stands beside them.
"""

from __future__ import annotations

import hashlib
import json
import os
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
from tqdm import tqdm

from sd_unlearn.errors import UnlearnError, UsageError, suggest
from sd_unlearn.io.files import check_writable, file_sha256, read_json, write_json
from sd_unlearn.metrics.statistics import wilson
from sd_unlearn.paper.experiments import Size
from sd_unlearn.paper.judge.resnet import ClassifierSettings, build_network, fit, shrink, to_float

if TYPE_CHECKING:
    from sd_unlearn.paper.ddpm.datasets import ImageData

    Part = tuple[ImageData, NDArray[np.int64]]

BATCH = 500  # pictures a network reads at once
LARGEST, SMALLER = 96, 64  # pixels: what is larger is shrunk to the latter
FEWEST = 10  # images of a class
HELD_OUT, MOST_HELD_OUT = {"stl10": 1 / 13}, 10_000  # the paper's share; else a tenth, or the dataset's test part
MOST_TRAIN = {"celeba": 40_000}  # the others: all there is


@dataclass(frozen=True)
class Classifier:
    """A trained network and what is known of it."""

    network: nn.Module  # [B, C, side, side] in [-1, 1] -> .logits [B, classes]; in evaluation mode
    name: str
    classes: tuple[str, ...]
    side: int
    sha256: str  # of the file of weights
    confusion: NDArray[np.int64]  # [classes, classes] held-out images: what they are, what they are read as
    device: str = "cpu"

    @property
    def detector(self) -> str:
        return f"{self.name} sha256:{self.sha256[:12]}"

    @property
    def accuracy(self) -> float:
        """Share of the held-out images whose class is read right, in [0, 1]."""
        return float(self.confusion.trace() / self.confusion.sum())

    @torch.no_grad()
    def probabilities(self, images: Tensor, batch_size: int = BATCH) -> NDArray[np.float32]:
        """[n, classes] of pictures [n, C, side, side] in [-1, 1] of any side; larger ones are shrunk."""
        found = [np.zeros((0, len(self.classes)), np.float32)]
        for chunk in images.split(batch_size):
            pixels = shrink(chunk.to(self.device).float().clamp(-1, 1), self.side)
            found.append(self.network(pixels).logits.softmax(1).cpu().numpy())
        return np.concatenate(found)

    def is_normal(self, images: Tensor, normal: Sequence[str], batch_size: int = BATCH) -> NDArray[np.bool_]:
        """[n] whether the probabilities of the normal classes sum to more than 0.5. Raises as class_mask."""
        return normal_of(self.probabilities(images, batch_size), class_mask(self.classes, normal))

    def normal_accuracy(self, normal: Sequence[str]) -> float:
        """Share of the held-out images read on the right side, normal or sensitive, by their most probable class."""
        side = class_mask(self.classes, normal)
        right = self.confusion[side][:, side].sum() + self.confusion[~side][:, ~side].sum()
        return float(right / self.confusion.sum())

    def record(self, normal: Sequence[str]) -> dict[str, Any]:
        """What results.json says of it. accuracy: of normal or sensitive; class_accuracy: of all classes."""
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
    """[classes] which are normal.

    Raises:
        UsageError: a name that is no class, or no normal or no sensitive class.
    """
    for name in normal:
        if name not in classes:
            raise UsageError(f'"{name}" is no class.{suggest(name, classes)} Known: {", ".join(classes)}.')
    mask = np.isin(classes, list(normal))
    if mask.all() or not mask.any():
        raise UsageError(f"{mask.sum()} of {len(mask)} classes are normal; name some, and leave some sensitive.")
    return mask


def normal_of(probabilities: NDArray, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[n] which pictures are normal, by probabilities [n, classes] and the mask [classes] of the normal ones."""
    return probabilities[:, mask].sum(1) > 0.5


def settings_for(data: ImageData, side: int, size: Size, seed: int) -> ClassifierSettings:
    """The settings of a dataset: ResNet-18 for "paper"; for "tiny" one that a CPU core trains in a minute or two.

    Raises:
        UsageError: too few images of a class to hold any out.
    """
    total, digits = len(data.labels), data.channels == 1
    for part in (data, data.test):
        fewest = FEWEST if part is None else np.bincount(part.labels, minlength=len(data.classes)).min()
        if fewest < FEWEST:
            raise UsageError(f"{data.name} has {fewest} images of a class; a classifier needs {FEWEST} of each.")
    num_held_out = len(data.test.labels) if data.test else round(total * HELD_OUT.get(data.name, 0.1))
    num_held_out = min(MOST_HELD_OUT, num_held_out)
    num_train = min(MOST_TRAIN.get(data.name, total), total if data.test else total - num_held_out)
    seen, paper = side if side <= LARGEST else SMALLER, size == "paper"
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
    """The classifier of a dataset from the folder, trained first if it is not there: once, however many ask at a time.

    seed: of the split and the training. Runs that share the data, `side`, `size` and `seed` share the classifier.

    Raises:
        UsageError: as of settings_for; the folder cannot be written.
        UnlearnError: what is there is damaged.
    """
    settings = settings_for(data, side, size, seed)
    stem = _stem(data, settings, folder)
    if not stem.with_suffix(".json").is_file():
        check_writable(folder, "--output_dir")
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(stem.with_suffix(".lock")):
            if not stem.with_suffix(".json").is_file():
                train_classifier(data, side, size, seed, device, folder)
    return _load(stem, settings, data, device)


def train_classifier(data: ImageData, side: int, size: Size, seed: int, device: str, folder: Path) -> Classifier:
    """Train one and write <name>.safetensors, then <name>.json (accuracy, confusion, settings, hashes).

    Raises: as get_classifier.
    """
    settings = settings_for(data, side, size, seed)
    check_writable(folder, "--output_dir")
    started = time.monotonic()
    train, held_out = split(data, settings)
    pixels, labels = _read(*train, side, settings.side)
    network = build_network(data.channels, len(data.classes), settings).to(device)
    fit(network, pixels, labels, settings, device, f"classifier of {data.name}")
    confusion = _confusion(network, *_read(*held_out, side, settings.side), len(data.classes), device)
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
    print(f"Classifier of {data.name}: {right} of {n} held-out images read right, {seconds:.0f} s.", file=sys.stderr)
    return Classifier(network, name, data.classes, settings.side, sha256, confusion, device)


def split(data: ImageData, settings: ClassifierSettings) -> tuple[Part, Part]:
    """What to train on and what to hold out: images and their indices; disjoint, each class with its share in both."""
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


def _read(data: ImageData, indices: NDArray[np.int64], side: int, smaller: int) -> tuple[Tensor, Tensor]:
    """[n, C, smaller, smaller] uint8, a quarter of what floats take, and labels [n]."""
    parts, starts = [], range(0, len(indices), BATCH)
    for start in tqdm(starts, f"read {data.name}", unit_scale=BATCH, unit="image", disable=len(starts) < 20):
        images = shrink(data.pixels(indices[start : start + BATCH], side), smaller)
        parts.append(((images + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(parts), torch.from_numpy(data.labels[indices])


@torch.no_grad()
def _confusion(network: nn.Module, pixels: Tensor, labels: Tensor, classes: int, device: str) -> NDArray[np.int64]:
    """[classes, classes] how many images of a class (row) are read as each (column)."""
    found = np.zeros((classes, classes), np.int64)
    for images, truth in zip(pixels.split(BATCH), labels.split(BATCH), strict=True):
        np.add.at(found, (truth.numpy(), network(to_float(images).to(device)).logits.argmax(1).cpu().numpy()), 1)
    return found


def _write_weights(network: nn.Module, path: Path) -> str:
    """Their SHA-256, once they lie under their name."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.cpu().contiguous() for k, v in network.state_dict().items()}, temporary)
        sha256 = file_sha256(temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UnlearnError(f"Cannot write {path}: {error.strerror}. Choose another --output_dir.") from error
    return sha256


def _stem(data: ImageData, settings: ClassifierSettings, folder: Path) -> Path:
    """Path without its ending: other data or settings have other files."""
    hashes = [data.sha256] + ([data.test.sha256] if data.test else [])
    told = json.dumps([data.name, hashes, data.classes, data.channels, asdict(settings)])
    return folder / f"resnet-{data.name}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def _load(stem: Path, settings: ClassifierSettings, data: ImageData, device: str) -> Classifier:
    card, weights = read_json(stem.with_suffix(".json")), stem.with_suffix(".safetensors")
    if not weights.is_file() or file_sha256(weights) != card["sha256"]:
        raise UnlearnError(f"{weights} is not what {stem.name}.json says. Delete both: it is trained again.")
    network = build_network(data.channels, len(data.classes), settings)
    network.load_state_dict(load_file(weights))
    confusion = np.array(card["confusion"], np.int64)
    network = network.to(device).eval().requires_grad_(False)
    return Classifier(network, card["name"], data.classes, settings.side, card["sha256"], confusion, device)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While one process at a time is here; the system lets the next in when one dies."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process trains this classifier ({path}); waiting for it.", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
