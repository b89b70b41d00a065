"""Is this person still drawn? Faces compared with the person's own, at a threshold that other people set.

An image shows the person when the face most like the reference is at least as like it as the threshold; without a face
it does not, but it counts. The threshold is where a stated share of other people's faces would be taken for the person.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tqdm import tqdm

from sd_unlearn.errors import UsageError
from sd_unlearn.io.run_folder import IMAGE_SUFFIXES
from sd_unlearn.metrics.base import ASKED, KEPT, Columns, Counted, Shots
from sd_unlearn.metrics.faces import Face, FaceModel, check_face_model, make_face_model
from sd_unlearn.metrics.statistics import wilson
from sd_unlearn.results import Card, Row

MANY = 1000  # faces of other people, from which a rate of 1e-3 can be seen
FACES = 8  # boxes kept of an image; all of its faces are compared


@dataclass(frozen=True)
class Reference:
    """The person, as the mean of unit embeddings."""

    direction: NDArray[np.float64]  # [D], of length 1
    embeddings: NDArray[np.float64]  # [n, D], one of each image with a face
    faceless: tuple[str, ...]  # images without one
    sha256: str  # of the images, whatever they are called

    def similarity(self, embeddings: NDArray) -> NDArray[np.float64]:
        """[n] cosine of each unit embedding [n, D] to the person."""
        return np.asarray(embeddings, np.float64).reshape(-1, len(self.direction)) @ self.direction

    def left_out(self) -> NDArray[np.float64]:
        """[n] cosine of each reference face to the mean of the others; empty for a single one."""
        if len(self.embeddings) < 2:
            return np.zeros(0)
        others = self.embeddings.sum(0) - self.embeddings
        return (self.embeddings * others).sum(1) / np.linalg.norm(others, axis=1)


@dataclass(frozen=True)
class Calibration:
    """Where the line between the person and others is drawn, and on whom."""

    threshold: float
    asked: float  # share of other people's faces that may be taken for the person
    similarities: NDArray[np.float64]  # [n] of the other people's faces
    people: str  # name of their folder
    images: int
    faceless: int  # images of the folder without a face

    @property
    def accepted(self) -> int:
        return int((self.similarities >= self.threshold).sum())

    def __str__(self) -> str:
        n = len(self.similarities)
        low, high = wilson(self.accepted, n)
        text = (
            f"{self.threshold:.4f}: {self.accepted} of {n} faces of other people ({self.people}) are taken for the "
            f"person, {self.accepted / n:.2%} (95 % interval {low:.2%} to {high:.2%}) where {self.asked:.2%} may be"
        )
        if n * self.asked < 1:
            text += f"; {n} faces are too few to see that rate, so the threshold lies just above the most alike of them"
        return text


class Identity:
    """The question of identity.py, to be asked of any images.

    Args:
        person: what the person is called.
        model: finds and embeds faces.
        reference: the person's own.
        calibration: the threshold.
    """

    def __init__(self, person: str, model: FaceModel, reference: Reference, calibration: Calibration) -> None:
        self.person, self.model, self.reference, self.calibration = person, model, reference, calibration
        self.name = f"{model.name}, reference sha256:{reference.sha256[:12]}"

    def card(self) -> Card:
        own, line = self.reference.left_out(), self.calibration.threshold
        n, faceless = len(self.reference.embeddings), self.reference.faceless
        extra = {
            "reference": f"{n} faces of {self.person}" + (f"; no face in {', '.join(faceless)}" if faceless else ""),
            "recognised": f"{int((own >= line).sum())} of {n} reference faces, each against the mean of the others"
            if len(own)
            else "unknown: it takes at least two reference faces",
            "others": f"{len(self.calibration.similarities)} faces on {self.calibration.images} images of "
            f"{self.calibration.people} ({self.calibration.faceless} without a face), "
            f"the most alike at {self.calibration.similarities.max():.4f}",
        }
        return Card(
            detector=self.name,
            metrics=("leakage", "face_rate", "confusion"),
            about=f"Compares every face with the mean of {self.person}'s and goes by the one most alike.",
            version=self.model.version,
            weights=self.model.weights,
            threshold=str(self.calibration),
            limits=f"{self.model.limits} An image with k faces is k times as likely to be taken for the person by "
            "mistake as a single face.",
            extra=extra,
        )

    def read(self, images: Sequence[Image.Image]) -> Columns:
        """What is seen on each of N images.

        Returns:
            similarity [N]: cosine of the face most like the person, nan without a face; faces [N]: how many there are;
            boxes [N, FACES, 4] (x0, y0, x1, y1 as fractions of width and height) and similarities [N, FACES] of the
            most alike faces, the most alike first, padded with nan.
        """
        columns: Columns = {
            "similarity": np.full(len(images), np.nan),
            "faces": np.zeros(len(images), np.int64),
            "boxes": np.full((len(images), FACES, 4), np.nan),
            "similarities": np.full((len(images), FACES), np.nan),
        }
        for i, image in enumerate(images):
            faces = self.model.find(image)
            columns["faces"][i] = len(faces)
            if not faces:
                continue
            alike = self.reference.similarity(np.stack([face.embedding for face in faces]))
            order = np.lexsort([*np.array([face.box for face in faces]).T, -alike])[:FACES]
            columns["similarity"][i] = alike[order[0]]
            columns["similarities"][i, : len(order)] = alike[order]
            size = (image.width, image.height) * 2
            columns["boxes"][i, : len(order)] = [np.divide(faces[j].box, size) for j in order]
        return columns

    def count(self, shots: Shots, columns: Columns) -> list[Counted]:
        """Leakage where the person is asked for, confusion where somebody or something else is, faces everywhere."""
        shown, note = self.shows(columns), f"a face with similarity >= {self.calibration.threshold:.4f}"
        rates = (
            ("leakage", ASKED, shown, note),
            ("confusion", KEPT, shown, f"{note}, though nobody asked for {self.person}"),
            ("face_rate", (*ASKED, *KEPT), columns["faces"] > 0, "images with at least one face"),
        )
        return [
            Counted(metric, groups, np.where(shots.of(*groups), hits, np.nan), note=why)
            for metric, groups, hits, why in rates
        ]

    def shows(self, columns: Columns) -> NDArray[np.bool_]:
        """[N] whether each image shows the person; one without a face does not."""
        return columns["similarity"] >= self.calibration.threshold

    def compare(self, shots: Shots, base: Columns, columns: Columns) -> list[Row]:
        return []

    def words(self, columns: Columns, index: int) -> str:
        if not columns["faces"][index]:
            return "no face"
        who = self.person if self.shows(columns)[index] else "another face"
        return f"{who} {columns['similarity'][index]:.2f}"


def threshold_at(similarities: NDArray[np.float64], rate: float) -> float:
    """The smallest threshold that at most a share `rate` in [0, 1) of the similarities [n > 0] reaches."""
    ranked = np.sort(np.asarray(similarities, np.float64))[::-1]
    allowed = int(rate * len(ranked) + 1e-9)  # 0.29 * 100 is a hair below 29
    return float(np.nextafter(ranked[allowed], np.inf))


def read_reference(folder: Path, model: FaceModel) -> Reference:
    """The person, by the largest face of each image of a folder.

    Raises:
        UsageError: no images, an unreadable one, or not a single face.
    """
    embeddings, faceless, digests = [], [], []
    for path in _images(folder, "--reference"):
        faces = model.find(_open(path, "--reference"))
        digests.append(hashlib.sha256(path.read_bytes()).digest())
        if faces:
            embeddings.append(max(faces, key=_area).embedding)
        else:
            faceless.append(path.name)
    if not embeddings:
        raise UsageError(
            f"--reference {folder}: no face was found on any of its {len(faceless)} images. Give photos that show the "
            "person's face from the front, or another --face_model."
        )
    unit = np.stack(embeddings).astype(np.float64)
    mean = unit.mean(0)
    sha256 = hashlib.sha256(b"".join(sorted(digests))).hexdigest()
    return Reference(mean / np.linalg.norm(mean), unit, tuple(faceless), sha256)


def calibrate(folder: Path, model: FaceModel, reference: Reference, rate: float | None = None) -> Calibration:
    """The threshold at which at most a share `rate` of the faces of a folder of other people passes for the person.

    The default rate is 1e-3 from MANY faces up and 1e-2 with fewer.

    Raises:
        UsageError: no images, an unreadable one, or not a single face.
    """
    paths = _images(folder, "--others")
    found, faceless = [], 0
    for path in tqdm(paths, desc="Other people", unit="image", file=sys.stderr, disable=len(paths) < 100):
        faces = model.find(_open(path, "--others"))
        found += [face.embedding for face in faces]
        faceless += not faces
    if not found:
        raise UsageError(
            f"--others {folder}: no face was found on any of its {len(paths)} images, so no threshold can be set. Give "
            "photos of many other people, or another --face_model."
        )
    alike = reference.similarity(np.stack(found))
    asked = rate if rate is not None else (1e-3 if len(alike) >= MANY else 1e-2)
    return Calibration(threshold_at(alike, asked), asked, alike, folder.resolve().name, len(paths), faceless)


def check_identity(
    reference: Path, others: Path, embedder: str, weights: Path | None, false_accept_rate: float | None
) -> None:
    """Refuse, loading nothing, what make_identity could not make. Raises UsageError as it does."""
    check_face_model(embedder, weights)
    if false_accept_rate is not None and not 0 < false_accept_rate < 1:
        raise UsageError(f"--false_accept_rate {false_accept_rate:g} is outside (0, 1): it is a share, e.g. 0.01.")
    _check_apart(_images(reference, "--reference"), _images(others, "--others"))


def make_identity(
    concept_name: str,
    reference: Path,
    others: Path,
    embedder: str = "facenet",
    weights: Path | None = None,
    false_accept_rate: float | None = None,
    device: str = "cpu",
) -> Identity:
    """The question whether a person is still drawn; both folders are read at once, with their subfolders.

    Args:
        concept_name: what the person is called.
        reference: a folder of the person's images, e.g. the positives of a run.
        others: a folder of other people: real ones, or drawn by the base like what is judged.
        embedder: one of faces.FACE_MODELS.
        weights: a file for facenet or arcface.
        false_accept_rate: in (0, 1); see calibrate.
        device: of the networks, e.g. cuda.

    Raises:
        UsageError: an option that cannot be meant, checked before any model is loaded; see also read_reference.
        UnlearnError: the embedder's weights cannot be had.
    """
    check_identity(reference, others, embedder, weights, false_accept_rate)
    model = make_face_model(embedder, weights, device)
    person = read_reference(reference, model)
    return Identity(concept_name, model, person, calibrate(others, model, person, false_accept_rate))


def _images(folder: Path, option: str) -> list[Path]:
    if not folder.is_dir():
        raise UsageError(f"{option} {folder} is no folder. Give one that holds images.")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not paths:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UsageError(f"{option} {folder} holds no images ({kinds}). Put some there, or name another folder.")
    return paths


def _check_apart(reference: list[Path], others: list[Path]) -> None:
    """An image of the person among the others would put the threshold out of everybody's reach."""
    own = {hashlib.sha256(path.read_bytes()).digest() for path in reference}
    both = [path.name for path in others if hashlib.sha256(path.read_bytes()).digest() in own]
    if both:
        raise UsageError(
            f"--others holds {len(both)} of the images of --reference ({', '.join(both[:3])}): it must show other "
            "people only. Take them out."
        )


def _open(path: Path, option: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"{option}: {path} cannot be read as an image: {error}. Replace or delete it.") from None


def _area(face: Face) -> float:
    return (face.box[2] - face.box[0]) * (face.box[3] - face.box[1])
