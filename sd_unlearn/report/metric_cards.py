"""Metric cards: what one must know to cite a figure, for every detector that has one in the file."""

from __future__ import annotations

from typing import Any

from sd_unlearn.report.formatting import METRICS


def cards_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Each detector's card with its anchor, the figures it made and their n; one that has no card is named bare."""
    used = dict.fromkeys(d for row in results["rows"] if (d := row.get("detector")))
    known = {card["detector"]: card for card in results["cards"]}
    made = []
    for number, detector in enumerate(dict.fromkeys([*known, *used]), 1):
        card = known.get(detector, {})
        rows = [row for row in results["rows"] if row.get("detector") == detector]
        metrics = dict.fromkeys([*_texts(card.get("metrics")), *(row["metric"] for row in rows)])
        extra = card.get("extra")
        facts = [
            ("Figures", ", ".join(METRICS[m][0] if m in METRICS else m for m in metrics)),
            ("Pictures judged", _counts([row["n"] for row in rows])),
            ("Version", card.get("version")),
            ("Weights", card.get("weights")),
            ("Threshold", card.get("threshold")),
            *(extra.items() if isinstance(extra, dict) else ()),
            ("Limits", card.get("limits")),
        ]
        about = card.get("about") or ("" if card else "results.json has no card of this detector.")
        made.append(
            {
                "id": f"card-{number}",
                "detector": detector,
                "about": about,
                "facts": [(str(label), str(text)) for label, text in facts if text],
            }
        )
    return made


def anchors(cards: list[dict[str, Any]]) -> dict[str, str]:
    """detector -> the id of its card."""
    return {card["detector"]: card["id"] for card in cards}


def _counts(n: list[int]) -> str:
    if not n:
        return ""
    return f"n = {min(n):,}" if min(n) == max(n) else f"n = {min(n):,} to {max(n):,} for each figure"


def _texts(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list | tuple) else []
