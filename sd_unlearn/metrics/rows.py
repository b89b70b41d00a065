"""Readings with and without the LoRA -> the rows of results.json, as ../docs/results.md defines them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd_unlearn.concept import Concept
from sd_unlearn.metrics.drift import feature_drift
from sd_unlearn.metrics.fidelity import frechet_distance
from sd_unlearn.metrics.judge import Reading
from sd_unlearn.metrics.statistics import bootstrap, ratio_of_means, wilson
from sd_unlearn.records import Row

ASKED = ("direct", "held_out", "generic")  # the groups in which the concept shows up unless it is forgotten
KEPT = ("alike", "general")
CLEAN = 0.9  # probability from which an image counts as a good image of something


def measure(
    concept: Concept, detector: str, groups: NDArray, expected: Sequence[tuple[str, ...]], base: Reading, lora: Reading
) -> list[Row]:
    """Every figure of an evaluation. groups [N] and expected [N] belong to the images that both readings judged."""
    label = concept.label or concept.name
    rows = _leakage(label, detector, groups, base, lora)
    if (groups == "direct").any() and (groups == "generic").any() and concept.kind in ("digit", "ink"):
        rows.append(_clean_replacement(label, detector, groups, base, lora))
    rows += _kept(detector, groups, expected, base, lora)
    kept = np.isin(groups, KEPT)
    if kept.any():
        moved = feature_drift(base.features[kept], lora.features[kept])
        low, high = bootstrap(np.mean, moved)
        note = "1 - cosine of the detector's features, same prompt and seed"
        rows.append(
            Row("drift", "kept", "lora", float(moved.mean()), len(moved), low, high, detector, "bootstrap", note)
        )
    if concept.kind in ("digit", "ink"):
        rows += _fid_digits(label, detector, groups, base, lora)
    return [_without_nan(row) for row in rows]


def _without_nan(row: Row) -> Row:
    """A ratio over zero is unknown: null in JSON, which knows no NaN."""
    unknown: dict[str, Any] = {
        k: None for k in ("value", "low", "high") if getattr(row, k) is not None and math.isnan(getattr(row, k))
    }
    return dataclasses.replace(row, **unknown) if unknown else row


def _leakage(label: str, detector: str, groups: NDArray, base: Reading, lora: Reading) -> list[Row]:
    rows = []
    for group in ASKED:
        here = groups == group
        for subject, reading in (("base", base), ("lora", lora)):
            if here.any():
                rows.append(_rate("leakage", group, subject, reading.shows(label)[here], detector, f"read as {label}"))
    return rows


def _rate(metric: str, group: str, subject: str, hits: NDArray, detector: str, note: str) -> Row:
    low, high = wilson(int(hits.sum()), len(hits))
    return Row(metric, group, subject, float(hits.mean()), len(hits), low, high, detector, "wilson", note)


def _clean_replacement(label: str, detector: str, groups: NDArray, base: Reading, lora: Reading) -> Row:
    good = lora.confident(label, CLEAN, other_than=True)[groups == "direct"].astype(float)
    usual = base.confident(label, CLEAN, other_than=False)[groups == "generic"].astype(float)
    low, high = bootstrap(ratio_of_means, good, usual, paired=False)
    note = f"read as something else on its axis with p >= {CLEAN}, over the base's generic images read as anything so"
    return Row(
        "clean_replacement",
        "direct",
        "lora",
        ratio_of_means(good, usual),
        len(good),
        low,
        high,
        detector,
        "bootstrap",
        note,
    )


def _kept(
    detector: str, groups: NDArray, expected: Sequence[tuple[str, ...]], base: Reading, lora: Reading
) -> list[Row]:
    rows = []
    for name, members in (("alike", ("alike",)), ("general", ("general",)), ("kept", KEPT)):
        index = [
            i for i, g in enumerate(groups) if g in members and expected[i] and all(base.knows(w) for w in expected[i])
        ]
        if not index:
            continue
        right = {s: _as_expected(r, expected, index) for s, r in (("base", base), ("lora", lora))}
        for subject, hits in right.items():
            rows.append(_rate("accuracy", name, subject, hits, detector, "read as asked"))
        pair = (right["lora"].astype(float), right["base"].astype(float))
        low, high = bootstrap(ratio_of_means, *pair)
        note = "accuracy with the LoRA over accuracy without, same seeds"
        rows.append(
            Row(
                "retention",
                name,
                "lora",
                ratio_of_means(*pair),
                len(index),
                low,
                high,
                detector,
                "paired-bootstrap",
                note,
            )
        )
    return rows


def _as_expected(reading: Reading, expected: Sequence[tuple[str, ...]], index: list[int]) -> NDArray[np.bool_]:
    words = {word for i in index for word in expected[i]}
    shown = {word: reading.shows(word) for word in words}
    return np.array([all(shown[word][i] for word in expected[i]) for i in index])


def _fid_digits(label: str, detector: str, groups: NDArray, base: Reading, lora: Reading) -> list[Row]:
    """Images of what is most alike (the other digits or inks) against held-apart real ones without the concept."""
    from sd_unlearn.metrics.digits import DIGITS, INKS, held_apart

    features, digits, inks = held_apart()
    real = features[digits != DIGITS.index(label)] if label in DIGITS else features[inks != INKS.index(label)]
    here, rows = groups == "alike", []
    for subject, reading in (("base", base), ("lora", lora)):
        drawn = reading.features[here]
        if len(drawn) > drawn.shape[1]:
            value = frechet_distance(drawn, real)
            # A resample is further from the truth than the sample: the basic interval turns that bias back.
            low, high = bootstrap(lambda x: frechet_distance(x, real), drawn, resamples=200)
            low, high = max(0.0, 2 * value - high), max(0.0, 2 * value - low)
            note = "Frechet distance of the detector's features of the alike images to real held-apart digits"
            rows.append(
                Row("fid-digits", "alike", subject, value, len(drawn), low, high, detector, "basic-bootstrap", note)
            )
    return rows
