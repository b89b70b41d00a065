"""Distances between sets of images: FID and KID (features of Inception) and CMMD (CLIP embeddings).

Images of the keep prompts are compared with the base's images of the same prompts and seeds and, with --real_images,
with a folder of real images. A metric's name includes the features: fid-inception and fid-digits are not comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sd_unlearn.errors import UnlearnError, UsageError, install_command, reason
from sd_unlearn.io.images import UnreadableImage, image_files, open_image
from sd_unlearn.io.paths import public_name
from sd_unlearn.io.reading import file_sha256
from sd_unlearn.metrics.base import (
    KEEP_GROUPS,
    DetectorOutput,
    ImageValues,
    PromptedImages,
    batches_of_one_size,
)
from sd_unlearn.metrics.frechet import frechet_distance
from sd_unlearn.metrics.mmd import CMMD_SCALE, CMMD_SIGMA, FEWEST, Distance, cmmd, kid
from sd_unlearn.metrics.weights import downloaded
from sd_unlearn.models.halving import FOR_METRIC, HalvingBatches
from sd_unlearn.results import Card, Row

if TYPE_CHECKING:
    from sd_unlearn.models.clip import ClipEncoder

FID_FEWEST = 2048  # images in a set: with fewer than there are features, the covariance is singular
WIDTH = 2048
_BATCH = 32
_GROUPS = (("alike", ("alike",)), ("general", ("general",)), ("kept", KEEP_GROUPS))
_PAIRED = "against the base's pictures of the same prompts and seeds"


def fid(a: NDArray, b: NDArray) -> float:
    """FID of Inception features [N, 2048] and [M, 2048]: their Frechet distance.

    Raises:
        UsageError: fewer than 2,048 images in a set, where FID is mostly bias.
    """
    if min(len(a), len(b)) < FID_FEWEST:
        raise UsageError(f"{_no_fid(len(a), len(b))}: generate more, or use kid-inception or CMMD (unbiased).")
    return frechet_distance(np.asarray(a, np.float64), np.asarray(b, np.float64))


def _no_fid(*counts: int) -> str:
    return f"FID needs {FID_FEWEST:,} images in each set and one has {min(counts):,}"


class SetDistance:
    """Base class: distance of each keep group to the base's images and to real images.

    A subclass computes "features" in `read` and distances between two sets of them in `distances`.

    Raises:
        UsageError: the folder of real images is missing or has fewer than 10 images.
    """

    name: str
    metric_names: tuple[str, ...]  # without "-real"

    def __init__(self, real: Path | None) -> None:
        self.real = real
        self.real_files = _image_files(real) if real else []

    def read(self, images: Sequence[Image.Image]) -> DetectorOutput:
        raise NotImplementedError

    def distances(self, generated: NDArray, others: NDArray, paired: bool) -> list[tuple[str, Distance, str]]:
        """(metric, distance, note) for two sets of features."""
        raise NotImplementedError

    @property
    def metrics(self) -> tuple[str, ...]:
        return self.metric_names + tuple(f"{name}-real" for name in self.metric_names if self.real)

    def count(self, prompted: PromptedImages, output: DetectorOutput) -> list[ImageValues]:
        return []

    def words(self, output: DetectorOutput, index: int) -> str:
        return ""

    def compare(self, prompted: PromptedImages, base: DetectorOutput, output: DetectorOutput) -> list[Row]:
        """Rows for alike, general and both (kept); metrics ending in -real also have rows of the base."""
        rows: list[Row] = []
        for group, members in _GROUPS:
            here = prompted.in_groups(*members)
            if not here.any():
                continue
            of_lora, of_base = output["features"][here], base["features"][here]
            rows += self._rows("", group, "", of_lora, of_base, True, _PAIRED)
            if self.real:
                real, note = self._real_features
                for subject, features in (("base", of_base), ("", of_lora)):
                    rows += self._rows("-real", group, subject, features, real, False, note)
        return rows

    def _rows(
        self, ending: str, group: str, subject: str, generated: NDArray, others: NDArray, paired: bool, note: str
    ) -> list[Row]:
        n = len(generated)
        if n < FEWEST:
            too_few = f"unknown: {n} pictures are fewer than {FEWEST}"
            name = self.metric_names[-1] + ending
            return [Row(name, group, subject, None, n, detector=self.name, interval="none", note=too_few)]
        return [
            distance_row(metric + ending, group, subject, distance, n, self.name, (note, remark))
            for metric, distance, remark in self.distances(generated, others, paired)
        ]

    @cached_property
    def _real_features(self) -> tuple[NDArray, str]:
        """Features of the real images, and the rows' note: unreadable images are counted and named."""
        features, unreadable = [], []
        for start in range(0, len(self.real_files), _BATCH):
            images = []
            for path in self.real_files[start : start + _BATCH]:
                try:
                    images.append(open_image(path))
                except UnreadableImage:
                    unreadable.append(path.name)
            if images:
                features.append(self.read(images)["features"])
        count = len(self.real_files) - len(unreadable)
        if count < FEWEST:
            raise UsageError(
                f"--real_images {self.real}: {count} images can be read; at least {FEWEST} are needed. Choose another "
                "folder."
            )
        note = f"against {count:,} real images of {self.real.name if self.real else ''}"
        if unreadable:
            names = ", ".join(unreadable[:5]) + (", ..." if len(unreadable) > 5 else "")
            note += f"; {len(unreadable)} could not be read: {names}"
        return np.concatenate(features), note


