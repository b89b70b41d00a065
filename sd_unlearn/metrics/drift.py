"""Drift: the cosine distance of a detector's features between the two images of a pair, on the keep prompts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sd_unlearn.metrics.base import KEEP_GROUPS, DetectorOutput, PromptedImages
from sd_unlearn.metrics.statistics import distance_interval
from sd_unlearn.results import Row


def feature_drift(base: NDArray, lora: NDArray) -> NDArray:
    """Cosine distance in [0, 2] of each pair of features [N, D], symmetric and zero for equal ones. Returns [N]."""
    norms = np.linalg.norm(base, axis=1) * np.linalg.norm(lora, axis=1)
    cosine = (base * lora).sum(1) / np.where(norms == 0, 1, norms)
    return np.where((base == lora).all(1), 0.0, 1 - cosine).clip(min=0)  # equal: not the rounding error of 1 - 1


def drift_rows(prompted: PromptedImages, base: DetectorOutput, output: DetectorOutput, detector: str) -> list[Row]:
    """The mean drift over the keep groups, from the detector's "features"; no row if there are no keep prompts."""
    kept = prompted.in_groups(*KEEP_GROUPS)
    if not kept.any():
        return []
    drift = feature_drift(base["features"][kept], output["features"][kept])
    low, high, interval = distance_interval(drift)
    note = "1 - cosine of the detector's features, same prompt and seed"
    return [Row("drift", "kept", "", float(drift.mean()), len(drift), low, high, detector, interval, note)]
