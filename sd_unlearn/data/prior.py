"""beta, the share of the concept among the unlabeled images: given by hand, known from the manifest, estimated from
the images, or assumed.

With p_U = beta p_S + (1 - beta) p_N, the share of unlabeled images above a high score is beta times that of positives,
as far as no normal image is up there. The scores are those of a classifier of positive against unlabeled images, each
image scored by models that never saw it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sd_unlearn.errors import UsageError
from sd_unlearn.io.files import read_json
from sd_unlearn.io.run_folder import DATA_MANIFEST

ASSUMED_BETA = 0.1
FEWEST = 10  # different images of each kind: with fewer positives the bound on the error passes 0.43
WIDE_BOUND, WIDE_INTERVAL = 0.25, 0.1  # from where the user is warned; half widths
FOLDS, REPEATS, RESAMPLES = 5, 4, 1000
COMPONENTS, PENALTY = 64, 0.03  # measured on digits: docs/tuning.md
DELTA, GAMMA = 0.1, 0.01  # BBE's constants as in its paper's experiments

Scores = NDArray[np.float64]
Asked = float | Literal["estimate"] | None


@dataclass(frozen=True)
class Embedded:
    """Embeddings of the positive images [n_p, D] and of the unlabeled ones [n_u, D] without the keep images."""

    name: str
    why: str  # why these embeddings, a sentence for the user
    positive: NDArray[Any]
    unlabeled: NDArray[Any]


@dataclass(frozen=True)
class Estimate:
    """One method's beta and its 95 % bootstrap interval, all in (0, 1), and what they are from."""

    method: str
    beta: float
    low: float
    high: float
    n_positive: int
    n_unlabeled: int
    embedding: str


@dataclass(frozen=True)
class Prior:
    """beta in (0, 1), where it is from (option | manifest | estimated | assumed), the estimates (the used one first)
    and what the user should be told of them, a line each."""

    beta: float
    source: str
    estimates: tuple[Estimate, ...] = ()
    notes: tuple[str, ...] = ()


def resolve_beta(asked: Asked, data_dir: Path, embedded: Callable[[], Embedded] | None = None) -> Prior:
    """beta as asked, else the manifest's, else assumed. `embedded` makes the embeddings, if an estimate is asked for.

    Raises:
        UsageError: too few images for an estimate.
    """
    if asked == "estimate":
        if embedded is None:
            raise ValueError("an estimate needs embeddings")
        found = embedded()
        estimates = estimate_beta(found)
        return Prior(estimates[0].beta, "estimated", estimates, (found.why, *_told(estimates)))
    if asked is not None:
        return Prior(asked, "option")
    manifest = data_dir / DATA_MANIFEST
    known = read_json(manifest).get("beta") if manifest.is_file() else None
    return Prior(float(known), "manifest") if known else Prior(ASSUMED_BETA, "assumed")


def check_countable(n_positive: int, n_unlabeled: int) -> None:
    """Refuse an estimate from so few images that it would say nothing.

    Raises:
        UsageError: fewer than FEWEST of either kind.
    """
    if min(n_positive, n_unlabeled) < FEWEST:
        raise UsageError(
            f"--beta estimate: {n_positive} different positive and {n_unlabeled} different unlabeled images (without "
            f"keep images) are too few to count by; {FEWEST} of each are needed, 100 are better. Add images or give "
            "--beta as a number, e.g. 0.2."
        )


def estimate_beta(embedded: Embedded) -> tuple[Estimate, Estimate]:
    """beta by BBE, which is the one to use, and by Elkan-Noto.

    The intervals are percentiles over RESAMPLES resamples of the scores, positives and unlabeled images apart. They
    cover the chance in which images were at hand. They do not cover the chance in the classifier's training, nor the
    bias of normal images that no classifier tells from the concept (beta comes out high), nor positives that are
    unlike the concept's pictures among the unlabeled images, which both methods assume away (low). Estimates
    are kept between 1 / n_u and 1 - 1 / n_u: n_u images cannot tell a smaller share from none.

    Raises:
        UsageError: too few images.
    """
    rows = np.concatenate([embedded.positive, embedded.unlabeled])
    n_p, n_u = len(embedded.positive), len(embedded.unlabeled)
    labels = np.arange(n_p + n_u) < n_p
    scores = cross_fitted_scores(rows, labels)
    return tuple(  # type: ignore[return-value]
        Estimate(method, *_with_interval(estimator, scores[labels], scores[~labels]), n_p, n_u, embedded.name)
        for method, estimator in (("BBE", best_bin), ("Elkan-Noto", elkan_noto))
    )


