"""Run a metric's detector on image files once; its output is cached in the folder of the images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sd_unlearn.io.files import atomic_path
from sd_unlearn.io.images import UnreadableImage, open_image
from sd_unlearn.io.lock import remove_leftovers
from sd_unlearn.io.paths import slugify
from sd_unlearn.io.progress import Progress, track
from sd_unlearn.metrics.base import DetectorOutput, PairMetric

CHUNK = 500  # images held in memory at once
CACHE_DIR = "readings"
MISSING = "missing"  # the reason of an image that does not exist
_NAMES = "file_names"

_CachedOutputs = dict[str, dict[str, NDArray]]  # image key -> name of the array -> its value for the image


class Detector(Protocol):
    """The part of a metric that reads images."""

    @property
    def name(self) -> str: ...

    def read(self, images: Sequence[Image.Image]) -> DetectorOutput: ...


@dataclass(frozen=True)
class Detections:
    """A detector's output on the N images of one subject. Unreadable images have no entry in `output`."""

    subject: str
    output: DetectorOutput  # of the readable images, in their order
    readable: NDArray[np.bool_]  # [N]


def open_images(paths: Sequence[Path]) -> tuple[list[Image.Image], dict[int, str]]:
    """The readable images, and the reason for each unreadable one by its index."""
    images, failed = [], {}
    for index, path in enumerate(paths):
        try:
            images.append(open_image(path))
        except UnreadableImage as error:
            failed[index] = error.why if path.exists() else MISSING
    return images, failed


def detect(
    metric: Detector, paths: Sequence[Path], subject: str, cache: Path | None, title: str
) -> tuple[Detections, dict[Path, str]]:
    """A metric's output on image files, in their order; images that are in the cache folder are not read again.

    Returns:
        (detections, the reason for each unreadable image)
    """
    unique = list(dict.fromkeys(paths))
    known = _load(cache, metric.name)
    failed: dict[Path, str] = {}
    missing = [path for path in unique if _key(path, cache) not in known]
    with Progress(len(missing), title, "image") as progress:
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            images, reasons = open_images(chunk)
            failed |= {chunk[index]: reason for index, reason in reasons.items()}
            output = metric.read(images)
            opened = [path for index, path in enumerate(chunk) if index not in reasons]
            for index, path in enumerate(opened):
                known[_key(path, cache)] = {name: values[index] for name, values in output.items()}
            progress.advance(len(chunk))
            _save(cache, metric.name, known)
    readable = np.array([_key(path, cache) in known and path not in failed for path in paths], dtype=bool)
    entries = [known[_key(path, cache)] for path, is_readable in zip(paths, readable, strict=True) if is_readable]
    if not entries:
        return Detections(subject, metric.read([]), readable), failed
    output = {name: np.stack([entry[name] for entry in entries]) for name in entries[0]}
    return Detections(subject, output, readable), failed


def pair_distances(
    metric: PairMetric, base: Sequence[Path], other: Sequence[Path], cache: Path | None, title: str
) -> NDArray[np.float64]:
    """[N] the distance of each pair of image files, nan if one of them is unreadable; cached as in `detect`."""
    keys = [f"{_key(a, cache)} {_key(b, cache)}" for a, b in zip(base, other, strict=True)]
    known = _load(cache, metric.name)
    missing = [n for n, key in enumerate(keys) if key not in known]
    for start in track(range(0, len(missing), CHUNK), title, "batch"):
        chunk = missing[start : start + CHUNK]
        both = [(_open_or_none(base[n]), _open_or_none(other[n])) for n in chunk]
        pairs = [(n, a, b) for n, (a, b) in zip(chunk, both, strict=True) if a is not None and b is not None]
        if pairs:
            distances = metric.distance([a for _, a, _ in pairs], [b for _, _, b in pairs])
            for (n, _, _), distance in zip(pairs, distances, strict=True):  # unreadable pairs are tried again next time
                known[keys[n]] = {"distance": np.array(float(distance))}
        _save(cache, metric.name, known)
    return np.array([float(known[key]["distance"]) if key in known else np.nan for key in keys], dtype=np.float64)


def _open_or_none(path: Path) -> Image.Image | None:
    images, _ = open_images([path])
    return images[0] if images else None


def _key(path: Path, cache: Path | None) -> str:
    """Generated images are identified by their name (prompt and seed), other files by path, size and time."""
    if path.parent == cache:
        return path.name
    try:
        status = path.stat()
    except OSError:
        return path.name
    return f"{path.absolute()}:{status.st_size}:{status.st_mtime_ns}"


def _cache_file(cache: Path, name: str) -> Path:
    return cache / CACHE_DIR / f"{slugify(name)[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}.npz"


def _load(cache: Path | None, name: str) -> _CachedOutputs:
    """The cached output of a detector; a damaged file counts as empty."""
    if cache is None or not _cache_file(cache, name).is_file():
        return {}
    try:
        with np.load(_cache_file(cache, name), allow_pickle=False) as data:
            output: DetectorOutput = {key: data[key] for key in data.files}
        keys = output.pop(_NAMES).tolist()
        if any(len(values) != len(keys) for values in output.values()):
            return {}
        return {str(key): {column: values[n] for column, values in output.items()} for n, key in enumerate(keys)}
    except Exception:  # zipfile, zlib, struct and NumPy raise many types; huge shapes a MemoryError
        return {}


def _save(cache: Path | None, name: str, known: _CachedOutputs) -> None:
    if cache is None or not known:
        return
    first = next(iter(known.values()))
    arrays: dict[str, Any] = {column: np.stack([entry[column] for entry in known.values()]) for column in first}
    arrays[_NAMES] = np.array(list(known), dtype=str)
    remove_leftovers(_cache_file(cache, name).parent)
    with atomic_path(_cache_file(cache, name)) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
