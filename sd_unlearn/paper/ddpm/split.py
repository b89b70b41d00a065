"""Split a dataset into unlabeled, labeled sensitive and labeled normal images."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sd_unlearn.errors import UsageError
from sd_unlearn.paper.experiments import Counts


@dataclass(frozen=True)
class Split:
    """Disjoint indices into a dataset."""

    normal: NDArray[np.int64]  # [counts.normal], unlabeled
    mixed_in: NDArray[np.int64]  # [counts.mixed_in], sensitive but unlabeled
    positive: NDArray[np.int64]  # [counts.positive], labeled sensitive
    negative: NDArray[np.int64]  # [num_negative], labeled normal; may be empty


def split(
    labels: NDArray[np.int64],
    normal_classes: Collection[int],
    sensitive_classes: Collection[int],
    counts: Counts,
    seed: int,
    missing: Collection[int] = (),
    num_negative: int = 0,
) -> Split:
    """Split at random, without balancing the classes.

    The normal and the sensitive images are each shuffled by the seed and then cut, so that all runs with one seed have
    the same first images of each kind whatever their counts. The mixed-in images are cut from the front of the
    sensitive ones, the labeled images from the back.

    Args:
        labels: The class of each image, [N].
        seed: 0 or more.
        missing: Sensitive classes that are mixed in but never labeled.

    Raises:
        UsageError: too few images for the counts, `missing` contains a normal class or all sensitive ones, or
            num_negative is negative.
    """
    _check_options(sensitive_classes, missing, num_negative)
    normal = _shuffled(labels, normal_classes, (seed, 0))
    sensitive = _shuffled(labels, sensitive_classes, (seed, 1))
    parts = {"unlabeled": counts.normal, "by --num_negative": num_negative}
    _check_pool("normal", parts, len(normal))
    _check_pool("sensitive", {"unlabeled": counts.mixed_in, "labeled": counts.positive}, len(sensitive))
    rest = sensitive[counts.mixed_in :][::-1]
    labeled = rest[~np.isin(labels[rest], list(missing))]
    if len(labeled) < counts.positive:
        raise UsageError(
            f"--missing leaves {len(labeled):,} sensitive images to be labeled, but the experiment needs "
            f"{counts.positive:,}. List fewer classes."
        )
    return Split(
        normal=normal[: counts.normal],
        mixed_in=sensitive[: counts.mixed_in],
        positive=labeled[: counts.positive],
        negative=normal[counts.normal : counts.normal + num_negative],
    )


def with_contamination(counts: Counts, share: float) -> Counts:
    """The counts with as many mixed-in images as make `share` of the unlabeled ones, rounded.

    Raises:
        UsageError: a share outside [0, 1), or a positive one below half an image.
    """
    if not 0 <= share < 1:
        raise UsageError(f"--contamination {share} must lie in [0, 1), e.g. 0.2.")
    mixed_in = round(counts.normal * share / (1 - share))
    if mixed_in < 1 and share:
        raise UsageError(f"--contamination {share} is less than one of {counts.normal:,} images. Use a larger share.")
    return replace(counts, mixed_in=mixed_in)


def _check_options(sensitive_classes: Collection[int], missing: Collection[int], num_negative: int) -> None:
    if num_negative < 0:
        raise UsageError(f"--num_negative {num_negative} must be 0 or more.")
    unknown = sorted(set(missing) - set(sensitive_classes))
    if unknown:
        raise UsageError(f"--missing {unknown[0]} is not one of the sensitive classes {sorted(sensitive_classes)}.")
    if set(missing) == set(sensitive_classes):
        raise UsageError("--missing lists all sensitive classes; at least one must be labeled. List fewer.")


def _shuffled(labels: NDArray[np.int64], classes: Collection[int], seed: tuple[int, int]) -> NDArray[np.int64]:
    """The indices of all images of the classes, in an order that depends only on them and the seed."""
    return np.random.default_rng(seed).permutation(np.flatnonzero(np.isin(labels, list(classes))))


def _check_pool(kind: str, parts: dict[str, int], available: int) -> None:
    needed = sum(parts.values())
    if needed > available:
        listed = " + ".join(f"{count:,} {what}" for what, count in parts.items() if count)
        raise UsageError(
            f"The experiment needs {needed:,} images of its {kind} classes ({listed}), but there are {available:,}. "
            "Use fewer (--num_negative, --contamination) or a larger dataset (--data_root)."
        )
