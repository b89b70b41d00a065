"""Pictures read by a detector, each once: what was read lies beside them under the detector's name."""

from __future__ import annotations

import hashlib
import os
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tqdm import tqdm

from sd_unlearn.evaluation.aggregate import Seen
from sd_unlearn.io.files import slugify
from sd_unlearn.metrics.base import Columns, PairQuestion, Question

CHUNK = 500  # pictures held in memory at once
_NAMES = "file_names"


def open_images(paths: Sequence[Path]) -> tuple[list[Image.Image], dict[int, str]]:
    """The pictures that can be read, upright and in RGB, and why the others could not, by their index."""
    images, failed = [], {}
    for index, path in enumerate(paths):
        try:
            with Image.open(path) as image:
                images.append(ImageOps.exif_transpose(image).convert("RGB"))
        except FileNotFoundError:
            failed[index] = "missing"
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            failed[index] = " ".join(str(error).split())[:200] or type(error).__name__
    return images, failed


def read(
    question: Question, paths: Sequence[Path], subject: str, cache: Path | None, title: str
) -> tuple[Seen, dict[Path, str]]:
    """What a question sees on pictures, in their order; those it saw before are taken from the cache folder.

    Returns:
        (what was seen, why each unreadable picture could not be read)
    """
    unique = list(dict.fromkeys(paths))
    known = _kept(cache, question.name)
    failed: dict[Path, str] = {}
    missing = [path for path in unique if _key(path, cache) not in known]
    with tqdm(total=len(missing), desc=title, unit="image", file=sys.stderr, disable=not missing) as bar:
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            images, why = open_images(chunk)
            failed |= {chunk[index]: reason for index, reason in why.items()}
            columns = question.read(images)
            good = [path for index, path in enumerate(chunk) if index not in why]
            for index, path in enumerate(good):
                known[_key(path, cache)] = {name: values[index] for name, values in columns.items()}
            bar.update(len(chunk))
            _keep(cache, question.name, known)
    readable = np.array([_key(path, cache) in known and path not in failed for path in paths], dtype=bool)
    chosen = [known[_key(path, cache)] for path, good in zip(paths, readable, strict=True) if good]
    if not chosen:
        return Seen(subject, question.read([]), readable), failed
    columns = {name: np.stack([row[name] for row in chosen]) for name in chosen[0]}
    return Seen(subject, columns, readable), failed


def distances(
    question: PairQuestion, base: Sequence[Path], other: Sequence[Path], cache: Path | None, title: str
) -> NDArray[np.float64]:
    """[N] the distance of each pair, nan where one of the two cannot be read; those known are not looked at again."""
    names = [f"{_key(a, cache)} {_key(b, cache)}" for a, b in zip(base, other, strict=True)]
    known = _kept(cache, question.name)
    missing = [n for n, name in enumerate(names) if name not in known]
    for start in tqdm(range(0, len(missing), CHUNK), desc=title, file=sys.stderr, disable=not missing):
        chunk = missing[start : start + CHUNK]
        sides = [open_images([paths[n] for n in chunk]) for paths in (base, other)]
        bad = {index for _, failed in sides for index in failed}
        pairs = []
        for images, failed in sides:
            order = iter(images)
            opened = [None if index in failed else next(order) for index in range(len(chunk))]
            pairs.append([image for index, image in enumerate(opened) if index not in bad and image is not None])
        values = iter(question.distance(pairs[0], pairs[1]).tolist() if pairs[0] else [])
        for index, n in enumerate(chunk):
            if index not in bad:  # one that is drawn or copied again must be looked at
                known[names[n]] = {"distance": np.array(next(values))}
        _keep(cache, question.name, known)
    return np.array([float(known[name]["distance"]) if name in known else np.nan for name in names], dtype=np.float64)


def _key(path: Path, cache: Path | None) -> str:
    """A picture of a gallery's folder is known by its name, which says prompt and seed; others by size and time."""
    if path.parent == cache:
        return path.name
    try:
        about = path.stat()
    except OSError:
        return path.name
    return f"{path.absolute()}:{about.st_size}:{about.st_mtime_ns}"


def _file(cache: Path, name: str) -> Path:
    return cache / "readings" / f"{slugify(name)[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}.npz"


def _kept(cache: Path | None, name: str) -> dict[str, dict[str, NDArray]]:
    """What was read before, by picture; a damaged file is as none."""
    if cache is None or not _file(cache, name).is_file():
        return {}
    try:
        with np.load(_file(cache, name), allow_pickle=False) as data:
            columns: Columns = {key: data[key] for key in data.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError):
        return {}
    names = columns.pop(_NAMES).tolist()
    return {key: {column: values[n] for column, values in columns.items()} for n, key in enumerate(names)}


def _keep(cache: Path | None, name: str, known: dict[str, dict[str, NDArray]]) -> None:
    if cache is None or not known:
        return
    file = _file(cache, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    first = next(iter(known.values()))
    columns: dict[str, Any] = {column: np.stack([row[column] for row in known.values()]) for column in first}
    columns[_NAMES] = np.array(list(known), dtype=str)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as target:
            np.savez(target, **columns)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
