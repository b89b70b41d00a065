"""How far generated images are from others, as distributions of features: FID, KID (Inception) and CMMD (CLIP).

What must stay is compared with what the base drew from the same prompts and seeds, and, if asked, with a folder of
real images. Where the features are from is part of a figure's name: fid-inception and fid-digits don't compare.
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

from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.io.files import file_sha256
from sd_unlearn.io.run_folder import IMAGE_SUFFIXES
from sd_unlearn.metrics.base import KEPT, Columns, Counted, Shots
from sd_unlearn.metrics.drift import same_sizes
from sd_unlearn.metrics.mmd import CMMD_SCALE, CMMD_SIGMA, FEWEST, Estimate, cmmd, kid
from sd_unlearn.metrics.statistics import bootstrap
from sd_unlearn.results import Card, Row

if TYPE_CHECKING:
    from sd_unlearn.models.clip import ClipEncoder

FID_FEWEST = 2048  # images: as many as the features are wide, below which a covariance is not of full rank
WIDTH = 2048
_BATCH = 32
_PAIRED = "against the base's pictures of the same prompts and seeds"


def frechet_distance(a: NDArray, b: NDArray) -> float:
    """Frechet distance between the Gaussians fitted to features [N, D] and [M, D] (Heusel et al. 2017, eq. 6).

    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)); the trace of the root is the sum of the roots of A B's
    eigenvalues, found symmetrically as those of B^(1/2) A B^(1/2).
    """
    mean = a.mean(0) - b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_b)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ cov_a @ root).clip(min=0)
    return max(0.0, float(mean @ mean + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(cross).sum()))


def frechet_estimate(drawn: NDArray, real: NDArray) -> Estimate:
    """Frechet distance of features [N, D] to real [M, D], with the basic bootstrap interval over the drawn images."""
    value = frechet_distance(drawn, real)
    # A resample is further from the truth than the sample: the basic interval turns that bias back.
    low, high = bootstrap(lambda x: frechet_distance(x, real), drawn, resamples=200)
    return Estimate(value, max(0.0, 2 * value - high), max(0.0, 2 * value - low))


def fid(a: NDArray, b: NDArray) -> float:
    """FID of Inception features [N, 2048] and [M, 2048]: their Frechet distance.

    Raises:
        UsageError: fewer than 2,048 images in a set, where FID is mostly bias.
    """
    if min(len(a), len(b)) < FID_FEWEST:
        raise UsageError(f"{_no_fid(len(a), len(b))}: draw more, or use kid-inception or CMMD, which are unbiased.")
    return frechet_distance(np.asarray(a, np.float64), np.asarray(b, np.float64))


def _no_fid(*counts: int) -> str:
    return f"FID needs {FID_FEWEST:,} images in each set and one has {min(counts):,}"


class SetDistance:
    """What the questions of this file share: each group of what must stay, against the base and against real images.

    A subclass reads "features" and says in `distances` what is measured between two sets of them.

    Raises:
        UsageError: the folder of real images is missing or holds fewer than 10 images.
    """

    name: str
    distances_made: tuple[str, ...]  # the metrics, without "-real"

    def __init__(self, real: Path | None) -> None:
        self.real = real
        self.real_files = _images_of(real) if real else []

    def read(self, images: Sequence[Image.Image]) -> Columns:
        raise NotImplementedError

    def distances(self, drawn: NDArray, others: NDArray, paired: bool) -> list[tuple[str, Estimate, str]]:
        """(metric, figure with interval, note) for two sets of features; low and high nan: no interval."""
        raise NotImplementedError

    @property
    def metrics(self) -> tuple[str, ...]:
        return self.distances_made + tuple(f"{name}-real" for name in self.distances_made if self.real)

    def count(self, shots: Shots, columns: Columns) -> list[Counted]:
        return []

    def words(self, columns: Columns, index: int) -> str:
        return ""

    def compare(self, shots: Shots, base: Columns, columns: Columns) -> list[Row]:
        """Rows for alike, general and both (kept); those against real images are named -real and have a base's too."""
        rows: list[Row] = []
        for group, members in (("alike", ("alike",)), ("general", ("general",)), ("kept", KEPT)):
            here = shots.of(*members)
            if not here.any():
                continue
            drawn, before = columns["features"][here], base["features"][here]
            rows += self._rows("", group, "", drawn, before, True, _PAIRED)
            if self.real:
                features, note = self._of_real
                for subject, these in (("base", before), ("", drawn)):
                    rows += self._rows("-real", group, subject, these, features, False, note)
        return rows

    def _rows(
        self, ending: str, group: str, subject: str, drawn: NDArray, others: NDArray, paired: bool, note: str
    ) -> list[Row]:
        if len(drawn) < FEWEST:
            few = f"unknown: {len(drawn)} pictures are fewer than {FEWEST}"
            name = self.distances_made[-1] + ending
            return [Row(name, group, subject, None, len(drawn), detector=self.name, interval="none", note=few)]
        rows = []
        for metric, found, more in self.distances(drawn, others, paired):
            bounds = (None, None, "none") if np.isnan(found.low) else (found.low, found.high, "half-sampling")
            low, high, interval = bounds
            said = "; ".join(filter(None, (note, more)))
            rows.append(
                Row(metric + ending, group, subject, found.value, len(drawn), low, high, self.name, interval, said)
            )
        return rows

    @cached_property
    def _of_real(self) -> tuple[NDArray, str]:
        """Features of the real images, and what to say of them: images that cannot be read are counted and named."""
        parts, broken = [], []
        for start in range(0, len(self.real_files), _BATCH):
            images = []
            for path in self.real_files[start : start + _BATCH]:
                try:
                    with Image.open(path) as image:
                        images.append(image.convert("RGB"))
                except (OSError, SyntaxError, ValueError):  # what PIL raises over files that are no or half an image
                    broken.append(path.name)
            if images:
                parts.append(self.read(images)["features"])
        read = len(self.real_files) - len(broken)
        if read < FEWEST:
            raise UsageError(
                f"--real_images {self.real}: {read} images can be read; {FEWEST} are needed. Name another folder."
            )
        note = f"against {read:,} real images of {self.real.name if self.real else ''}"
        if broken:
            names = ", ".join(broken[:5]) + (", ..." if len(broken) > 5 else "")
            note += f"; {len(broken)} could not be read: {names}"
        return np.concatenate(parts), note


