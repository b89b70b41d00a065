"""KID and CMMD: known values, invariances and coverage of the intervals."""

from __future__ import annotations

import numpy as np
import pytest

from sd_unlearn.errors import UsageError
from sd_unlearn.metrics.mmd import CMMD_SCALE, Distance, cmmd, gaussian, kid, mmd2

pytestmark = pytest.mark.usefixtures("one_thread")
RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(40, 6)), RNG.normal(0.5, 1, size=(50, 6))


def by_hand(a: np.ndarray, b: np.ndarray, paired: bool = False) -> float:
    """The cubic kernel in three loops."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    def inside(rows: np.ndarray) -> float:
        return float(np.mean([kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]))

    between = [kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if not paired or i != j]
    return inside(a) + inside(b) - 2 * float(np.mean(between))


def test_kid_matches_its_formula() -> None:
    assert kid(A, B).value == pytest.approx(by_hand(A, B))
    assert kid(A, B[:40], paired=True).value == pytest.approx(by_hand(A, B[:40], paired=True))
    assert kid(A, B[:40], paired=True).value != pytest.approx(kid(A, B[:40]).value)


def test_kid_of_several_blocks() -> None:
    from sklearn.metrics.pairwise import polynomial_kernel

    a, b = RNG.normal(size=(600, 3)), RNG.normal(size=(520, 3))
    inside = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in map(polynomial_kernel, (a, b))]
    assert kid(a, b).value == pytest.approx(sum(inside) - 2 * polynomial_kernel(a, b).mean())


def test_distance_of_a_set_to_itself_is_zero() -> None:
    assert kid(A, A, paired=True) == cmmd(A, A, paired=True) == Distance(0, 0, 0)


@pytest.mark.parametrize("distance", [kid, cmmd])
def test_symmetry_and_order(distance) -> None:  # type: ignore[no-untyped-def]
    turn_a, turn_b = RNG.permutation(len(A)), RNG.permutation(len(B))
    assert distance(A, B).value == pytest.approx(distance(B, A).value)
    here, there = distance(A, B), distance(A[turn_a], B[turn_b])
    assert (here.value, here.low, here.high) == pytest.approx((there.value, there.low, there.high))
    here, there = distance(A, B[:40], True), distance(A[turn_a], B[:40][turn_a], True)
    assert (here.value, here.low, here.high) == pytest.approx((there.value, there.low, there.high))
    here, there = distance(A, B[:40], True), distance(B[:40], A, True)
    assert (here.value, here.low, here.high) == pytest.approx((there.value, there.low, there.high))
    assert distance(A, B) == distance(A, B)


def test_float32_features() -> None:
    assert kid(A.astype(np.float32), B.astype(np.float32)).value == pytest.approx(kid(A, B).value, rel=1e-5)


def test_kid_of_one_distribution_is_unbiased_and_its_interval_contains_zero() -> None:
    found = [kid(RNG.normal(size=(60, 5)), RNG.normal(size=(40, 5))) for _ in range(60)]
    values = np.array([f.value for f in found])
    assert abs(values.mean()) < 4 * values.std() / 60**0.5
    assert values.min() < 0  # or a bias would make it positive throughout
    assert sum(f.low <= 0 <= f.high for f in found) >= 57
    far = kid(RNG.normal(size=(60, 5)), RNG.normal(1, 1, size=(60, 5)))
    assert far.low > 0


@pytest.mark.parametrize("paired", [False, True])
def test_intervals_contain_the_distance_of_two_gaussians(paired: bool) -> None:
    """Of N(0, I) and N(m, I), E exp(-|x-y|^2 / 2s^2) is (s^2 / (s^2 + 2))^(d/2) exp(-m^2 / 2(s^2 + 2))."""
    width, d, apart, trials = 2.0, 3, 1.5, 80
    truth = 2 * (4 / 6) ** (d / 2) * (1 - np.exp(-(apart**2) / (2 * 6)))
    found = []
    for _ in range(trials):
        a = RNG.normal(size=(80, d))
        b = (0.8 * a + 0.6 * RNG.normal(size=(80, d)) if paired else RNG.normal(size=(80, d))) + [apart, 0, 0]
        found.append(mmd2(a, b, gaussian(width), paired))
    values = np.array([f.value for f in found])
    assert abs(values.mean() - truth) < 4 * values.std() / trials**0.5
    hits = sum(f.low <= truth <= f.high for f in found)
    assert hits >= 0.87 * trials  # 95 % less three standard deviations
    spread = np.mean([f.high - f.low for f in found]) / (2 * 1.96)
    assert spread == pytest.approx(values.std(), rel=0.3)  # and it is no wider than it must be


def test_cmmd_normalizes_embeddings_and_is_scaled() -> None:
    assert cmmd(3 * A, B).value == pytest.approx(cmmd(A, 0.2 * B).value)
    one, two = np.tile([1.0, 0], (12, 1)), np.tile([0, 2.0], (12, 1))
    want = CMMD_SCALE * (2 - 2 * np.exp(-2 / (2 * 10**2)))  # |x - y|^2 = 2
    found = cmmd(one, two)
    assert (found.value, found.low, found.high) == pytest.approx((want, want, want))


def test_invalid_sets_are_refused() -> None:
    with pytest.raises(UsageError, match="sets of 9 and 50"):
        kid(A[:9], B)
    with pytest.raises(UsageError, match="40 and 50 images are not pairs"):
        kid(A, B, paired=True)
