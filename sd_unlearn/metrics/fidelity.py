"""How far generated images are from real ones, as distributions of features."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


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
