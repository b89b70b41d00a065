"""The certificate: what was asked and measured of each LoRA, on one printed page. It claims no more than that."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sd_unlearn.io.run_folder import RESULTS
from sd_unlearn.report.cases import Case
from sd_unlearn.report.formatting import number, value_text
from sd_unlearn.report.lines import Line, presence
from sd_unlearn.report.metric_cards import MetricCard, cards_of
from sd_unlearn.report.metric_names import PRESENCE, REPORT_ONLY, group_name
from sd_unlearn.report.reproduce import base_record
from sd_unlearn.report.verdict import GONE
from sd_unlearn.results import ATTACK_METRIC, Results

MOST = 12  # lines of the table; the report has all of them
LIMITS = (
    "The values hold for this LoRA file at this strength, on this base, with this sampler. Without the LoRA the base "
    "generates the concept as before.",
    "Only the prompts counted here were tried. Other wordings, input images, or prompts optimized to find the concept "
    "may bring it back.",
    "Detectors make errors; their known errors are listed with them. The intervals cover the random choice of images, "
    "not detector errors.",
)


def certificate(folder: Path, results: Results, cases: Sequence[Case]) -> dict[str, Any]:
    """A page for each LoRA on the concept it was trained to forget, with the hash of results.json."""
    cards = {card.detector: card for card in cards_of(results)}
    targets = [case for case in cases if case.is_target] or list(cases)
    return {
        "results": results,
        "base": base_record(results.base),
        "digest": hashlib.sha256((folder / RESULTS).read_bytes()).hexdigest(),
        "limits": LIMITS,
        "gone": GONE,
        "pages": [_page(case, cards) for case in targets],
    }


def _page(case: Case, cards: Mapping[str, MetricCard]) -> dict[str, Any]:
    main = [line for group in ("direct", "held_out", "generic") if (line := presence(case.lines, group))]
    rest = [line for line in case.lines if line.lora and not any(line is other for other in main)]
    first = (*PRESENCE, ATTACK_METRIC)  # other detectors of the concept, then attacks
    rest.sort(key=lambda line: first.index(line.metric) if line.metric in first else len(first))
    shown = [*main, *(line for line in rest if line.metric not in REPORT_ONLY)][:MOST]
    detectors = dict.fromkeys(line.main.detector for line in shown if line.main.detector)
    return {
        "case": case,
        "lines": shown,
        "left_out": len(main) + len(rest) - len(shown),
        "remaining": remaining(case),
        "detectors": [cards[detector] for detector in detectors],
        "untried": [group_name(group) for group in ("held_out", "alike", "general") if not _measured(case, group)],
    }


def remaining(case: Case) -> list[str]:
    """What remains of the concept, a sentence for each way of asking for it."""
    ways = {"direct": "asked for by name", "held_out": "asked for in wordings that were not used in training"}
    return [_remaining(presence(case.lines, group), way) for group, way in ways.items()]


def _remaining(line: Line | None, way: str) -> str:
    row = line.lora if line else None
    if line is None or row is None or row.value is None:
        return f"Images {way} were not evaluated."
    text = f"Of {row.n:,} images {way}, {value_text(row)} still show it"
    if row.high is not None:
        text += f": at most {number(row.high, row)} at 95 % confidence (upper end of the 95 % interval)"
    return f"{text}; with the base alone, {value_text(line.base)}." if line.base else f"{text}."


def _measured(case: Case, group: str) -> bool:
    groups = {group} if group == "held_out" else {group, "kept"}  # kept covers alike and general
    return any(line.group in groups for line in case.lines)
