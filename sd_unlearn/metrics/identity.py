"""Identity: is the person still generated? Compares faces with reference images of the person.

An image shows the person if the similarity of its most similar face reaches the threshold. Images without a face do not
show the person and count in every rate. The threshold is calibrated on other people: at most a given share of their
faces (the false accept rate) reaches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sd_unlearn.errors import UsageError
from sd_unlearn.metrics import people
from sd_unlearn.metrics.base import CONCEPT_GROUPS, KEEP_GROUPS, DetectorOutput, ImageValues, PromptedImages
from sd_unlearn.metrics.faces import FaceModel, check_face_model, make_face_model
from sd_unlearn.metrics.people import Calibration, Reference
from sd_unlearn.results import MAX_FACES, Card, Row


class Identity:
    """The identity metric, for any images.

    Args:
        person: The person's name.
        model: Detects and embeds faces.
        reference: The person's faces.
        calibration: The threshold.
    """

    def __init__(self, person: str, model: FaceModel, reference: Reference, calibration: Calibration) -> None:
        self.person, self.model, self.reference, self.calibration = person, model, reference, calibration
        self.name = f"{model.name}, reference sha256:{reference.sha256[:12]}"

    def card(self) -> Card:
        own, threshold = self.reference.leave_one_out(), self.calibration.threshold
        n, faceless = len(self.reference.embeddings), self.reference.faceless
        extra = {
            "reference": f"{n} faces of {self.person}" + (f"; no face in {', '.join(faceless)}" if faceless else ""),
            "recognised": f"{int((own >= threshold).sum())} of {n} reference faces, each against the mean of the others"
            if len(own)
            else "unknown: needs at least two reference faces",
            "others": f"{len(self.calibration.similarities)} faces on {self.calibration.images} images of "
            f"{self.calibration.people} ({self.calibration.faceless} without a face), "
            f"highest similarity {self.calibration.similarities.max():.4f}",
        }
        return Card(
            detector=self.name,
            metrics=("leakage", "face_rate", "confusion"),
            about=f"Compares every face with the mean of {self.person}'s faces; the most similar face decides.",
            version=self.model.version,
            weights=self.model.weights,
            threshold=str(self.calibration),
            limits=f"{self.model.limits} An image with k faces is up to k times as likely as a single face to be taken "
            "for the person by mistake.",
            extra=extra,
        )

    def read(self, images: Sequence[Image.Image]) -> DetectorOutput:
        """Detect and compare the faces of N images.

        Returns:
            similarity [N]: cosine of the most similar face, nan without a face; faces [N]: the number of faces;
            boxes [N, MAX_FACES, 4] (x0, y0, x1, y1 as fractions of width and height) and similarities [N, MAX_FACES]
            of the most similar faces, most similar first, padded with nan. All faces are compared.
        """
        output: DetectorOutput = {
            "similarity": np.full(len(images), np.nan),
            "faces": np.zeros(len(images), np.int64),
            "boxes": np.full((len(images), MAX_FACES, 4), np.nan),
            "similarities": np.full((len(images), MAX_FACES), np.nan),
        }
        for i, image in enumerate(images):
            faces = self.model.find(image)
            output["faces"][i] = len(faces)
            if not faces:
                continue
            similarity = self.reference.similarity(np.stack([face.embedding for face in faces]))
            order = np.lexsort([*np.array([face.box for face in faces]).T, -similarity])[:MAX_FACES]
            output["similarity"][i] = similarity[order[0]]
            output["similarities"][i, : len(order)] = similarity[order]
            size = (image.width, image.height) * 2
            output["boxes"][i, : len(order)] = [np.divide(faces[j].box, size) for j in order]
        return output

    def count(self, prompted: PromptedImages, output: DetectorOutput) -> list[ImageValues]:
        """Leakage of the concept groups, confusion of the keep groups, face_rate of all groups."""
        shown, note = self.shows(output), f"a face with similarity >= {self.calibration.threshold:.4f}"
        rates = (
            ("leakage", CONCEPT_GROUPS, shown, note),
            ("confusion", KEEP_GROUPS, shown, f"{note}, though nobody asked for {self.person}"),
            ("face_rate", (*CONCEPT_GROUPS, *KEEP_GROUPS), output["faces"] > 0, "images with at least one face"),
        )
        return [
            ImageValues(metric, groups, np.where(prompted.in_groups(*groups), hits, np.nan), note=note)
            for metric, groups, hits, note in rates
        ]

    def shows(self, output: DetectorOutput) -> NDArray[np.bool_]:
        """[N] whether each image shows the person; False for images without a face."""
        return output["similarity"] >= self.calibration.threshold

    def compare(self, prompted: PromptedImages, base: DetectorOutput, output: DetectorOutput) -> list[Row]:
        return []

    def words(self, output: DetectorOutput, index: int) -> str:
        if not output["faces"][index]:
            return "no face"
        who = self.person if self.shows(output)[index] else "another face"
        return f"{who} {output['similarity'][index]:.2f}"


def check_identity(
    concept_name: str,
    reference: Path,
    others: Path,
    embedder: str,
    weights: Path | None,
    false_accept_rate: float | None,
) -> None:
    """Check the arguments of make_identity; loads no model. Raises UsageError as it does."""
    check_face_model(embedder, weights)
    if false_accept_rate is not None and not 0 < false_accept_rate < 1:
        raise UsageError(f"--false_accept_rate {false_accept_rate:g} must be between 0 and 1, e.g. 0.01.")
    people.check_no_overlap(people.images_of(reference, "--reference"), people.images_of(others, "--others"))
    people.check_not_rendered(concept_name, others)


def make_identity(
    concept_name: str,
    reference: Path,
    others: Path,
    embedder: str = "facenet",
    weights: Path | None = None,
    false_accept_rate: float | None = None,
    device: str = "cpu",
) -> Identity:
    """The identity metric of a person. Reads both folders with their subfolders.

    Args:
        concept_name: The person's name.
        reference: Folder of images of the person, e.g. the positives of a run.
        others: Folder of images of other people, real or generated by the base.
        embedder: One of faces.FACE_MODELS.
        weights: Weights file for facenet or arcface.
        false_accept_rate: In (0, 1); see `calibrate`.
        device: Device of the networks, e.g. cuda.

    Raises:
        UsageError: an invalid argument (checked before any model is loaded), or no face; see `read_reference`.
        UnlearnError: the weights cannot be downloaded or read.
    """
    check_identity(concept_name, reference, others, embedder, weights, false_accept_rate)
    model = make_face_model(embedder, weights, device)
    person = people.read_reference(reference, model)
    return Identity(concept_name, model, person, people.calibrate(others, model, person, false_accept_rate))