class InceptionFidelity(SetDistance):
    """FID and KID on the features of the TensorFlow InceptionV3 that papers use, ported by torch-fidelity.

    Columns: "features" [N, 2048].

    Raises:
        UsageError: torch-fidelity is not installed; a file or a folder that is named and is not there.
        UnlearnError: the weights cannot be fetched or read.
    """

    distances_made = ("fid-inception", "kid-inception")

    def __init__(self, weights: Path | None = None, real: Path | None = None, device: Any = "cpu") -> None:
        super().__init__(real)
        if weights and not weights.is_file():
            raise UsageError(f"--inception_weights {weights} is no file. Leave the option out to fetch the weights.")
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        except ImportError as error:
            raise UsageError(
                f"The metric fidelity needs torch-fidelity: pip install 'sd-unlearn[fidelity]' ({error})."
            ) from None
        self.device, self.file = device, weights or _fetch(URL_INCEPTION_V3)
        self.sha256 = file_sha256(self.file)
        self.name = f"inception-v3 torch-fidelity {version('torch-fidelity')} sha256:{self.sha256[:12]}"

    def card(self) -> Card:
        return Card(
            self.name,
            self.metrics,
            "Distances between sets of pictures by the 2,048 pooled features of InceptionV3 (2015-12-05), scaled to "
            "299 pixels as TensorFlow 1 does: Frechet (FID) and kernel (KID, cubic, unbiased, not multiplied).",
            f"torch-fidelity {version('torch-fidelity')}",
            f"sha256:{self.sha256}",
            f"FID from {FID_FEWEST:,} images a set on",
            "FID is biased by the number of images and compares only at equal numbers; it has no interval here. "
            "Both see ImageNet's objects and textures more than faces.",
            {"real": str(self.real)} if self.real else {},
        )

    @cached_property
    def network(self) -> Any:
        """Built at the first picture: nothing is loaded where every reading is cached."""
        import torch
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            torch.load(self.file, map_location="cpu", weights_only=True)  # torch-fidelity would run what a file holds
            return FeatureExtractorInceptionV3("inception", ["2048"], str(self.file)).to(self.device)
        except Exception as error:  # pickle, zip, key and size errors alike
            raise UnlearnError(
                f"--inception_weights {self.file} does not hold torch-fidelity's InceptionV3: "
                f"{str(error).splitlines()[0][:200]}. Delete it to have it fetched again, or name another file."
            ) from error

    def read(self, images: Sequence[Image.Image]) -> Columns:
        """Features of RGB pictures of any size."""
        import torch

        found = np.zeros((len(images), WIDTH), np.float32)
        for places in same_sizes(images, _BATCH):
            pixels = np.stack([np.asarray(images[i].convert("RGB")) for i in places])
            with torch.no_grad():
                (features,) = self.network(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device))
            found[places] = features.cpu().numpy()
        return {"features": found}

    def distances(self, drawn: NDArray, others: NDArray, paired: bool) -> list[tuple[str, Estimate, str]]:
        kernel = ("kid-inception", kid(drawn, others, paired), "unbiased")
        if min(len(drawn), len(others)) < FID_FEWEST:
            return [(kernel[0], kernel[1], f"unbiased; no FID: {_no_fid(len(drawn), len(others))}")]
        return [("fid-inception", Estimate(fid(drawn, others), np.nan, np.nan), ""), kernel]


