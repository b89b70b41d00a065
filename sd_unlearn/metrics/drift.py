"""How far the pictures of what must stay have moved, pair by pair."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def feature_drift(base: NDArray, lora: NDArray) -> NDArray:
    """Cosine distance, in [0, 2], of each pair of features [N, D]: zero for equals, symmetric. Returns [N]."""
    norms = np.linalg.norm(base, axis=1) * np.linalg.norm(lora, axis=1)
    cosine = (base * lora).sum(1) / np.where(norms == 0, 1, norms)
    return np.where(norms == 0, (base != lora).any(1).astype(float), 1 - cosine).clip(min=0)
