"""What a network draws, judged: how much of it is normal, and how far it is from real normal pictures.

Every picture counts in every figure; what is no class of the dataset at all is read as something all the same.
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
from sd_unlearn.metrics.digits import FEATURE_WIDTH, DigitsJudge, distance_rows, load_reader
from sd_unlearn.metrics.fidelity import InceptionFidelity
from sd_unlearn.metrics.mmd import FEWEST
from sd_unlearn.metrics.statistics import wilson
from sd_unlearn.paper.ddpm.sample import as_bytes
from sd_unlearn.paper.experiments import DIGITS
from sd_unlearn.paper.judge.classifier import BATCH, Classifier, class_mask, normal_of
from sd_unlearn.results import Row

if TYPE_CHECKING:
    from sd_unlearn.paper.ddpm.datasets import ImageData

Fidelity = Literal["digits", "inception"]
MOST_REAL = 10_000  # real pictures that a distance is to
READER_SIDE, MIDDLE = 32, 24
MOST_SHOWN = 200  # pictures of a grid
SECOND_OPINION = "second opinion"
SENSITIVE_FRAME, FRAME = (0xD0, 0x20, 0x20), (0xC8, 0xCC, 0xD0)  # red and thick; grey and thin
EDGE, THICK = 6, 5  # pixels around a picture of a grid, and how many of them the red frame takes


def judge(
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
    """Rows of pictures [n, C, side, side] in [-1, 1]; what is beyond is clamped.

    non_sensitive_rate (group "all"; of digits also "second opinion", by the bundled reader), share of each class,
    and fid-*, kid-* to the real pictures `real_indices`: by default all normal ones, or 10,000 of them.

    Raises:
        UsageError: no pictures, wrong channels, a class that is not the data's, too few real pictures, or
            "digits" asked of pictures that are none.
        UnlearnError: pictures that are not finite; as of InceptionFidelity.
    """
    mask = class_mask(data.classes, normal)
    _check(samples, data, fidelity)
    real = real_normal(data, normal) if real_indices is None else np.asarray(real_indices)
    if len(real) < FEWEST:
        raise UsageError(f"{len(real)} real normal images of {data.name}; a distance needs {FEWEST} or more.")
    samples = samples.float().clamp(-1, 1)
    probabilities = classifier.probabilities(samples)
    note = "the probabilities of the normal classes sum to more than 0.5"
    rows = [_rate("non_sensitive_rate", "all", normal_of(probabilities, mask), classifier.detector, note)]
    if data.classes == DIGITS and data.channels == 1:
        read, reader = read_digits(samples, device), DigitsJudge().name
        rows.append(_rate("non_sensitive_rate", SECOND_OPINION, normal_of(read, mask), reader, note))
    most = probabilities.argmax(1)
    for index, name in enumerate(data.classes):
        rows.append(_rate("share", name, most == index, classifier.detector, "the most probable class"))
    if fidelity == "digits":
        return rows + _to_real_digits(samples, data, real, device)
    return rows + _to_real_pictures(samples, data, real, inception_weights, device)


def real_normal(data: ImageData, normal: Sequence[str], most: int = MOST_REAL) -> NDArray[np.int64]:
    """Indices of all normal pictures, or of `most` of them, the same ones every time."""
    found = np.flatnonzero(class_mask(data.classes, normal)[data.labels])
    if len(found) > most:
        found = np.sort(np.random.default_rng(0).choice(found, most, replace=False))
    return found


@torch.no_grad()
def digit_features(images: Tensor, device: str = "cpu") -> NDArray[np.float32]:
    """The bundled reader's features [n, 64] of digits [n, 1, 32, 32] or smaller ones, in [-1, 1]."""
    reader, found = load_reader().to(device), [np.zeros((0, FEATURE_WIDTH), np.float32)]
    for chunk in images.split(BATCH):
        digits = at_reader_size(chunk.to(device).float())
        found.append(reader.features(digits.expand(-1, 3, -1, -1)).cpu().numpy())
    reader.to("cpu")  # it is shared by whoever asks for it
    return np.concatenate(found)


