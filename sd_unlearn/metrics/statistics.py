"""Intervals: Wilson for rates, bootstrap for everything else. All 95 %, all seeded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054  # the 97.5 % point of the normal distribution
RESAMPLES = 2000


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson score interval of a rate hits / n, in [0, 1] (Wilson 1927). n = 0 gives (0, 1): nothing is known."""
    if n == 0:
        return 0.0, 1.0
    rate, z2 = hits / n, Z * Z
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * np.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    # The bounds enclose the rate; rounding would put 0 of n and n of n a hair outside.
    return max(0.0, min(rate, float(centre - half))), min(1.0, max(rate, float(centre + half)))


def bootstrap(
    statistic: Callable[..., NDArray[np.float64] | float],
    *samples: NDArray,
    paired: bool = True,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """Percentile interval of a statistic of samples resampled along their first axis, jointly when paired.

    Resamples in which the statistic is not finite (a ratio over zero) are passed over; all of them gives (nan, nan).
    """
    rng = np.random.default_rng(0)
    values = []
    for _ in range(resamples):
        if paired:
            pick = rng.integers(0, len(samples[0]), len(samples[0]))
            values.append(statistic(*(s[pick] for s in samples)))
        else:
            values.append(statistic(*(s[rng.integers(0, len(s), len(s))] for s in samples)))
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)


def ratio_of_means(top: NDArray, bottom: NDArray) -> float:
    """mean(top) / mean(bottom); nan when the bottom is zero."""
    below = float(np.mean(bottom))
    return float(np.mean(top)) / below if below else float("nan")
