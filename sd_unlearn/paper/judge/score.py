"""Metrics of generated images: how many are normal, and their distance to real normal images.

Every image counts in every metric, including images that resemble no class: the classifier assigns a class to them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate, pad

from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.metrics.digits import FEATURE_WIDTH, DigitsClassifier, load_reader
from sd_unlearn.metrics.fidelity import InceptionFidelity, distance_row
from sd_unlearn.metrics.mmd import FEWEST
from sd_unlearn.metrics.reader import distance_rows
from sd_unlearn.metrics.statistics import wilson
from sd_unlearn.paper.ddpm.sample import to_bytes
from sd_unlearn.paper.experiments import DIGITS
from sd_unlearn.paper.judge.classifier import BATCH, Classifier, class_mask, normal_of
from sd_unlearn.results import Row

if TYPE_CHECKING:
    from sd_unlearn.paper.ddpm.datasets import ImageData

Fidelity = Literal["digits", "inception"]
MAX_REAL = 10_000  # real images that a distance is computed to
READER_SIDE, MIDDLE = 32, 24
MAX_SHOWN = 200  # images of a grid
SECOND_OPINION = "second opinion"
SENSITIVE_FRAME, FRAME = (0xD0, 0x20, 0x20), (0xC8, 0xCC, 0xD0)  # red and thick, grey and thin
EDGE, THICK = 6, 5  # pixels around each image of a grid, and the width of the red frame


def measure(
    samples: Tensor,
    data: ImageData,
    normal: Sequence[str],
    classifier: Classifier,
    fidelity: Fidelity,
    real_indices: Sequence[int] | NDArray[np.int64] | None = None,
    *,
    inception_weights: Path | None = None,
    device: str = "cpu",
) -> list[Row]:
    """The metrics of images [n, C, side, side], which are clamped to [-1, 1].

    non_sensitive_rate (group "all"; for digits also "second opinion", by the bundled reader of digits), the share of
    each class, and fid-* and kid-* to the real images `real_indices`: by default all normal ones, at most 10,000.

    Raises:
        UsageError: no images, wrong channels, an unknown class, too few real images, or fidelity "digits" for images
            of something else.
        UnlearnError: images that are not finite; and as InceptionFidelity.
    """
    mask = class_mask(data.classes, normal)
    _check(samples, data, fidelity)
    real = real_normal(data, normal) if real_indices is None else np.asarray(real_indices)
    if len(real) < FEWEST:
        raise UsageError(f"{len(real)} real normal images of {data.name}; a distance needs at least {FEWEST}.")
    samples = samples.float().clamp(-1, 1)
    probabilities = classifier.probabilities(samples)
    note = "the probabilities of the normal classes sum to more than 0.5"
    rows = [_rate("non_sensitive_rate", "all", normal_of(probabilities, mask), classifier.detector, note)]
    if data.classes == DIGITS and data.channels == 1:
        digits, reader = read_digits(samples, device), DigitsClassifier().name
        rows.append(_rate("non_sensitive_rate", SECOND_OPINION, normal_of(digits, mask), reader, note))
    predicted = probabilities.argmax(1)
    for index, name in enumerate(data.classes):
        rows.append(_rate("share", name, predicted == index, classifier.detector, "the most probable class"))
    if fidelity == "digits":
        return rows + _distances_to_real_digits(samples, data, real, device)
    return rows + _distances_to_real_images(samples, data, real, inception_weights, device)


def real_normal(data: ImageData, normal: Sequence[str], limit: int = MAX_REAL) -> NDArray[np.int64]:
    """Indices of all normal images, or of `limit` of them, which are always the same."""
    indices = np.flatnonzero(class_mask(data.classes, normal)[data.labels])
    if len(indices) > limit:
        indices = np.sort(np.random.default_rng(0).choice(indices, limit, replace=False))
    return indices


@torch.no_grad()
def digit_features(images: Tensor, device: str = "cpu") -> NDArray[np.float32]:
    """Features [n, 64] of the bundled reader for digits [n, 1, 32, 32] or smaller, in [-1, 1]."""
    reader, features = load_reader().to(device), [np.zeros((0, FEATURE_WIDTH), np.float32)]
    for chunk in images.split(BATCH):
        digits = at_reader_size(chunk.to(device).float())
        features.append(reader.features(digits.expand(-1, 3, -1, -1)).cpu().numpy())
    reader.to("cpu")  # the reader is shared
    return np.concatenate(features)


def at_reader_size(digits: Tensor) -> Tensor:
    """[n, 1, 32, 32]: smaller digits are enlarged to 24 pixels, the middle they were scaled from, and padded."""
    if digits.shape[-1] == READER_SIDE:
        return digits
    enlarged = interpolate(digits, (MIDDLE, MIDDLE), mode="bicubic", align_corners=False).clamp(-1, 1)
    return pad(enlarged, [(READER_SIDE - MIDDLE) // 2] * 4, value=-1.0)


@torch.no_grad()
def read_digits(images: Tensor, device: str = "cpu") -> NDArray[np.float32]:
    """Probabilities [n, 10] of the digits 0 to 9 by the bundled reader."""
    features = torch.from_numpy(digit_features(images, device))
    return load_reader().digit(features).softmax(1).numpy()


def to_images(images: Tensor) -> list[Image.Image]:
    """PIL images of [n, C, H, W] in [-1, 1]; one channel gives grey."""
    pixels = to_bytes(images.float().cpu())
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p).convert("RGB") for p in pixels]


def image_grid(samples: Tensor, sensitive: NDArray[np.bool_], columns: int = 20, limit: int = MAX_SHOWN) -> Image.Image:
    """A contact sheet of the first images of [n, C, side, side] in [-1, 1]; `sensitive` [n] get a thick red frame.

    Small images are enlarged by a whole factor to about 64 pixels, large ones reduced to 128.

    Raises:
        UsageError: no images, or a mask of another length.
    """
    if not len(samples) or len(samples) != len(sensitive):
        raise UsageError(
            f"{len(samples)} images and {len(sensitive)} classifications do not make a grid; give one for each image."
        )
    shown = to_images(samples[:limit])
    side = samples.shape[-1]
    size = min(128, side * max(1, 64 // side))
    cell, columns = size + 2 * EDGE, min(columns, len(shown))
    sheet = Image.new("RGB", (columns * cell, -(-len(shown) // columns) * cell), "white")
    draw = ImageDraw.Draw(sheet)
    resampling = Image.Resampling.NEAREST if size >= side else Image.Resampling.LANCZOS
    for place, (image, red) in enumerate(zip(shown, sensitive, strict=False)):
        x, y = place % columns * cell, place // columns * cell
        width = THICK if red else 1
        inner = EDGE - width
        box = (x + inner, y + inner, x + cell - inner - 1, y + cell - inner - 1)
        draw.rectangle(box, outline=SENSITIVE_FRAME if red else FRAME, width=width)
        sheet.paste(image.resize((size, size), resampling), (x + EDGE, y + EDGE))
    return sheet


def _check(samples: Tensor, data: ImageData, fidelity: Fidelity) -> None:
    if samples.ndim != 4 or not len(samples) or samples.shape[1] != data.channels:
        raise UsageError(
            f"Images have shape {tuple(samples.shape)}, but [n > 0, {data.channels}, side, side] is needed."
        )
    if broken := int((~samples.isfinite()).flatten(1).any(1).sum()):
        raise UnlearnError(
            f"{broken} of {len(samples)} images are not finite: training has diverged. "
            "Lower --learning_rate or --eta, or train without --mixed_precision fp16."
        )
    if fidelity == "digits" and not (data.classes == DIGITS and samples.shape[1] == 1):
        raise UsageError(f"The reader of digits does not apply to {data.name}. Use inception.")


def _rate(metric: str, group: str, hits: NDArray[np.bool_], detector: str, note: str) -> Row:
    n, count = len(hits), int(hits.sum())
    return Row(metric, group, "", count / n, n, *wilson(count, n), detector, "wilson", note)


def _few(metric: str, n: int, detector: str) -> list[Row]:
    note = f"unknown: {n} pictures are fewer than {FEWEST}"
    return [Row(metric, "all", "", None, n, detector=detector, interval="none", note=note)]


def _distances_to_real_digits(samples: Tensor, data: ImageData, real: NDArray[np.int64], device: str) -> list[Row]:
    detector = DigitsClassifier().name
    if len(samples) < FEWEST:
        return _few("kid-digits", len(samples), detector)
    chunks = [real[start : start + BATCH] for start in range(0, len(real), BATCH)]
    features = np.concatenate([digit_features(data.pixels(chunk, READER_SIDE), device) for chunk in chunks])
    note = f"of the pictures to {len(real):,} real normal images of {data.name}"
    return distance_rows(digit_features(samples, device), features, "all", "", detector, note)


def _distances_to_real_images(
    samples: Tensor, data: ImageData, real: NDArray[np.int64], weights: Path | None, device: str
) -> list[Row]:
    inception = InceptionFidelity(weights, device=device)
    if len(samples) < FEWEST:
        return _few("kid-inception", len(samples), inception.name)
    side = samples.shape[-1]
    generated = [inception.read(to_images(chunk))["features"] for chunk in samples.split(BATCH)]
    chunks = [real[start : start + BATCH] for start in range(0, len(real), BATCH)]
    others = [inception.read(to_images(data.pixels(chunk, side)))["features"] for chunk in chunks]
    rows = []
    to = f"to {len(real):,} real normal images of {data.name}"
    for metric, found, more in inception.distances(np.concatenate(generated), np.concatenate(others), paired=False):
        rows.append(distance_row(metric, "all", "", found, len(samples), inception.name, (to, more)))
    return rows