def distance_row(
    metric: str, group: str, subject: str, distance: Distance, n: int, detector: str, notes: Sequence[str]
) -> Row:
    """A row of a distance between sets, with a half-sampling interval or none. n: images of the generated set."""
    note = "; ".join(filter(None, notes))
    if np.isnan(distance.low):
        return Row(metric, group, subject, distance.value, n, None, None, detector, "none", note)
    return Row(metric, group, subject, distance.value, n, distance.low, distance.high, detector, "half-sampling", note)


class InceptionFidelity(SetDistance):
    """FID and KID on the features of the TensorFlow InceptionV3 that papers use, ported by torch-fidelity.

    Output: "features" [N, 2048].

    Raises:
        UsageError: torch-fidelity is not installed; the weights file or the folder of real images does not exist.
        UnlearnError: the weights cannot be downloaded or read.
    """

    metric_names = ("fid-inception", "kid-inception")

    def __init__(self, weights: Path | None = None, real: Path | None = None, device: Any = "cpu") -> None:
        super().__init__(real)
        if weights and not weights.is_file():
            raise UsageError(
                f"--inception_weights {weights} is not a file. Leave the option out to download the weights."
            )
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        except ImportError as error:
            raise UsageError(
                f"The metric fidelity needs torch-fidelity: {install_command('fidelity')} ({reason(error)})."
            ) from None
        advice = "Download it elsewhere and give the file: --inception_weights FILE."
        self.device = device
        self.file = weights or downloaded(URL_INCEPTION_V3, "The weights of InceptionV3", advice)
        self.sha256 = file_sha256(self.file)
        self.batches = HalvingBatches("running InceptionV3", FOR_METRIC)
        self.name = f"inception-v3 torch-fidelity {version('torch-fidelity')} sha256:{self.sha256[:12]}"

    def card(self) -> Card:
        return Card(
            self.name,
            self.metrics,
            "Distances between sets of images by the 2,048 pooled features of InceptionV3 (2015-12-05), images scaled "
            "to 299 pixels as in TensorFlow 1: Frechet (FID) and kernel (KID, cubic, unbiased, not multiplied).",
            f"torch-fidelity {version('torch-fidelity')}",
            f"sha256:{self.sha256}",
            f"FID from {FID_FEWEST:,} images in each set",
            "FID is biased by the number of images: compare it only at equal numbers. It has no interval here. "
            "Both metrics are more sensitive to ImageNet's objects and textures than to faces.",
            {"real": public_name(str(self.real))} if self.real else {},
        )

    @cached_property
    def network(self) -> Any:
        """Loaded for the first image: not needed where all outputs are cached."""
        import torch
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            torch.load(self.file, map_location="cpu", weights_only=True)  # torch-fidelity would run code in the file
            return FeatureExtractorInceptionV3("inception", ["2048"], str(self.file)).to(self.device)
        except Exception as error:  # pickle, zip, key and size errors
            raise UnlearnError(
                f"--inception_weights {self.file} does not hold torch-fidelity's InceptionV3: {reason(error)}. "
                "Delete it to download it again, or give another file."
            ) from error

    def read(self, images: Sequence[Image.Image]) -> DetectorOutput:
        """Features of RGB images of any size."""
        import torch

        features = np.zeros((len(images), WIDTH), np.float32)

        def fill(indices: Sequence[int]) -> None:
            pixels = np.stack([np.asarray(images[i].convert("RGB")) for i in indices])
            with torch.no_grad():
                (pooled,) = self.network(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device))
            features[indices] = pooled.cpu().numpy()

        for indices in batches_of_one_size(images, _BATCH):
            list(self.batches.map(fill, indices, _BATCH))
        return {"features": features}

    def distances(self, generated: NDArray, others: NDArray, paired: bool) -> list[tuple[str, Distance, str]]:
        kernel = kid(generated, others, paired)
        if min(len(generated), len(others)) < FID_FEWEST:
            return [("kid-inception", kernel, f"unbiased; no FID: {_no_fid(len(generated), len(others))}")]
        frechet = Distance(fid(generated, others), np.nan, np.nan)
        return [("fid-inception", frechet, ""), ("kid-inception", kernel, "unbiased")]


