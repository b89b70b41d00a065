"""beta, the share of the concept among the unlabeled images: an option, known, estimated, or assumed.

With p_U = beta p_S + (1 - beta) p_N, the share of unlabeled images above a high score is beta times the share of
positives above it, if no normal image scores that high. Scores come from classifiers of positive against unlabeled
images; each image is scored by classifiers that were not trained on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sd_unlearn.errors import UsageError

ASSUMED_BETA = 0.1
MIN_IMAGES = 10  # different images of each kind: with fewer positives the error bound exceeds 0.43
WIDE_BOUND, WIDE_INTERVAL = 0.25, 0.1  # half widths above which the user is warned
FOLDS, REPEATS, RESAMPLES = 5, 4, 1000
COMPONENTS, INVERSE_PENALTY = 64, 0.03  # tuned on digits: docs/tuning.md
DELTA, GAMMA = 0.1, 0.01  # BBE's constants in its paper's experiments

Scores = NDArray[np.float64]
BetaOption = float | Literal["estimate"] | None  # --beta


@dataclass(frozen=True)
class ImageEmbeddings:
    """Embeddings of the positive images [n_p, D] and of the unlabeled images without the keep images [n_u, D]."""

    name: str
    why: str  # a sentence for the user: why these embeddings were used
    positive: NDArray[Any]
    unlabeled: NDArray[Any]


@dataclass(frozen=True)
class BetaEstimate:
    """beta by one method, with its 95 % bootstrap interval (all in (0, 1)), and the data it was estimated from."""

    method: str
    beta: float
    low: float
    high: float
    n_positive: int
    n_unlabeled: int
    embedding: str


@dataclass(frozen=True)
class Prior:
    """The beta of a training, in (0, 1), and where it comes from."""

    beta: float
    source: str  # option | known | estimated | assumed; of several concepts each that occurs
    estimates: tuple[BetaEstimate, ...] = ()  # the first is the one used
    notes: tuple[str, ...] = ()  # lines for the user


def resolve_beta(
    option: BetaOption, known: float | None, make_embeddings: Callable[[], ImageEmbeddings] | None = None
) -> Prior:
    """The value of --beta, else the known share, else ASSUMED_BETA.

    known: of generated images, in (0, 1); else None. make_embeddings: called only for `--beta estimate`.

    Raises:
        UsageError: too few images for an estimate.
    """
    if option == "estimate":
        if make_embeddings is None:
            raise ValueError("an estimate needs embeddings")
        embeddings = make_embeddings()
        estimates = estimate_beta(embeddings)
        return Prior(estimates[0].beta, "estimated", estimates, (embeddings.why, *_notes(estimates)))
    if option is not None:
        return Prior(option, "option")
    return Prior(known, "known") if known else Prior(ASSUMED_BETA, "assumed")


def check_countable(n_positive: int, n_unlabeled: int) -> None:
    """Refuse an estimate from too few images.

    Raises:
        UsageError: fewer than MIN_IMAGES of either kind.
    """
    if min(n_positive, n_unlabeled) < MIN_IMAGES:
        raise UsageError(
            f"--beta estimate: {n_positive} different positive and {n_unlabeled} different unlabeled images (without "
            f"keep images) are too few. At least {MIN_IMAGES} of each are needed; 100 work better. Add images, or give "
            "--beta as a number, e.g. 0.2."
        )


def estimate_beta(embeddings: ImageEmbeddings) -> tuple[BetaEstimate, BetaEstimate]:
    """Estimate beta by BBE (first, the one to use) and by Elkan-Noto.

    The intervals are percentiles over RESAMPLES bootstrap resamples of the scores, positives and unlabeled images
    resampled separately. They cover the choice of images, but not the randomness of the classifiers, nor two biases:
    normal images that classifiers confuse with the concept (beta too high), and positives that differ from the
    concept's images among the unlabeled ones, which both methods assume does not happen (too low). Estimates are
    clipped to [1 / n_u, 1 - 1 / n_u], the smallest share that n_u images can show.

    Raises:
        UsageError: too few images.
    """
    rows = np.concatenate([embeddings.positive, embeddings.unlabeled])
    n_p, n_u = len(embeddings.positive), len(embeddings.unlabeled)
    labels = np.arange(n_p + n_u) < n_p
    scores = cross_fitted_scores(rows, labels)
    return tuple(  # type: ignore[return-value]
        BetaEstimate(method, *_with_interval(estimator, scores[labels], scores[~labels]), n_p, n_u, embeddings.name)
        for method, estimator in (("BBE", best_bin), ("Elkan-Noto", elkan_noto))
    )


def best_bin(positive: Scores, unlabeled: Scores) -> float:
    """Best Bin Estimation (Garg, Wu, Smola, Balakrishnan and Lipton 2021, arXiv 2111.00980, algorithm 1).

    q(c) is the share of scores >= c. The estimate is q_u(c) / q_p(c) at the c that minimizes the upper confidence bound
    q_u(c) / q_p(c) + error_bound / q_p(c). Scores [n_p] and [n_u] may have any unit, higher for positives. The result
    is >= 0 and can exceed 1.
    """
    thresholds = np.unique(positive)  # between two of them q_p is constant, and q_u smallest at the upper one
    q_p, q_u = (1 - np.searchsorted(np.sort(s), thresholds) / len(s) for s in (positive, unlabeled))
    best = np.argmin((q_u + error_bound(len(positive), len(unlabeled))) / q_p)
    return float(q_u[best] / q_p[best])


def error_bound(n_positive: int, n_unlabeled: int) -> float:
    """Bound on the error of BBE's ratio with probability 1 - delta (same paper, theorem 1).

    (1 + gamma) (sqrt(log(4 / delta) / 2 n_u) + sqrt(log(4 / delta) / 2 n_p)), if all positives and no normal image
    are above the threshold.
    """
    return (1 + GAMMA) * sum(math.sqrt(math.log(4 / DELTA) / (2 * n)) for n in (n_unlabeled, n_positive))


def elkan_noto(positive: Scores, unlabeled: Scores) -> float:
    """Elkan and Noto (KDD 2008), estimator e1: c = p(labeled | positive) is the positives' mean p(labeled | image).

    Labeled and unlabeled images are two samples here, so c = n_p / (n_p + beta n_u), which is solved for beta. The
    probabilities are the scores [n_p] and [n_u] (any unit), calibrated by isotonic regression (Zadrozny and Elkan
    2002), because a regularized classifier's own are too close to 1/2, which makes beta too large. The result is >= 0
    and can exceed 1.
    """
    from scipy.optimize import isotonic_regression

    n_p, n_u = len(positive), len(unlabeled)
    levels, level = np.unique(np.concatenate([positive, unlabeled]), return_inverse=True)
    images, labeled = (np.bincount(which, minlength=len(levels)) for which in (level, level[:n_p]))
    calibrated = isotonic_regression(labeled / images, weights=images).x
    c = float(np.mean(calibrated[level[:n_p]]))
    return n_p * (1 - c) / (c * n_u)


def cross_fitted_scores(rows: NDArray[Any], labels: NDArray[np.bool_], make: Callable[[], Any] | None = None) -> Scores:
    """Probability [n] that each row [n, D] is labeled, by classifiers trained without that row and its copies.

    Mean over REPEATS partitions into FOLDS; independent of the order of the rows. `make` builds a scikit-learn
    classifier (default: logistic regression).

    Raises:
        UsageError: too few different rows of either kind.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold

    copies = copies_of(rows)
    check_countable(len(set(copies[labels])), len(set(copies[~labels])))
    order = np.lexsort((labels, copies))
    points, truth, groups = components(rows[order]), labels[order], copies[order]
    total = np.zeros(len(rows))
    for repeat in range(REPEATS):
        folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=repeat)
        for fitted, held_out in folds.split(points, truth, groups):
            classifier = make() if make else LogisticRegression(C=INVERSE_PENALTY, max_iter=1000)
            classifier.fit(points[fitted], truth[fitted])
            total[order[held_out]] += classifier.predict_proba(points[held_out])[:, 1]
    return np.clip(total / REPEATS, 1e-6, 1 - 1e-6)


