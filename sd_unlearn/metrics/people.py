"""The faces that identity is measured with: of the person, and of other people, who calibrate the threshold."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sd_unlearn.data.metadata import read_rows
from sd_unlearn.errors import UsageError
from sd_unlearn.io.images import UnreadableImage, image_files, open_image
from sd_unlearn.io.paths import slugify
from sd_unlearn.io.progress import track
from sd_unlearn.io.run_folder import IMAGE_SUFFIXES, METADATA
from sd_unlearn.metrics.faces import Face, FaceModel
from sd_unlearn.metrics.statistics import wilson

_KNOWN: dict[tuple[Path, int, int, str], list[Face]] = {}  # the faces of each file; see `_faces`
MANY = 1000  # faces of other people; from this number a rate of 1e-3 can be measured


@dataclass(frozen=True)
class Reference:
    """The person: the mean of the unit embeddings of the reference images."""

    direction: NDArray[np.float64]  # [D], of length 1
    embeddings: NDArray[np.float64]  # [n, D], one for each image with a face
    faceless: tuple[str, ...]  # names of the images without a face
    sha256: str  # of the images' content, independent of their names

    def similarity(self, embeddings: NDArray) -> NDArray[np.float64]:
        """[n] cosine of each unit embedding [n, D] to the person."""
        return np.asarray(embeddings, np.float64).reshape(-1, len(self.direction)) @ self.direction

    def leave_one_out(self) -> NDArray[np.float64]:
        """[n] cosine of each reference face to the mean of the others; empty for a single face."""
        if len(self.embeddings) < 2:
            return np.zeros(0)
        others = self.embeddings.sum(0) - self.embeddings
        return (self.embeddings * others).sum(1) / np.linalg.norm(others, axis=1)


@dataclass(frozen=True)
class Calibration:
    """The similarity threshold and the faces it was calibrated on."""

    threshold: float
    rate: float  # highest share of other people's faces that may reach the threshold
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
            f"person, {self.accepted / n:.2%} (95 % interval {low:.2%} to {high:.2%}); allowed: {self.rate:.2%}"
        )
        if n * self.rate < 1:
            text += f"; {n} faces are too few to measure that rate, so the threshold is just above the most similar one"
        return text


def threshold_at(similarities: NDArray[np.float64], rate: float) -> float:
    """The smallest threshold that at most a share `rate`, in [0, 1), of the similarities [n > 0] reaches."""
    ranked = np.sort(np.asarray(similarities, np.float64))[::-1]
    allowed = int(rate * len(ranked) + 1e-9)  # 0.29 * 100 is slightly below 29
    return float(np.nextafter(ranked[allowed], np.inf))


def read_reference(folder: Path, model: FaceModel) -> Reference:
    """The person's faces: the largest face of each image of a folder.

    Raises:
        UsageError: no images, an unreadable image, or no face on any image.
    """
    embeddings, faceless, digests = [], [], []
    for path in images_of(folder, "--reference"):
        faces = _faces(path, "--reference", model)
        digests.append(hashlib.sha256(path.read_bytes()).digest())
        if faces:
            embeddings.append(max(faces, key=_area).embedding)
        else:
            faceless.append(path.name)
    if not embeddings:
        raise _no_face(folder, "--reference", len(faceless))
    unit = np.stack(embeddings).astype(np.float64)
    mean = unit.mean(0)
    sha256 = hashlib.sha256(b"".join(sorted(digests))).hexdigest()
    return Reference(mean / np.linalg.norm(mean), unit, tuple(faceless), sha256)


def calibrate(folder: Path, model: FaceModel, reference: Reference, rate: float | None = None) -> Calibration:
    """The threshold that at most a share `rate` of the faces in a folder of other people reaches.

    The default rate is 1e-3 with at least MANY faces and 1e-2 with fewer.

    Raises:
        UsageError: no images, an unreadable image, or no face on any image.
    """
    paths = images_of(folder, "--others")
    embeddings, faceless = [], 0
    for path in track(paths, "Other people", "image", shown=len(paths) >= 100):
        faces = _faces(path, "--others", model)
        embeddings += [face.embedding for face in faces]
        faceless += not faces
    if not embeddings:
        raise _no_face(folder, "--others", len(paths))
    similarities = reference.similarity(np.stack(embeddings))
    if rate is None:
        rate = 1e-3 if len(similarities) >= MANY else 1e-2
    threshold = threshold_at(similarities, rate)
    return Calibration(threshold, rate, similarities, folder.resolve().name, len(paths), faceless)


def check_faces(folder: Path, option: str, model: FaceModel) -> None:
    """Refuse a folder without any face before images are generated; reads its images up to the first with a face.

    Raises:
        UsageError: no images, an unreadable image, or no face on any image.
    """
    paths = images_of(folder, option)
    if not any(model.find(_open(path, option)) for path in paths):
        raise _no_face(folder, option, len(paths))


def _no_face(folder: Path, option: str, images: int) -> UsageError:
    whom = "the person's face from the front" if option == "--reference" else "the faces of many other people"
    return UsageError(
        f"{option} {folder}: no face was found on any of its {images} images. Give photos that show {whom}, or use "
        "another --face_model."
    )


def images_of(folder: Path, option: str) -> list[Path]:
    if not folder.is_dir():
        raise UsageError(f"{option} {folder} is not a folder. Give a folder of images.")
    paths = image_files(folder, recursive=True)
    if not paths:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UsageError(f"{option} {folder} holds no images ({kinds}). Add some, or choose another folder.")
    return paths


def check_no_overlap(reference: list[Path], others: list[Path]) -> None:
    """Refuse images that are in both folders: they would raise the threshold to the person's own similarity.

    Raises:
        UsageError
    """
    own = {hashlib.sha256(path.read_bytes()).digest() for path in reference}
    both = [path.name for path in others if hashlib.sha256(path.read_bytes()).digest() in own]
    if both:
        raise UsageError(
            f"--others holds {len(both)} of the images of --reference ({', '.join(both[:3])}). Remove them: it must "
            "show other people only."
        )


def check_not_rendered(concept_name: str, others: Path) -> None:
    """Refuse folders that `render` filled with images of the person, e.g. 0_unlabeled with mixed-in images.

    Raises:
        UsageError
    """
    for file in sorted(others.rglob(METADATA)):
        shown = [
            row
            for row in read_rows(file).values()
            if row.get("group") in ("mixed_in", "positive") and slugify(concept_name) in slugify(str(row.get("text")))
        ]
        if shown:
            raise UsageError(
                f"--others {others}: {len(shown)} of the images in {file.parent} were generated to show {concept_name} "
                f"({file.name}). Choose a folder that shows other people only."
            )


def _faces(path: Path, option: str, model: FaceModel) -> list[Face]:
    """The faces of a file, found once in a program: several people, and attacks, are calibrated on the same photos."""
    stat = path.stat()
    key = (path.resolve(), stat.st_mtime_ns, stat.st_size, model.name)
    if key not in _KNOWN:
        _KNOWN[key] = model.find(_open(path, option))
    return _KNOWN[key]


def _open(path: Path, option: str) -> Image.Image:
    try:
        return open_image(path)
    except UnreadableImage as error:
        raise UsageError(f"{option}: {error}") from None


def _area(face: Face) -> float:
    return (face.box[2] - face.box[0]) * (face.box[3] - face.box[1])
