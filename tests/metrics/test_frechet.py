"""The Frechet distance against closed forms and torch-fidelity's formula."""

from __future__ import annotations

import numpy as np
import pytest

from sd_unlearn.metrics.frechet import frechet_distance, frechet_with_interval

pytestmark = pytest.mark.usefixtures("one_thread")
RNG = np.random.default_rng(0)


def test_frechet_identity_symmetry_and_order() -> None:
    a, b = RNG.normal(size=(200, 8)), RNG.normal(1, 2, size=(150, 8))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, RNG.permutation(a)) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a + 0.1) < frechet_distance(a, a + 0.2)


def test_frechet_of_two_gaussians() -> None:
    """Axis by axis (mu_a - mu_b)^2 + (sigma_a - sigma_b)^2; the sample moments are made exact."""
    unit = RNG.normal(size=(500, 2))
    unit -= unit.mean(0)
    unit = unit @ np.linalg.inv(np.linalg.cholesky(np.cov(unit, rowvar=False))).T
    a, b = unit * [1.0, 3.0], unit * [2.0, 0.5] + [4.0, -1.0]
    assert frechet_distance(a, b) == pytest.approx(16 + 1 + 1 + 2.5**2)
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(16 + 1 + 1 + 2.5**2)
    flat_a, flat_b = unit * [1.0, 0.0], unit * [3.0, 0.0] + [2.0, 0.0]  # a feature that is never active
    assert frechet_distance(flat_a, flat_b) == pytest.approx(4 + 4)


def test_frechet_against_torch_fidelitys_formula() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    a, b = RNG.normal(size=(300, 6)) @ RNG.normal(size=(6, 6)), RNG.normal(1, 1, size=(200, 6))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(cov_a @ cov_b).real
    want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-8)


def test_the_interval_covers_the_value_and_other_sets_of_as_many_images() -> None:
    real = RNG.normal(size=(2000, 6))
    values = [frechet_distance(RNG.normal(size=(60, 6)), real) for _ in range(40)]
    found = frechet_with_interval(RNG.normal(size=(60, 6)), real)
    assert found.low < found.value < found.high
    covering = [low <= np.mean(values) <= high for low, high in (intervals(real) for _ in range(20))]
    assert np.mean(covering) > 0.7


def intervals(real: np.ndarray) -> tuple[float, float]:
    found = frechet_with_interval(RNG.normal(size=(60, 6)), real)
    return found.low, found.high