def copies_of(rows: NDArray[Any]) -> NDArray[np.intp]:
    """A number [n] for each row [n, D] that is the same for its copies, up to rounding (encoded in another batch).

    Rows are compared along one random direction, in which different images are practically never this close. If two
    are, they are only put into the same fold.
    """
    along = rows.astype(np.float64) @ np.random.default_rng(0).normal(size=rows.shape[1])
    order = np.argsort(along)
    numbers = np.empty(len(rows), dtype=np.intp)
    numbers[order] = np.cumsum(np.diff(along[order], prepend=along.min()) > 1e-5 * along.std())
    return numbers


def components(rows: NDArray[Any]) -> NDArray[Any]:
    """The first COMPONENTS principal components [n, <= COMPONENTS] of the standardized rows [n, D], without labels."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    return PCA(min(COMPONENTS, *rows.shape), random_state=0).fit_transform(StandardScaler().fit_transform(rows))


def _with_interval(
    estimator: Callable[[Scores, Scores], float], positive: Scores, unlabeled: Scores
) -> tuple[float, float, float]:
    """(estimate, low, high): low and high are the 2.5 and 97.5 % percentiles over resamples, clipped into (0, 1)."""
    rng, n_p, n_u = np.random.default_rng(0), len(positive), len(unlabeled)
    resampled = [
        estimator(positive[rng.integers(0, n_p, n_p)], unlabeled[rng.integers(0, n_u, n_u)]) for _ in range(RESAMPLES)
    ]
    estimate = estimator(positive, unlabeled)
    low, high = np.percentile(resampled, [2.5, 97.5])
    beta, low, high = np.clip([estimate, min(low, estimate), max(high, estimate)], 1 / n_u, 1 - 1 / n_u).tolist()
    return beta, low, high


def _notes(estimates: tuple[BetaEstimate, ...]) -> list[str]:
    """One line per estimate, and a warning if the first (the one used) is uncertain."""
    used = estimates[0]
    lines = [
        f"beta by {e.method}: {e.beta:.3f}, 95 % interval {e.low:.3f} to {e.high:.3f}, from {e.n_positive} positive "
        f"and {e.n_unlabeled} unlabeled images ({e.embedding})."
        for e in estimates
    ]
    bound, half = error_bound(used.n_positive, used.n_unlabeled), (used.high - used.low) / 2
    if bound > WIDE_BOUND or half > WIDE_INTERVAL:
        lines.append(
            f"Warning: beta {used.beta:.3f} is uncertain: with {used.n_positive} positive and {used.n_unlabeled} "
            f"unlabeled images the error may be up to {bound:.2f} either way ({half:.2f} by the less "
            "strict bootstrap). Add positives, or count the share in some images yourself and give it as --beta."
        )
    return lines
