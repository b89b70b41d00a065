"""Which images of a dataset are unlabeled, labeled sensitive, and known to be normal."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sd_unlearn.errors import UsageError
from sd_unlearn.paper.experiments import Counts


@dataclass(frozen=True)
class Split:
    """Indices into a dataset; no image is in two of them."""

    normal: NDArray[np.int64]  # [counts.normal], unlabeled
    mixed_in: NDArray[np.int64]  # [counts.mixed_in], sensitive, but unlabeled
    positive: NDArray[np.int64]  # [counts.positive], labeled sensitive
    negative: NDArray[np.int64]  # [num_negative], known to be normal; may be empty


def split(
    labels: NDArray[np.int64],
    normal_classes: Collection[int],
    sensitive_classes: Collection[int],
    counts: Counts,
    seed: int,
    missing: Collection[int] = (),
    num_negative: int = 0,
) -> Split:
    """Draw a split at random, whatever the classes' shares.

    Each pool is shuffled once by the seed alone and cut: with one seed, the first 100 normal images are the same in
    every arm of a comparison, and so are the first mixed-in and the first labeled ones. The mixed-in images are cut
    from the front of the sensitive pool and the labeled ones from its back.

    Args:
        labels: [N], the class of each image.
        seed: 0 or more.
        missing: sensitive classes that are never labeled, but mixed in as the others are.

    Raises:
        UsageError: too few images for the counts, missing classes that are not sensitive or are all there are, a
            negative num_negative.
    """
    _check_options(sensitive_classes, missing, num_negative)
    normal = _shuffled(labels, normal_classes, (seed, 0))
    sensitive = _shuffled(labels, sensitive_classes, (seed, 1))
    parts = {"unlabeled": counts.normal, "by --num_negative": num_negative}
    _check_pool("normal", parts, len(normal))
    _check_pool("sensitive", {"unlabeled": counts.mixed_in, "labeled": counts.positive}, len(sensitive))
    behind = sensitive[counts.mixed_in :][::-1]
    labeled = behind[~np.isin(labels[behind], list(missing))]
    if len(labeled) < counts.positive:
        raise UsageError(
            f"--missing leaves {len(labeled):,} sensitive images to be labeled, but the experiment needs "
            f"{counts.positive:,}. Leave out fewer classes."
        )
    return Split(
        normal=normal[: counts.normal],
        mixed_in=sensitive[: counts.mixed_in],
        positive=labeled[: counts.positive],
        negative=normal[counts.normal : counts.normal + num_negative],
    )


def with_contamination(counts: Counts, share: float) -> Counts:
    """The same counts, but as many images mixed in as make `share` of the unlabeled ones, rounded.

    Raises:
        UsageError: a share outside [0, 1), or one of less than half an image that is not 0.
    """
    if not 0 <= share < 1:
        raise UsageError(f"--contamination {share} must lie between 0 and 1: it is a share, e.g. 0.2.")
    mixed_in = round(counts.normal * share / (1 - share))
    if mixed_in < 1 and share:
        raise UsageError(f"--contamination {share} mixes no image into {counts.normal:,}. Ask for a larger share.")
    return replace(counts, mixed_in=mixed_in)


def _check_options(sensitive_classes: Collection[int], missing: Collection[int], num_negative: int) -> None:
    if num_negative < 0:
        raise UsageError(f"--num_negative {num_negative} must be 0 or more.")
    strange = sorted(set(missing) - set(sensitive_classes))
    if strange:
        raise UsageError(f"--missing {strange[0]} is none of the sensitive classes {sorted(sensitive_classes)}.")
    if set(missing) == set(sensitive_classes):
        raise UsageError("--missing names all sensitive classes; at least one must be labeled. Leave out fewer.")


def _shuffled(labels: NDArray[np.int64], classes: Collection[int], seed: tuple[int, int]) -> NDArray[np.int64]:
    """The indices of all images of the classes, in an order that only they and the seed decide."""
    return np.random.default_rng(seed).permutation(np.flatnonzero(np.isin(labels, list(classes))))


def _check_pool(kind: str, parts: dict[str, int], there: int) -> None:
    needed = sum(parts.values())
    if needed > there:
        told = " + ".join(f"{count:,} {what}" for what, count in parts.items() if count)
        raise UsageError(
            f"The experiment needs {needed:,} images of its {kind} classes ({told}), but there are {there:,}. "
            "Ask for fewer (--num_negative, --contamination), or give more images (--data_root)."
        )
