"""Frechet distance between two sets of features (FID on the features of Inception)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sd_unlearn.metrics.mmd import Distance
from sd_unlearn.metrics.statistics import bootstrap


def frechet_distance(a: NDArray, b: NDArray) -> float:
    """Frechet distance between the Gaussians fitted to features [N, D] and [M, D] (Heusel et al. 2017, eq. 6).

    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)). The trace of the root is the sum of the square roots of the eigenvalues
    of A B, computed from the symmetric B^(1/2) A B^(1/2).
    """
    mean = a.mean(0) - b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_b)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ cov_a @ root).clip(min=0)
    return max(0.0, float(mean @ mean + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(cross).sum()))


def frechet_with_interval(generated: NDArray, real: NDArray) -> Distance:
    """Frechet distance of features [N, D] to real ones [M, D], with an interval over `generated`.

    The distance is too large if images are few, and that of a resample is larger still. So the interval is as wide as
    that of bootstrap resamples, but around the value: what other sets of N images would give. It is no interval of the
    distance of infinitely many images; values are comparable for the same N only.
    """
    value = frechet_distance(generated, real)
    low, high = bootstrap(lambda x: frechet_distance(x, real), generated, resamples=200)
    half = (high - low) / 2
    return Distance(value, max(0.0, value - half), value + half)