def at_reader_size(digits: Tensor) -> Tensor:
    """[n, 1, 32, 32]: smaller digits are enlarged to the middle they were made of (ImageData.pixels), and bordered."""
    if digits.shape[-1] == READER_SIDE:
        return digits
    enlarged = interpolate(digits, (MIDDLE, MIDDLE), mode="bicubic", align_corners=False).clamp(-1, 1)
    return pad(enlarged, [(READER_SIDE - MIDDLE) // 2] * 4, value=-1.0)


@torch.no_grad()
def read_digits(images: Tensor, device: str = "cpu") -> NDArray[np.float32]:
    """Probabilities [n, 10] of the digits 0 to 9, by the bundled reader."""
    features = torch.from_numpy(digit_features(images, device))
    return load_reader().digit(features).softmax(1).numpy()


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Pictures of [n, C, H, W] in [-1, 1]; one channel is grey."""
    pixels = as_bytes(images.float().cpu())
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p).convert("RGB") for p in pixels]


def picture_grid(
    samples: Tensor, sensitive: NDArray[np.bool_], columns: int = 20, most: int = MOST_SHOWN
) -> Image.Image:
    """The first pictures of [n, C, side, side] in [-1, 1] on a sheet; those of the mask [n] have a thick red frame.

    Small pictures are enlarged by a whole number to 64 pixels or so, large ones shrunk to 128.

    Raises:
        UsageError: no pictures, or a mask of another length.
    """
    if not len(samples) or len(samples) != len(sensitive):
        raise UsageError(f"A grid of {len(samples)} pictures and {len(sensitive)} judgements cannot be drawn.")
    shown = to_pictures(samples[:most])
    side = samples.shape[-1]
    size = min(128, side * max(1, 64 // side))
    cell, columns = size + 2 * EDGE, min(columns, len(shown))
    sheet = Image.new("RGB", (columns * cell, -(-len(shown) // columns) * cell), "white")
    draw = ImageDraw.Draw(sheet)
    how = Image.Resampling.NEAREST if size >= side else Image.Resampling.LANCZOS
    for place, (picture, red) in enumerate(zip(shown, sensitive, strict=False)):
        x, y = place % columns * cell, place // columns * cell
        width = THICK if red else 1
        inner = EDGE - width
        box = (x + inner, y + inner, x + cell - inner - 1, y + cell - inner - 1)
        draw.rectangle(box, outline=SENSITIVE_FRAME if red else FRAME, width=width)
        sheet.paste(picture.resize((size, size), how), (x + EDGE, y + EDGE))
    return sheet


def _check(samples: Tensor, data: ImageData, fidelity: Fidelity) -> None:
    if samples.ndim != 4 or not len(samples) or samples.shape[1] != data.channels:
        raise UsageError(f"Pictures of shape {tuple(samples.shape)}; [n > 0, {data.channels}, side, side] is needed.")
    if broken := int((~samples.isfinite()).flatten(1).any(1).sum()):
        raise UnlearnError(
            f"{broken} of {len(samples)} pictures are not finite numbers: training has diverged. "
            "Lower --learning_rate or --eta, or train without --mixed_precision fp16."
        )
    if fidelity == "digits" and not (data.classes == DIGITS and samples.shape[1] == 1):
        raise UsageError(f"The reader of digits cannot read the pictures of {data.name}. Take inception.")


def _rate(metric: str, group: str, hits: NDArray[np.bool_], detector: str, note: str) -> Row:
    n, count = len(hits), int(hits.sum())
    return Row(metric, group, "", count / n, n, *wilson(count, n), detector, "wilson", note)


def _few(metric: str, n: int, detector: str) -> list[Row]:
    note = f"unknown: {n} pictures are fewer than {FEWEST}"
    return [Row(metric, "all", "", None, n, detector=detector, interval="none", note=note)]


def _to_real_digits(samples: Tensor, data: ImageData, real: NDArray[np.int64], device: str) -> list[Row]:
    detector = DigitsJudge().name
    if len(samples) < FEWEST:
        return _few("kid-digits", len(samples), detector)
    chunks = [real[start : start + BATCH] for start in range(0, len(real), BATCH)]
    features = np.concatenate([digit_features(data.pixels(chunk, READER_SIDE), device) for chunk in chunks])
    told = f"of the pictures to {len(real):,} real normal images of {data.name}"
    return distance_rows(digit_features(samples, device), features, "all", "", detector, told)


def _to_real_pictures(
    samples: Tensor, data: ImageData, real: NDArray[np.int64], weights: Path | None, device: str
) -> list[Row]:
    question = InceptionFidelity(weights, device=device)
    if len(samples) < FEWEST:
        return _few("kid-inception", len(samples), question.name)
    side = samples.shape[-1]
    drawn = [question.read(to_pictures(chunk))["features"] for chunk in samples.split(BATCH)]
    chunks = [real[start : start + BATCH] for start in range(0, len(real), BATCH)]
    others = [question.read(to_pictures(data.pixels(chunk, side)))["features"] for chunk in chunks]
    rows = []
    for metric, found, more in question.distances(np.concatenate(drawn), np.concatenate(others), paired=False):
        known = not np.isnan(found.low)
        low, high, interval = (found.low, found.high, "half-sampling") if known else (None, None, "none")
        note = "; ".join(filter(None, (f"to {len(real):,} real normal images of {data.name}", more)))
        rows.append(Row(metric, "all", "", found.value, len(samples), low, high, question.name, interval, note))
    return rows