class Cmmd(SetDistance):
    """CMMD on a CLIP model's image embeddings. Columns: "features" [N, D] not normalised.

    Raises:
        UsageError: the folder of real images is missing or holds fewer than 10 images.
    """

    def __init__(self, encoder: ClipEncoder, real: Path | None = None) -> None:
        super().__init__(real)
        self.encoder, self.name = encoder, encoder.detector
        self.distances_made = (f"cmmd-{encoder.architecture}",)

    def card(self) -> Card:
        return Card(
            self.name,
            self.metrics,
            "Distance between sets of pictures by CLIP's embeddings: squared maximum mean discrepancy, Gaussian "
            f"kernel of width {CMMD_SIGMA:g}, times {CMMD_SCALE:,.0f}, unbiased.",
            f"open_clip {version('open_clip_torch')}",
            self.encoder.weights,
            limits="The paper uses ViT-L-14-336 with OpenAI's weights; figures of other models don't compare with it. "
            "It sees what CLIP sees: content more than artefacts.",
            extra={"real": str(self.real)} if self.real else {},
        )

    def read(self, images: Sequence[Image.Image]) -> Columns:
        width = self.encoder.texts([""]).shape[1] if not images else 0
        return {"features": self.encoder.images(images) if images else np.zeros((0, width), np.float32)}

    def distances(self, drawn: NDArray, others: NDArray, paired: bool) -> list[tuple[str, Estimate, str]]:
        return [(self.distances_made[0], cmmd(drawn, others, paired), "unbiased")]


def make_fidelity(weights: Path | None = None, real: Path | None = None, device: Any = "cpu") -> InceptionFidelity:
    """For the registry: the metric fidelity (--inception_weights, --real_images). Raises as InceptionFidelity."""
    return InceptionFidelity(weights, real, device)


def make_cmmd(encoder: ClipEncoder, real: Path | None = None) -> Cmmd:
    """For the registry: the metric cmmd, on the encoder of ClipQuestion or another. Raises as Cmmd."""
    return Cmmd(encoder, real)


def _fetch(url: str) -> Path:
    """The weights' file in torch's cache, fetched when it is not there yet."""
    import torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=False)  # under a temporary name, then renamed
        except OSError as error:  # URLError is one
            raise UnlearnError(
                f"The weights of InceptionV3 cannot be fetched ({error}). Download {url} on a machine with a network "
                "and name the file: --inception_weights FILE."
            ) from error
    return path


def _images_of(folder: Path) -> list[Path]:
    """Image files of a folder and its subfolders, by name."""
    if not folder.is_dir():
        raise UsageError(f"--real_images {folder} is no folder. Name one that holds real images.")
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)
    if len(files) < FEWEST:
        raise UsageError(f"--real_images {folder} holds {len(files)} images; a distance needs {FEWEST} or more.")
    return files
