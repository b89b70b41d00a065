"""Confidence intervals and tests. All intervals are 95 %; every random draw is seeded.

Wilson's interval and the bootstrap are written here although scipy has both: scipy's `proportion_ci` rounds differently
in the last digit and its `bootstrap` draws the samples of an unpaired statistic in another order, and the values in
results.json must not change with the version of scipy. scipy has no Holm correction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054  # the 97.5 % point of the normal distribution
RESAMPLES = 2000
_BLOCKS = 8  # of resamples held in memory at once


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Wilson score interval of the rate hits / n, in [0, 1] (Wilson 1927). n = 0 gives (0, 1)."""
    if n == 0:
        return 0.0, 1.0
    rate, z2 = hits / n, Z * Z
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * np.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    # The interval contains the rate; rounding errors would exclude it for 0 of n and n of n.
    return max(0.0, min(rate, float(centre - half))), min(1.0, max(rate, float(centre + half)))


def bootstrap(
    statistic: Callable[..., NDArray[np.float64] | float],
    *samples: NDArray,
    paired: bool = True,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of samples, resampled along their first axis.

    Resamples whose statistic is not finite (a ratio over zero) are dropped; if all are, the result is (nan, nan).

    Args:
        paired: Resample all samples with the same indices.
    """
    rng = np.random.default_rng(0)
    values = []
    for _ in range(resamples):
        if paired:
            indices = rng.integers(0, len(samples[0]), len(samples[0]))
            values.append(statistic(*(sample[indices] for sample in samples)))
        else:
            values.append(statistic(*(sample[rng.integers(0, len(sample), len(sample))] for sample in samples)))
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_mean(values: NDArray[np.float64]) -> tuple[float, float]:
    """`bootstrap(np.mean, values)` of values [N > 0], vectorized: the same numbers, many times faster."""
    rng, n = np.random.default_rng(0), len(values)
    blocks = np.diff(np.linspace(0, RESAMPLES, _BLOCKS + 1).astype(int))
    means = np.concatenate([values[rng.integers(0, n, (rows, n))].mean(1) for rows in blocks])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def ratio_of_means(top: NDArray, bottom: NDArray) -> float:
    """mean(top) / mean(bottom); nan if the bottom is zero."""
    denominator = float(np.mean(bottom))
    return float(np.mean(top)) / denominator if denominator else float("nan")


def paired_difference(a: NDArray, b: NDArray, is_rate: bool) -> tuple[float, float, float, float]:
    """(mean(a - b), low, high, p) of values [N > 0] of the same images.

    The interval is a paired bootstrap interval. p is two-sided: McNemar's exact test if the values are 0 or 1 (a
    binomial test of the images on which a and b disagree), else a permutation test that flips the signs of the pairs.
    """
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    low, high = bootstrap_mean(difference)
    p = _mcnemar(difference) if is_rate else _sign_flip(difference)
    return float(difference.mean()), low, high, p


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for multiple comparisons: controls the family-wise error rate (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    largest, corrected = 0.0, [0.0] * len(p)
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = largest
    return corrected


def _mcnemar(difference: NDArray) -> float:
    from scipy.stats import binomtest  # slow to import

    more, fewer = int((difference > 0).sum()), int((difference < 0).sum())
    return float(binomtest(more, more + fewer).pvalue) if more + fewer else 1.0


def _sign_flip(difference: NDArray) -> float:
    rng, observed = np.random.default_rng(0), abs(difference.sum())
    signs = rng.integers(0, 2, (RESAMPLES, len(difference)), dtype=np.int8) * 2 - 1
    at_least_observed = np.abs(signs @ difference) >= observed - 1e-12 * max(1.0, np.abs(difference).sum())
    return float((1 + at_least_observed.sum()) / (1 + RESAMPLES))


def paired_ratio(a: NDArray, b: NDArray) -> tuple[float, float, float]:
    """(mean(a) / mean(b), low, high) of values [N > 0] that are 0 or 1 on the same images; nan if b is never 1.

    The interval combines two Wilson intervals, narrowed by the correlation of a and b (Bonett and Price 2006). Unlike a
    bootstrap interval it has a width even if all values are equal: 50 of 50 against 50 of 50 does not prove a 1.
    """
    first, second = np.asarray(a) > 0, np.asarray(b) > 0
    hits_a, hits_b, disagree = int(first.sum()), int(second.sum()), int((first != second).sum())
    either = int((first | second).sum())
    if not hits_b:
        return float("nan"), float("nan"), float("nan")
    joint = np.sqrt((disagree + 2) / ((hits_a + 1) * (hits_b + 1)))
    single = [np.sqrt((1 - (hits + 1) / (either + 2)) / (hits + 1)) for hits in (hits_a, hits_b)]
    z = Z * joint / sum(single)
    bounds = []
    for hits in (hits_a, hits_b):
        half = z * np.sqrt(z * z + 4 * hits * (1 - hits / either))
        bounds.append([(2 * hits + z * z + sign * half) / (2 * (either + z * z)) for sign in (-1, 1)])
    (low_a, high_a), (low_b, high_b) = bounds
    return hits_a / hits_b, float(max(0.0, low_a) / high_b), float(high_a / low_b)
