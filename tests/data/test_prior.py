"""Where beta is from, and what its estimators make of mixtures whose share is known."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from sd_unlearn.data import prior
from sd_unlearn.data.prior import (
    ASSUMED_BETA,
    MIN_IMAGES,
    BetaEstimate,
    ImageEmbeddings,
    Prior,
    best_bin,
    components,
    copies_of,
    cross_fitted_scores,
    elkan_noto,
    error_bound,
    estimate_beta,
    resolve_beta,
)
from sd_unlearn.errors import UsageError


def mixture(
    share: float, n_positive: int = 200, n_unlabeled: int = 500, seed: int = 0, apart: float = 6.0, width: int = 8
) -> ImageEmbeddings:
    """Two Gaussians of unit variance whose means are `apart`, in some direction."""
    rng = np.random.default_rng(seed)
    hidden = round(share * n_unlabeled)
    normal, concept = (rng.normal(size=(n, width)) for n in (n_unlabeled - hidden, n_positive + hidden))
    concept += apart / width**0.5
    return ImageEmbeddings("a test", "because", concept[:n_positive], np.concatenate([concept[n_positive:], normal]))


def test_option_overrides_known_share_overrides_assumption() -> None:
    assert resolve_beta(None, None) == Prior(ASSUMED_BETA, "assumed")
    assert resolve_beta(None, 0.2) == Prior(0.2, "known")
    assert resolve_beta(0.3, 0.2) == Prior(0.3, "option")


def test_beta_is_estimated_only_on_request() -> None:
    for asked in (None, 0.3):
        resolve_beta(asked, 0.2, lambda: pytest.fail("nobody asked"))
    found = resolve_beta("estimate", 0.2, lambda: mixture(0.4))
    assert (found.beta, found.source) == (found.estimates[0].beta, "estimated")
    assert [e.method for e in found.estimates] == ["BBE", "Elkan-Noto"]
    assert found.beta == pytest.approx(0.4, abs=0.05)
    assert found.notes[0] == "because"
    for estimate, note in zip(found.estimates, found.notes[1:], strict=True):
        for part in (estimate.method, f"{estimate.beta:.3f}", f"{estimate.low:.3f} to {estimate.high:.3f}", "a test"):
            assert part in note


# -- the estimators, on scores --


def test_best_bin_by_hand() -> None:
    """All positives at 1; of the unlabeled 3 of 12 are, too. Below 1 there is no positive left to count."""
    assert best_bin(np.ones(8), np.r_[np.ones(3), np.zeros(9)]) == 0.25
    # q_p 1/2 and q_u 1/10 at 2; all of both at 1. With n as large as here the bound is small: the pure bin wins.
    positive, unlabeled = np.repeat([1.0, 2.0], 5000), np.repeat([1.0, 2.0], [9000, 1000])
    assert best_bin(positive, unlabeled) == pytest.approx(0.2)
    # With ten of each the bound at half of the positives would be more than all that could be won.
    assert error_bound(10, 10) > 0.4
    assert best_bin(positive[::1000], unlabeled[::1000]) == 1.0


def test_error_bound_of_twenty_positives() -> None:
    assert error_bound(20, 500) == pytest.approx(0.36, abs=0.01)
    assert error_bound(80, 2000) == pytest.approx(error_bound(20, 500) / 2)  # four times the images, half the bound


def test_elkan_noto_by_hand() -> None:
    """200 labeled positives and 500 unlabeled images of which 100 look like them: c = 200 / 300."""
    unlabeled = np.repeat([5.0, -1.0], [100, 400])
    assert elkan_noto(np.full(200, 5.0), unlabeled) == pytest.approx(0.2)
    assert elkan_noto(np.full(200, 5.0), np.full(500, -1.0)) == pytest.approx(0)


@pytest.mark.parametrize("estimator", [best_bin, elkan_noto])
def test_order_and_unit_of_scores_do_not_matter(estimator: Callable[..., float]) -> None:
    rng = np.random.default_rng(0)
    positive, unlabeled = rng.normal(2, 1, 60), rng.normal(0, 2, 90)
    expected = estimator(positive, unlabeled)
    assert estimator(positive[::-1], rng.permutation(unlabeled)) == pytest.approx(expected)
    assert estimator(np.exp(positive), np.exp(unlabeled)) == pytest.approx(expected)


def test_duplicated_images_give_the_same_estimate() -> None:
    rng = np.random.default_rng(0)
    positive, unlabeled = rng.normal(2, 1, 60), rng.normal(0, 2, 90)
    twice = elkan_noto(np.tile(positive, 2), np.tile(unlabeled, 2))
    assert twice == pytest.approx(elkan_noto(positive, unlabeled))


# -- the scores --


class Memoriser:
    """Knows by heart what it was shown, and what is very near to it; says one half to everything else."""

    def fit(self, rows: np.ndarray, labels: np.ndarray) -> None:
        self.rows, self.labels = rows, labels

    def predict_proba(self, rows: np.ndarray) -> np.ndarray:
        distances = np.linalg.norm(rows[:, None] - self.rows, axis=2)
        known = np.where(distances.min(1) < 1e-3, self.labels[distances.argmin(1)], 0.5)
        return np.stack([1 - known, known], 1)


def test_no_image_is_scored_by_a_model_that_saw_it() -> None:
    rows = np.random.default_rng(0).normal(size=(90, 5))
    labels = np.arange(90) < 30
    assert cross_fitted_scores(rows, labels, Memoriser) == pytest.approx(np.full(90, 0.5))


def test_no_image_is_scored_by_a_model_that_saw_its_copy() -> None:
    """The photo that is in both folders, and the one that is twice in one."""
    rows = np.random.default_rng(0).normal(size=(90, 5))
    rows[60:75], rows[75:90] = rows[:15], rows[45:60]
    rows[60:] += 1e-6 * np.random.default_rng(1).normal(size=(30, 5))  # as another batch rounds
    scores = cross_fitted_scores(rows, np.arange(90) < 30, Memoriser)
    assert scores == pytest.approx(np.full(90, 0.5))


def test_random_labels_cannot_be_predicted() -> None:
    """Labels by chance in many dimensions, where any model fits its own data: held-out scores must not know them."""
    rows = np.random.default_rng(0).normal(size=(300, 200))
    labels = np.arange(300) < 100
    scores = cross_fitted_scores(rows, labels)
    order = scores.argsort().argsort()
    auc = (order[labels].mean() - 49.5) / 200
    assert auc == pytest.approx(0.5, abs=0.12)


def test_the_order_of_the_images_does_not_matter() -> None:
    images = mixture(0.3, 40, 80)
    rows, labels = np.concatenate([images.positive, images.unlabeled]), np.arange(120) < 40
    shuffled = np.random.default_rng(1).permutation(120)
    expected = cross_fitted_scores(rows, labels)[shuffled]
    assert cross_fitted_scores(rows[shuffled], labels[shuffled]) == pytest.approx(expected, abs=1e-9)


def test_copies_share_a_number_and_others_do_not() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 300)).astype(np.float32)
    numbers = copies_of(np.concatenate([rows, rows + np.float32(1e-7)]))
    assert (numbers[:50] == numbers[50:]).all()
    assert len(set(numbers)) == 50
    assert set(copies_of(np.ones((4, 3)))) == {0}


def test_components_are_few_and_see_constant_columns() -> None:
    rows = np.random.default_rng(0).normal(size=(30, 1000))
    rows[:, 7] = 1.0
    assert components(rows).shape == (30, 30)
    assert components(rows[:, :5]).shape == (30, 5)
    assert np.isfinite(components(rows)).all()


# -- both together --


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.4])
def test_both_methods_find_the_share_of_clear_mixtures(share: float) -> None:
    for estimate in estimate_beta(mixture(share)):
        assert estimate.beta == pytest.approx(share, abs=0.05), estimate.method
        assert 0 < estimate.low <= estimate.beta <= estimate.high < 1
        assert (estimate.n_positive, estimate.n_unlabeled, estimate.embedding) == (200, 500, "a test")


def test_most_intervals_cover_the_true_share() -> None:
    found = [estimate_beta(mixture(0.3, 60, 150, seed))[0] for seed in range(10)]
    assert sum(e.low <= 0.3 <= e.high for e in found) >= 8
    assert max(e.high - e.low for e in found) < 0.5  # and say something


def test_intervals_shrink_with_more_images() -> None:
    few, many = (estimate_beta(mixture(0.3, n, 3 * n))[0] for n in (20, 200))
    assert many.high - many.low < (few.high - few.low) / 2


def test_estimate_stays_between_0_and_1() -> None:
    none, all_of_them = (estimate_beta(mixture(share, 50, 100))[0] for share in (0.0, 1.0))
    assert 0 < none.low <= none.beta <= 0.05
    assert 0.6 < all_of_them.beta <= all_of_them.high < 1
    assert none.low == pytest.approx(0.01)  # one of a hundred


@pytest.mark.parametrize(("n_positive", "wide"), [(20, True), (200, False)])
def test_warning_for_twenty_positives(n_positive: int, wide: bool) -> None:
    notes = resolve_beta("estimate", None, lambda: mixture(0.1, n_positive)).notes
    warned = [note for note in notes if note.startswith("Warning")]
    assert len(warned) == wide
    if wide:
        assert "20 positive and 500 unlabeled" in warned[0]
        assert "0.37 either way" in warned[0]
        assert "Add positives" in warned[0]
        assert "--beta" in warned[0]


def test_warning_for_a_wide_interval() -> None:
    estimate = BetaEstimate("BBE", 0.4, 0.25, 0.5, 500, 2000, "a test")
    assert "0.12 by the less strict bootstrap" in prior._notes((estimate,))[-1]


@pytest.mark.parametrize("counts", [(MIN_IMAGES - 1, 100), (100, MIN_IMAGES - 1), (2, 2)])
def test_too_few_images(counts: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=f"--beta estimate: {counts[0]} .* {counts[1]} .*--beta as a number"):
        resolve_beta("estimate", None, lambda: mixture(0.5, *counts))


def test_copies_do_not_count_as_images() -> None:
    images = mixture(0.5, 5, 100)
    many = ImageEmbeddings("a test", "because", np.repeat(images.positive, 10, axis=0), images.unlabeled)
    with pytest.raises(UsageError, match="5 different positive"):
        resolve_beta("estimate", None, lambda: many)


def test_prior_is_imported_without_scikit_learn() -> None:
    """Which takes half a second that --help and a beta given by hand need not wait for."""
    code = "import sys, sd_unlearn.data.prior; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
