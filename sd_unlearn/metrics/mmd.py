"""Maximum mean discrepancy between two sets of features: KID and CMMD, unbiased, with an interval.

The estimator is Gretton et al. 2012, eq. 3: the mean kernel within each set, over pairs of different members, minus
twice the mean kernel between the sets. It may be negative for similar sets. For paired sets (two images of the same
prompt and seed) the mean between the sets also leaves out the kernel of the two images of a pair (eq. 4): they are not
independent, and the distance of a set to itself is exactly zero.

The interval is the estimate plus and minus 1.96 standard deviations of the same estimate on random halves of the sets
(half-sampling, the delete-half jackknife; Shao & Wu 1989). A bootstrap would count an image that it picks twice as a
pair of different images. For two sets of one distribution the interval is about 1.7 times wider than necessary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sd_unlearn.errors import UsageError
from sd_unlearn.metrics.statistics import Z

FEWEST = 10  # images in a set; the halves of smaller sets are too small
HALVES = 400
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
_ROWS = 512  # of a kernel matrix held in memory at once: 10,000 images need 40 MB

Kernel = Callable[[NDArray, NDArray], NDArray]


@dataclass(frozen=True)
class Distance:
    """A distance between two sets and its 95 % interval; nan bounds: no interval."""

    value: float
    low: float
    high: float


def kid(a: NDArray, b: NDArray, paired: bool = False) -> Distance:
    """Kernel distance of features [N, D] and [M, D] with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, section 4).

    Papers report the mean over some random subsets; this is its limit for many subsets: the estimate on the whole sets.
    Not scaled: papers often report 1,000 times it.

    Raises:
        UsageError: fewer than 10 images in a set, or paired sets of different sizes.
    """
    return mmd2(a, b, lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3, paired)


def cmmd(a: NDArray, b: NDArray, paired: bool = False) -> Distance:
    """CMMD of CLIP embeddings [N, D] and [M, D] (Jayasumana et al. 2024, section 4): 1,000 times the squared MMD.

    Embeddings are normalized; the kernel is exp(-|x - y|^2 / (2 * 10^2)). This is the paper's unbiased equation; its
    released code includes the kernel of each image with itself, which adds at most 1000 (1/N + 1/M).

    Raises:
        UsageError: as `kid`.
    """
    distance = mmd2(_normalize(a), _normalize(b), gaussian(CMMD_SIGMA), paired)
    return Distance(*(CMMD_SCALE * value for value in (distance.value, distance.low, distance.high)))


def gaussian(sigma: float) -> Kernel:
    """The kernel exp(-|x - y|^2 / (2 sigma^2))."""

    def kernel(x: NDArray, y: NDArray) -> NDArray:
        squared = (x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * x @ y.T
        return np.exp(-squared.clip(min=0) / (2 * sigma**2))

    return kernel


def mmd2(a: NDArray, b: NDArray, kernel: Kernel, paired: bool = False) -> Distance:
    """Squared maximum mean discrepancy of [N, D] and [M, D]; independent of the order of the rows (or pairs).

    Raises:
        UsageError: fewer than 10 rows in a set, or paired sets of different sizes.
    """
    if min(len(a), len(b)) < FEWEST:
        raise UsageError(f"The distance between sets of {len(a)} and {len(b)} images needs at least {FEWEST} in each.")
    if paired and len(a) != len(b):
        raise UsageError(f"Sets of {len(a)} and {len(b)} images are not pairs; compare them unpaired.")
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    # Halves are drawn from rows sorted by a random projection, so that they do not depend on the order of the files.
    projection = np.random.default_rng(0).normal(size=a.shape[1])
    rng = np.random.default_rng(1)
    if paired:
        order = np.argsort((a + b) @ projection, kind="stable")
        a, b = a[order], b[order]
        in_a = in_b = _whole_and_halves(len(a), rng)
    else:
        a, b = a[np.argsort(a @ projection, kind="stable")], b[np.argsort(b @ projection, kind="stable")]
        in_a, in_b = _whole_and_halves(len(a), rng), _whole_and_halves(len(b), rng)
    estimates = (
        _mean_kernel(kernel, a, a, in_a, in_a, skip_diagonal=True)
        + _mean_kernel(kernel, b, b, in_b, in_b, skip_diagonal=True)
        - 2 * _mean_kernel(kernel, a, b, in_a, in_b, skip_diagonal=paired)
    )
    value, half = float(estimates[0]), Z * float(estimates[1:].std())
    return Distance(value, value - half, value + half)


def _whole_and_halves(n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """[1 + HALVES, n] membership masks of 0 and 1: the whole set, then random halves."""
    ranks = rng.random((HALVES, n)).argsort(1).argsort(1)
    return np.concatenate([np.ones((1, n)), ranks < n // 2])


def _mean_kernel(
    kernel: Kernel, a: NDArray, b: NDArray, in_a: NDArray, in_b: NDArray, skip_diagonal: bool
) -> NDArray[np.float64]:
    """[1 + HALVES] mean kernel between the members of each mask; `skip_diagonal`: without a[i] against b[i]."""
    total = np.zeros(len(in_a))
    for start in range(0, len(a), _ROWS):
        block = kernel(a[start : start + _ROWS], b)
        if skip_diagonal:
            rows = np.arange(len(block))
            block[rows, start + rows] = 0
        total += ((in_a[:, start : start + _ROWS] @ block) * in_b).sum(1)
    sizes = in_a.sum(1)
    return total / (sizes * (sizes - 1) if skip_diagonal else sizes * in_b.sum(1))


def _normalize(rows: NDArray) -> NDArray:
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)
