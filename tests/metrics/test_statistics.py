"""Intervals and tests against published values, closed forms and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from sd_unlearn.metrics.statistics import (
    bootstrap,
    bootstrap_mean,
    holm,
    paired_difference,
    paired_rates,
    paired_ratio,
    ratio_of_rates,
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


@pytest.mark.parametrize("n", [2, 78, 3001])
def test_bootstrap_mean_equals_the_bootstrap_of_the_mean(n: int) -> None:
    sample = RNG.normal(size=n)
    assert bootstrap_mean(sample) == bootstrap(np.mean, sample)
    assert bootstrap_mean(sample[:1]) == bootstrap_mean(np.full(n, 0.3)) == (None, None)


@pytest.mark.parametrize("n", [1, 7, 200])
def test_wilson_agrees_with_scipy(n: int) -> None:
    for hits in range(n + 1):
        interval = binomtest(hits, n).proportion_ci(method="wilson")
        assert wilson(hits, n) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_paired_difference_is_antisymmetric_and_zero_for_equal_values() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 2, 80).astype(float), rng.integers(0, 2, 80).astype(float)
    value, low, high, p = paired_difference(a, a, True)
    assert (value, p, low) == (0, 1, pytest.approx(-high))
    assert paired_difference(a, a, False) == (0, None, None, 1)
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


@pytest.mark.parametrize(("more", "fewer", "n"), [(0, 0, 1), (1, 0, 1), (0, 0, 100), (100, 0, 100), (3, 40, 50)])
def test_the_interval_of_a_difference_has_width_and_contains_it(more: int, fewer: int, n: int) -> None:
    low, high = paired_rates(more, fewer, n)
    assert -1 <= low <= (more - fewer) / n <= high <= 1
    assert low < high
    assert paired_rates(fewer, more, n) == pytest.approx((-high, -low))


def test_the_interval_of_a_difference_against_its_formula() -> None:
    assert paired_rates(0, 0, 98) == pytest.approx((-0.0277, 0.0277), abs=5e-5)  # 1.96 sqrt(0.02 / 100)
    low, high = paired_rates(98, 0, 98)  # 0.98 - 1.96 sqrt((1 - 0.98^2) / 100)
    assert (low, high) == (pytest.approx(0.9410, abs=5e-5), 1)


@pytest.mark.parametrize(("more", "fewer"), [(0.01, 0.0), (0.01, 0.01), (0.95, 0.0), (0.2, 0.1)])
def test_coverage_of_a_difference(more: float, fewer: float) -> None:
    """At a rate of 1 % and n = 100 a bootstrap interval would hold the difference in 65 of 100 evaluations."""
    counts = np.random.default_rng(4).multinomial(100, [more, fewer, 1 - more - fewer], 1000)
    ends = np.array([paired_rates(a, b, 100) for a, b, _ in counts.tolist()])
    assert ((ends[:, 0] <= more - fewer) & (more - fewer <= ends[:, 1])).mean() > 0.935


def test_ratio_of_rates_has_width_and_is_its_own_inverse() -> None:
    assert np.isnan(ratio_of_rates(3, 10, 0, 10)).all()
    value, low, high = ratio_of_rates(3, 3, 3, 3)
    assert (value, low * high) == (1.0, pytest.approx(1.0))
    assert 0.4 < low < 0.5
    value, low, high = ratio_of_rates(0, 100, 100, 100)
    assert (value, low) == (0.0, 0.0)
    assert 0.03 < high < 0.04  # that of 0 of 100 alone is 0.037
    there, back = ratio_of_rates(40, 50, 90, 200), ratio_of_rates(90, 200, 40, 50)
    assert there == pytest.approx((1 / back[0], 1 / back[2], 1 / back[1]))
    assert ratio_of_rates(5, 10, 10**7, 10**7)[1:] == pytest.approx(wilson(5, 10), abs=1e-5)  # a known denominator


@pytest.mark.parametrize(("a", "b"), [(0.4, 0.85), (0.85, 0.84), (0.99, 0.98), (0.02, 0.3), (0.08, 0.06)])
def test_coverage_of_a_ratio_of_rates(a: float, b: float) -> None:
    rng = np.random.default_rng(5)
    pairs = zip(rng.binomial(100, a, 1000).tolist(), rng.binomial(200, b, 1000).tolist(), strict=True)
    ends = np.array([ratio_of_rates(x, 100, y, 200)[1:] for x, y in pairs])
    assert ((ends[:, 0] <= a / b) & (a / b <= ends[:, 1])).mean() > 0.935
