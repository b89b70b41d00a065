"""UA, IRA and CRA of a grid of two factors, as UnlearnCanvas measures them (Zhang et al. 2024, arXiv 2402.11846).

Images are generated for every combination of the labels of two axes, e.g. every digit in every ink. Of a concept c on
axis A with the other axis B:

    UA   unlearning accuracy: 1 - the share of the images asked to show c in which the classifier finds c
    IRA  in-domain retain accuracy: the share of the other images in which it finds the label asked for on A
    CRA  cross-domain retain accuracy: the share of images in which it finds the label asked for on B

Difference: the images of c are left out of CRA, whether c is an object or a style. An unlearned model answers a prompt
for c with something else, which says nothing about B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

from sd_unlearn.metrics.labels import LabelPredictions
from sd_unlearn.metrics.statistics import wilson
from sd_unlearn.results import Row

GROUP = "grid"


def grid(axes: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Every combination of the labels of all axes: [{axis: label}]."""
    return [dict(zip(axes, labels, strict=True)) for labels in product(*axes.values())]


def factorial_rows(
    label: str, asked: Sequence[Mapping[str, str]], predictions: LabelPredictions, subject: str, detector: str
) -> list[Row]:
    """UA, IRA and CRA with Wilson intervals.

    Args:
        label: The concept's label on one of the grid's axes, or a category of such labels: then an image that shows any
            of them shows the concept.
        asked: Of each of the N images, the label asked for on each of two axes.
        predictions: The classifier's output on these images, on these axes at least.

    Raises:
        ValueError: not two axes, the label is on neither of them, or not one combination per image.
        KeyError: the label belongs to no axis.
    """
    own, members = predictions.members(label)
    others = [axis for axis in asked[0] if axis != own]
    if own not in asked[0] or len(others) != 1:
        raise ValueError(f"{label!r} is of the axis {own}; a grid has this axis and another, not {', '.join(asked[0])}")
    correct = {}
    for axis in (own, others[0]):
        labels = predictions.axes[axis]
        wanted = np.array([labels.index(of_image[axis]) for of_image in asked], dtype=int)
        found = predictions.probabilities[axis].argmax(1)
        if len(wanted) != len(found):
            raise ValueError(f"{len(found)} images, but {len(wanted)} combinations were asked for")
        correct[axis] = found == wanted
    of_concept = np.array([of_image[own] in members for of_image in asked], dtype=bool)
    rates = {
        "ua": (~predictions.shows(label)[of_concept], f"asked to show {label}, not read as {label}"),
        "ira": (correct[own][~of_concept], f"asked to show another {own}, read as asked"),
        "cra": (correct[others[0]][~of_concept], f"asked to show another {own}, {others[0]} read as asked"),
    }
    return [_row(metric, hits, note, subject, detector) for metric, (hits, note) in rates.items()]


def _row(metric: str, hits: np.ndarray, note: str, subject: str, detector: str) -> Row:
    count, n = int(hits.sum()), len(hits)
    low, high = wilson(count, n)
    return Row(metric, GROUP, subject, count / n if n else None, n, low, high, detector, "wilson", note)