class Cmmd(SetDistance):
    """CMMD on a CLIP model's image embeddings. Output: "features" [N, D], not normalized.

    Raises:
        UsageError: the folder of real images is missing or has fewer than 10 images.
    """

    def __init__(self, encoder: ClipEncoder, real: Path | None = None) -> None:
        super().__init__(real)
        self.encoder, self.name = encoder, encoder.detector
        self.metric_names = (f"cmmd-{encoder.architecture}",)

    def card(self) -> Card:
        return Card(
            self.name,
            self.metrics,
            "Distance between sets of images by CLIP's embeddings: squared maximum mean discrepancy, Gaussian kernel "
            f"of width {CMMD_SIGMA:g}, times {CMMD_SCALE:,.0f}, unbiased.",
            f"open_clip {version('open_clip_torch')}",
            self.encoder.weights,
            limits="The paper uses ViT-L-14-336 with OpenAI's weights; values of other models are not comparable. CLIP "
            "is more sensitive to content than to artefacts.",
            extra={"real": public_name(str(self.real))} if self.real else {},
        )

    def read(self, images: Sequence[Image.Image]) -> DetectorOutput:
        width = self.encoder.texts([""]).shape[1] if not images else 0
        return {"features": self.encoder.images(images) if images else np.zeros((0, width), np.float32)}

    def distances(self, generated: NDArray, others: NDArray, paired: bool) -> list[tuple[str, Distance, str]]:
        return [(self.metric_names[0], cmmd(generated, others, paired), "unbiased")]


def make_fidelity(weights: Path | None = None, real: Path | None = None, device: Any = "cpu") -> InceptionFidelity:
    """For the registry: the metric fidelity (--inception_weights, --real_images). Raises as InceptionFidelity."""
    return InceptionFidelity(weights, real, device)


def make_cmmd(encoder: ClipEncoder, real: Path | None = None) -> Cmmd:
    """For the registry: the metric cmmd. Raises as Cmmd."""
    return Cmmd(encoder, real)


def _image_files(folder: Path) -> list[Path]:
    """Image files of a folder and its subfolders, sorted."""
    if not folder.is_dir():
        raise UsageError(f"--real_images {folder} is not a folder. Give a folder of real images.")
    files = image_files(folder, recursive=True)
    if len(files) < FEWEST:
        raise UsageError(f"--real_images {folder} holds {len(files)} images; a distance needs {FEWEST} or more.")
    return files