def best_bin(positive: Scores, unlabeled: Scores) -> float:
    """Best Bin Estimation (Garg, Wu, Smola, Balakrishnan and Lipton 2021, arXiv 2111.00980, algorithm 1).

    q(c) is the share of scores >= c. The estimate is q_u(c) / q_p(c) at the c whose upper confidence bound
    q_u(c) / q_p(c) + error_bound / q_p(c) is least: high enough to be pure, low enough to count many. Scores [n_p] and
    [n_u] in any units, higher for positives; the result, from 0 up, may pass 1.
    """
    thresholds = np.unique(positive)  # between two of them a higher c only loses unlabeled images, which is better
    q_p, q_u = (1 - np.searchsorted(np.sort(s), thresholds) / len(s) for s in (positive, unlabeled))
    best = np.argmin((q_u + error_bound(len(positive), len(unlabeled))) / q_p)
    return float(q_u[best] / q_p[best])


def error_bound(n_positive: int, n_unlabeled: int) -> float:
    """(1 + gamma) (sqrt(log(4 / delta) / 2 n_u) + sqrt(log(4 / delta) / 2 n_p)): what BBE's ratio may be off by, with
    probability 1 - delta, where every positive is above the threshold and no normal image (same paper, theorem 1)."""
    return (1 + GAMMA) * sum(math.sqrt(math.log(4 / DELTA) / (2 * n)) for n in (n_unlabeled, n_positive))


def elkan_noto(positive: Scores, unlabeled: Scores) -> float:
    """Elkan and Noto (KDD 2008), with their estimator e1: c = p(labeled | positive) is the mean of p(labeled | image)
    over positives.

    Here labeled and unlabeled images are two samples, so c = n_p / (n_p + beta n_u), which is solved for beta. The
    probabilities are the scores [n_p] and [n_u], in any units, calibrated by isotonic regression (Zadrozny and Elkan
    2002): a regularised classifier's own are too timid, which makes beta too large. The result, from 0 up, may pass 1.
    """
    from scipy.optimize import isotonic_regression

    n_p, n_u = len(positive), len(unlabeled)
    levels, level = np.unique(np.concatenate([positive, unlabeled]), return_inverse=True)
    images, labeled = (np.bincount(which, minlength=len(levels)) for which in (level, level[:n_p]))
    calibrated = isotonic_regression(labeled / images, weights=images).x
    c = float(np.mean(calibrated[level[:n_p]]))
    return n_p * (1 - c) / (c * n_u)


def cross_fitted_scores(rows: NDArray[Any], labels: NDArray[np.bool_], make: Callable[[], Any] | None = None) -> Scores:
    """Probability [n] that each row [n, D] is labeled, by classifiers trained without it or any copy of it.

    Mean over REPEATS partitions into FOLDS. The order of the rows does not matter. `make` builds a scikit-learn
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
            classifier = make() if make else LogisticRegression(C=PENALTY, max_iter=1000)
            classifier.fit(points[fitted], truth[fitted])
            total[order[held_out]] += classifier.predict_proba(points[held_out])[:, 1]
    return np.clip(total / REPEATS, 1e-6, 1 - 1e-6)


def copies_of(rows: NDArray[Any]) -> NDArray[np.intp]:
    """A number [n] for each row [n, D] that its copies share, also where encoding in another batch moved a last digit.

    Rows are compared along one random direction, in which different images are practically never so near; where two
    are, they only share a fold.
    """
    along = rows.astype(np.float64) @ np.random.default_rng(0).normal(size=rows.shape[1])
    order = np.argsort(along)
    numbers = np.empty(len(rows), dtype=np.intp)
    numbers[order] = np.cumsum(np.diff(along[order], prepend=along.min()) > 1e-5 * along.std())
    return numbers


def components(rows: NDArray[Any]) -> NDArray[Any]:
    """The first COMPONENTS principal components [n, <= COMPONENTS] of standardised rows [n, D]; they see no label."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    return PCA(min(COMPONENTS, *rows.shape), random_state=0).fit_transform(StandardScaler().fit_transform(rows))


def _with_interval(
    estimator: Callable[[Scores, Scores], float], positive: Scores, unlabeled: Scores
) -> tuple[float, float, float]:
    """(estimate, low, high): the 2.5 and 97.5 % percentiles over resampled scores, kept inside (0, 1)."""
    rng, n_p, n_u = np.random.default_rng(0), len(positive), len(unlabeled)
    resampled = [
        estimator(positive[rng.integers(0, n_p, n_p)], unlabeled[rng.integers(0, n_u, n_u)]) for _ in range(RESAMPLES)
    ]
    found = estimator(positive, unlabeled)
    low, high = np.percentile(resampled, [2.5, 97.5])
    beta, low, high = np.clip([found, min(low, found), max(high, found)], 1 / n_u, 1 - 1 / n_u).tolist()
    return beta, low, high


def _told(estimates: tuple[Estimate, ...]) -> list[str]:
    """A line an estimate, and a warning where the first, which is used, is uncertain."""
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
            f"unlabeled images it may be off by {bound:.2f} either way ({half:.2f} by the bootstrap, which is kinder). "
            "More positives make it surer; so does --beta with a share you counted yourself."
        )
    return lines
