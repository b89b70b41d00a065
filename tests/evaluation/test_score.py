"""Metrics of one concept on images of several subjects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sd_unlearn.data.concept import Concept, Prompt
from sd_unlearn.evaluation.prompts import ImageSpec
from sd_unlearn.evaluation.score import ConceptResults, SubjectImages, run_metrics
from sd_unlearn.results import Card

CONCEPT = Concept("seven", "a seven", "a digit")


class Widths:
    """A metric of pairs: the difference of their widths."""

    name, metric = "widths 1", "lpips"

    def card(self) -> Card:
        return Card(self.name)

    def distance(self, base: Sequence[Image.Image], other: Sequence[Image.Image]) -> NDArray[np.float64]:
        return np.array([b.width - a.width for a, b in zip(base, other, strict=True)], float)


def compared(folder: Path, *widths: int) -> ConceptResults:
    """The base's images of 32 pixels and another subject's of these widths."""
    specs = [ImageSpec("alike", Prompt("a one"), seed) for seed, _ in enumerate(widths)]
    images = []
    for subject, sides in (("base", [32] * len(widths)), ("mine", widths)):
        paths = [folder / subject / f"{seed}.png" for seed, _ in enumerate(sides)]
        for path, side in zip(paths, sides, strict=True):
            path.parent.mkdir(exist_ok=True)
            Image.linear_gradient("L").resize((side, side)).convert("RGB").save(path)
        images.append(SubjectImages(subject, specs, paths, None))
    return run_metrics(CONCEPT, [], [Widths()], images, [])


def test_the_note_of_a_pair_metric_says_how_many_images_were_scaled(tmp_path: Path) -> None:
    (row,) = compared(tmp_path, 32, 64, 64).rows
    assert row.note.endswith(
        "; 2 of 3 images were scaled to the size of the base's, e.g. from 64 x 64 pixels to 32 x 32"
    )
    (row,) = compared(tmp_path, 32, 32, 32).rows
    assert row.note == "of pairs of the same prompt and seed"
