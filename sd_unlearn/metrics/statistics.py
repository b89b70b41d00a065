"""Intervals: Wilson for rates, bootstrap for everything else. All 95 %, all seeded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def paired_difference(a: NDArray, b: NDArray, is_rate: bool) -> tuple[float, float, float, float]:
    """(mean(a - b), low, high, p) of values [N] counted on the same N > 0 pictures.

    The interval is a paired bootstrap's. p is two-sided: McNemar's exact test where the values are 0 or 1 (a binomial
    test of the pictures on which the two disagree), else a test of the pairs with their signs turned at random.
    """
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    rng, n = np.random.default_rng(0), len(difference)
    blocks = [n_rows for n_rows in np.diff(np.linspace(0, RESAMPLES, 9).astype(int)) if n_rows]
    means = np.concatenate([difference[rng.integers(0, n, (rows, n))].mean(1) for rows in blocks])
    low, high = np.percentile(means, [2.5, 97.5])
    p = _mcnemar(difference) if is_rate else _sign_flip(difference)
    return float(difference.mean()), float(low), float(high), p


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for their number, so that the chance of any false alarm stays at the level (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    worst, corrected = 0.0, [0.0] * len(p)
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = worst
    return corrected


def _mcnemar(difference: NDArray) -> float:
    from scipy.stats import binomtest

    more, fewer = int((difference > 0).sum()), int((difference < 0).sum())
    return float(binomtest(more, more + fewer).pvalue) if more + fewer else 1.0


def _sign_flip(difference: NDArray) -> float:
    rng, observed = np.random.default_rng(0), abs(difference.sum())
    signs = rng.integers(0, 2, (RESAMPLES, len(difference)), dtype=np.int8) * 2 - 1
    as_far = np.abs(signs @ difference) >= observed - 1e-12 * max(1.0, np.abs(difference).sum())
    return float((1 + as_far.sum()) / (1 + RESAMPLES))


def paired_ratio(a: NDArray, b: NDArray) -> tuple[float, float, float]:
    """(mean(a) / mean(b), low, high) of values [N > 0] that are 0 or 1 on the same pictures; nan where b is never 1.

    The interval joins two of Wilson's, narrowed by how far a and b go together (Bonett and Price 2006). It keeps its
    width where a bootstrap has none: 50 of 50 against 50 of 50 does not show that nothing was lost.
    """
    first, second = np.asarray(a) > 0, np.asarray(b) > 0
    one, other, apart = int(first.sum()), int(second.sum()), int((first != second).sum())
    either = int((first | second).sum())
    if not other:
        return float("nan"), float("nan"), float("nan")
    joint = np.sqrt((apart + 2) / ((one + 1) * (other + 1)))
    apiece = [np.sqrt((1 - (count + 1) / (either + 2)) / (count + 1)) for count in (one, other)]
    z = Z * joint / sum(apiece)
    ends = []
    for count in (one, other):
        half = z * np.sqrt(z * z + 4 * count * (1 - count / either))
        ends.append([(2 * count + z * z + sign * half) / (2 * (either + z * z)) for sign in (-1, 1)])
    (low, high), (low_b, high_b) = ends
    return one / other, float(max(0.0, low) / high_b), float(high / low_b)
