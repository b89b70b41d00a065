"""Metric cards: what a reader must know to cite the metrics of a detector."""

from __future__ import annotations

from dataclasses import dataclass

from sd_unlearn.report.metric_names import metric_name
from sd_unlearn.results import Card, Results


@dataclass(frozen=True)
class MetricCard:
    """A detector as the page describes it."""

    id: str  # anchor on the page
    detector: str
    about: str
    metrics: str
    images: str  # how many it saw
    facts: list[tuple[str, str]]  # label and text


def cards_of(results: Results) -> list[MetricCard]:
    """A card for each detector of the file; a detector that has no card in results.json is only named."""
    known = {card.detector: card for card in results.cards}
    used = (row.detector for row in results.rows if row.detector)
    cards = []
    for number, detector in enumerate(dict.fromkeys([*known, *used]), 1):
        card = known.get(detector, Card(detector, about="results.json has no card of this detector."))
        rows = [row for row in results.rows if row.detector == detector]
        metrics = dict.fromkeys([*card.metrics, *(row.metric for row in rows)])
        facts = [
            ("Version", card.version),
            ("Weights", card.weights),
            ("Threshold", card.threshold),
            *card.extra.items(),
            ("Limits", card.limits),
        ]
        cards.append(
            MetricCard(
                f"card-{number}",
                detector,
                card.about,
                ", ".join(map(metric_name, metrics)),
                _counts([row.n for row in rows]),
                [(label, text) for label, text in facts if text],
            )
        )
    return cards


def _counts(n: list[int]) -> str:
    if not n:
        return ""
    return f"n = {min(n):,}" if min(n) == max(n) else f"n = {min(n):,} to {max(n):,}, depending on the metric"
