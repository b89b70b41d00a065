"""Confidence intervals and tests. All intervals are 95 %; every random draw is seeded.

Wilson's interval and the bootstrap are written here although scipy has both: scipy's `proportion_ci` rounds differently
in the last digit, and the values in results.json must not change with the version of scipy. scipy has no Holm
correction.
"""

from __future__ import annotations

import math
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
    statistic: Callable[[NDArray], float], sample: NDArray, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of a sample, resampled along its first axis.

    Not for equal values, as those of 0 and 1 often are: every resample is the same, and the interval has no width.
    """
    rng, n = np.random.default_rng(0), len(sample)
    values = [statistic(sample[rng.integers(0, n, n)]) for _ in range(resamples)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_mean(values: NDArray[np.float64]) -> tuple[float, float] | tuple[None, None]:
    """`bootstrap(np.mean, values)` of values [N > 0], vectorized: the same numbers, many times faster.

    None if all values are equal: they do not say how much others would vary.
    """
    if (values == values[0]).all():
        return None, None
    rng, n = np.random.default_rng(0), len(values)
    blocks = np.diff(np.linspace(0, RESAMPLES, _BLOCKS + 1).astype(int))
    means = np.concatenate([values[rng.integers(0, n, (rows, n))].mean(1) for rows in blocks])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def poisson_high(n: int) -> float:
    """Upper end of the interval of a mean count if all n counts are 0, exact for a Poisson distribution: 3.7 / n."""
    return -math.log(0.025) / n


def distance_interval(distances: NDArray[np.float64]) -> tuple[float | None, float | None, str]:
    """(low, high, its name) of the mean distance of pairs of images; exactly 0 if all images are unchanged."""
    low, high = bootstrap_mean(distances) if distances.any() else (0.0, 0.0)
    return low, high, "none" if low is None else "bootstrap"


def paired_difference(a: NDArray, b: NDArray, is_rate: bool) -> tuple[float, float | None, float | None, float]:
    """(mean(a - b), low, high, p) of values [N > 0] of the same images.

    If the values are 0 or 1, the interval is `paired_rates` and p that of McNemar's exact test (a binomial test of the
    images on which a and b disagree); else a paired bootstrap interval (None if all differences are equal), and a
    permutation test that flips the signs of the pairs. p is two-sided.
    """
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    if is_rate:
        more, fewer = int((difference > 0).sum()), int((difference < 0).sum())
        low, high = paired_rates(more, fewer, len(difference))
        return float(difference.mean()), low, high, _mcnemar(more, fewer)
    return float(difference.mean()), *bootstrap_mean(difference), _sign_flip(difference)


def paired_rates(more: int, fewer: int, n: int) -> tuple[float, float]:
    """Interval of the difference (more - fewer) / n of two rates on the same n images.

    The adjusted Wald interval for paired rates (Bonett and Price 2012): with p = (more + 1) / (n + 2) and
    q = (fewer + 1) / (n + 2), it is p - q +- z sqrt((p + q - (p - q)^2) / (n + 2)), cut to [-1, 1].

    Args:
        more: Images on which only the first is 1.
        fewer: Images on which only the second is 1.
    """
    p, q = (more + 1) / (n + 2), (fewer + 1) / (n + 2)
    half = Z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return max(-1.0, p - q - half), min(1.0, p - q + half)


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for multiple comparisons: controls the family-wise error rate (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    largest, corrected = 0.0, [0.0] * len(p)
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = largest
    return corrected


def _mcnemar(more: int, fewer: int) -> float:
    from scipy.stats import binomtest  # slow to import

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


def ratio_of_rates(hits_a: int, n_a: int, hits_b: int, n_b: int) -> tuple[float, float, float]:
    """(value, low, high) of the ratio (hits_a / n_a) / (hits_b / n_b) of rates of different images; nan if hits_b is 0.

    The interval combines the Wilson intervals of both rates (MOVER-R: Donner and Zou 2012, Newcombe 2016). The lower
    end has the root in its denominator, so that it is defined where the upper end of b is twice its rate.
    """
    if not hits_b:
        return float("nan"), float("nan"), float("nan")
    a, b = hits_a / n_a, hits_b / n_b
    (low_a, high_a), (low_b, high_b) = wilson(hits_a, n_a), wilson(hits_b, n_b)
    least, most = low_a * (2 * a - low_a), high_a * (2 * a - high_a)
    least_b, most_b = low_b * (2 * b - low_b), high_b * (2 * b - high_b)
    product = a * b
    low = least / (product + math.sqrt(product**2 - least * most_b)) if hits_a else 0.0
    return a / b, low, (product + math.sqrt(product**2 - most * least_b)) / least_b
