"""Intervals and tests against published values, closed forms and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from sd_unlearn.metrics.statistics import (
    bootstrap,
    bootstrap_mean,
    holm,
    paired_difference,
    paired_ratio,
    ratio_of_means,
    wilson,
)

pytestmark = pytest.mark.usefixtures("one_thread")
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.27753),  # z^2 / (n + z^2)
        (10, 10, 0.72247, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_matches_published_values(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_contains_the_rate_and_is_symmetric() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    for n in (1, 7, 200):
        for hits in range(n + 1):
            low, high = wilson(hits, n)
            assert 0 <= low <= hits / n + 1e-12
            assert hits / n - 1e-12 <= high <= 1
            assert wilson(n - hits, n) == pytest.approx((1 - high, 1 - low))
    assert np.ptp(wilson(100, 200)) > np.ptp(wilson(1000, 2000))


def test_bootstrap_of_a_mean_is_the_normal_interval() -> None:
    sample = RNG.normal(3, 2, 400)
    half = 1.96 * sample.std() / 20
    assert bootstrap(np.mean, sample) == pytest.approx((sample.mean() - half, sample.mean() + half), abs=0.03)
    assert bootstrap(np.mean, sample) == bootstrap(np.mean, sample)
    assert bootstrap(np.mean, np.full(9, 0.5)) == (0.5, 0.5)


def test_paired_bootstrap_is_narrower() -> None:
    a = RNG.random(300) + 1
    paired = bootstrap(ratio_of_means, 2 * a, a)
    assert paired == pytest.approx((2, 2))
    low, high = bootstrap(ratio_of_means, 2 * a, a, paired=False)
    assert low < 1.95 < 2.05 < high


def test_ratio_over_zero_is_nan() -> None:
    assert math.isnan(ratio_of_means(np.ones(3), np.zeros(3)))
    assert ratio_of_means(np.array([1, 2]), np.array([3, 3])) == 0.5


@pytest.mark.parametrize("n", [1, 2, 78, 3001])
def test_bootstrap_mean_equals_the_bootstrap_of_the_mean(n: int) -> None:
    sample = RNG.normal(size=n)
    assert bootstrap_mean(sample) == bootstrap(np.mean, sample)


@pytest.mark.parametrize("n", [1, 7, 200])
def test_wilson_agrees_with_scipy(n: int) -> None:
    for hits in range(n + 1):
        interval = binomtest(hits, n).proportion_ci(method="wilson")
        assert wilson(hits, n) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_paired_difference_is_antisymmetric_and_zero_for_equal_values() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 2, 80).astype(float), rng.integers(0, 2, 80).astype(float)
    assert paired_difference(a, a, True) == (0, 0, 0, 1)
    assert paired_difference(a, a, False)[3] == 1
    one, other = paired_difference(a, b, True), paired_difference(b, a, True)
    assert one[0] == pytest.approx(-other[0])
    assert (one[1], one[2]) == pytest.approx((-other[2], -other[1]), abs=1e-12)
    assert one[3] == pytest.approx(other[3])


def test_the_bootstrap_of_a_difference_is_the_normal_interval() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(1, 1, 500), rng.normal(0, 1, 500)
    value, low, high, p = paired_difference(a, b, False)
    half = 1.96 * (a - b).std() / np.sqrt(500)
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.02)
    assert p < 0.001


def test_p_values_are_uniform_when_nothing_differs() -> None:
    """At level 0.1 about a tenth of the comparisons of equals is called a difference; McNemar's is conservative."""
    rng = np.random.default_rng(3)
    called = [paired_difference(rng.normal(size=30), rng.normal(size=30), False)[3] <= 0.1 for _ in range(200)]
    assert 0.04 < np.mean(called) < 0.17
    rates = [paired_difference(*rng.integers(0, 2, (2, 40)).astype(float), True)[3] <= 0.1 for _ in range(200)]
    assert np.mean(rates) < 0.15


def test_holm() -> None:
    assert holm([]) == []
    assert holm([0.02]) == [0.02]
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # monotone: 0.04 is not below 0.03's 0.06
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert max(holm([1.0, 1.0, 1.0])) == 1.0


def test_paired_ratio_has_width_and_coverage() -> None:
    """Of equals it holds 1 and is no point; over many draws the interval holds the true ratio about 95 times in 100."""
    ones = np.ones(50)
    value, low, high = paired_ratio(ones, ones)
    assert (value, low * high) == (1.0, pytest.approx(1.0))
    assert 0.94 < low < 0.98
    assert np.isnan(paired_ratio(ones, ones * 0)).all()
    assert paired_ratio(ones * 0, ones)[:2] == (0.0, 0.0)
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        base = rng.random(100) < 0.9
        mine = np.where(base, rng.random(100) < 0.8, rng.random(100) < 0.3)
        _, low, high = paired_ratio(mine.astype(float), base.astype(float))
        held += low <= (0.9 * 0.8 + 0.1 * 0.3) / 0.9 <= high
    assert 925 < held < 980
    a, b = mine.astype(float), base.astype(float)
    there, back = paired_ratio(a, b), paired_ratio(b, a)
    assert (there[1], there[2]) == pytest.approx((1 / back[2], 1 / back[1]))
