"""How far two sets of features are apart by maximum mean discrepancy: KID and CMMD, unbiased, with an interval.

The estimate is Gretton et al. 2012, eq. 3: the mean kernel inside either set, over pairs of different members, less
twice the mean kernel between the sets. It may fall below zero when the sets are alike. In paired sets (two pictures of
one prompt and seed) the kernel between the two of a pair is left out of the last mean as well (their eq. 4): the two
are not drawn independently, and a set is at distance exactly zero from itself.

The interval is the estimate plus and minus 1.96 standard deviations of the same estimate on random halves of the sets
(half-sampling: the jackknife that leaves out half, Shao & Wu 1989). A bootstrap would count a picture drawn twice as
a pair of different ones. Where the sets come from one distribution it is wider than it need be, by about 1.7.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sd_unlearn.errors import UsageError
from sd_unlearn.metrics.statistics import Z

FEWEST = 10  # pictures; with fewer the halves say nothing
HALVES = 400
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
_ROWS = 512  # of a kernel matrix held at once: 10,000 pictures take 40 MB

Kernel = Callable[[NDArray, NDArray], NDArray]


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def kid(a: NDArray, b: NDArray, paired: bool = False) -> Estimate:
    """Kernel distance of features [N, D] and [M, D] with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, section 4).

    In print it is the mean over some random subsets; this is what that mean tends to with their number: the estimate
    on the whole sets. Not scaled: papers often print 1,000 times it.

    Raises:
        UsageError: fewer than 10 pictures in a set, or pairs asked of sets of different sizes.
    """
    return mmd2(a, b, lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3, paired)


def cmmd(a: NDArray, b: NDArray, paired: bool = False) -> Estimate:
    """CMMD of CLIP embeddings [N, D] and [M, D] (Jayasumana et al. 2024, section 4): 1,000 times the squared MMD.

    Embeddings are scaled to length 1; the kernel is exp(-|x - y|^2 / (2 * 10^2)). This is the paper's unbiased
    equation; its released code keeps each picture's kernel with itself, which adds at most 1000 (1/N + 1/M).

    Raises:
        UsageError: as of kid.
    """
    found = mmd2(_unit(a), _unit(b), gaussian(CMMD_SIGMA), paired)
    return Estimate(*(CMMD_SCALE * value for value in (found.value, found.low, found.high)))


def gaussian(sigma: float) -> Kernel:
    """The kernel exp(-|x - y|^2 / (2 sigma^2))."""

    def kernel(x: NDArray, y: NDArray) -> NDArray:
        squared = (x * x).sum(1)[:, None] + (y * y).sum(1) - 2 * x @ y.T
        return np.exp(-squared.clip(min=0) / (2 * sigma**2))

    return kernel


def mmd2(a: NDArray, b: NDArray, kernel: Kernel, paired: bool = False) -> Estimate:
    """Squared maximum mean discrepancy of [N, D] and [M, D]; the same whatever order the rows (or pairs) are in.

    Raises:
        UsageError: fewer than 10 rows in a set, or pairs asked of sets of different sizes.
    """
    if min(len(a), len(b)) < FEWEST:
        raise UsageError(f"A distance of sets of {len(a)} and {len(b)} pictures says nothing; give {FEWEST} or more.")
    if paired and len(a) != len(b):
        raise UsageError(f"Sets of {len(a)} and {len(b)} pictures are not pairs; compare them unpaired.")
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    # The halves are drawn by place in the order of a random projection: by content, not by place in the folder.
    along = np.random.default_rng(0).normal(size=a.shape[1])
    rng = np.random.default_rng(1)
    if paired:
        order = np.argsort((a + b) @ along, kind="stable")
        a, b = a[order], b[order]
        in_a = in_b = _whole_and_halves(len(a), rng)
    else:
        a, b = a[np.argsort(a @ along, kind="stable")], b[np.argsort(b @ along, kind="stable")]
        in_a, in_b = _whole_and_halves(len(a), rng), _whole_and_halves(len(b), rng)
    found = (
        _mean_kernel(kernel, a, a, in_a, in_a, apart=True)
        + _mean_kernel(kernel, b, b, in_b, in_b, apart=True)
        - 2 * _mean_kernel(kernel, a, b, in_a, in_b, apart=paired)
    )
    value, half = float(found[0]), Z * float(found[1:].std())
    return Estimate(value, value - half, value + half)


def _whole_and_halves(n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """[1 + HALVES, n] 1 for who is in: everyone, then random halves."""
    ranks = rng.random((HALVES, n)).argsort(1).argsort(1)
    return np.concatenate([np.ones((1, n)), ranks < n // 2])


def _mean_kernel(kernel: Kernel, a: NDArray, b: NDArray, in_a: NDArray, in_b: NDArray, apart: bool) -> NDArray:
    """[1 + HALVES] mean kernel between the members; `apart`: of different places only."""
    total = np.zeros(len(in_a))
    for start in range(0, len(a), _ROWS):
        block = kernel(a[start : start + _ROWS], b)
        if apart:
            rows = np.arange(len(block))
            block[rows, start + rows] = 0
        total += ((in_a[:, start : start + _ROWS] @ block) * in_b).sum(1)
    sizes = in_a.sum(1)
    return total / (sizes * (sizes - 1) if apart else sizes * in_b.sum(1))


def _unit(rows: NDArray) -> NDArray:
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)
