"""The certificate: what was asked and what was measured of one LoRA, on one printed page. It claims no more."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd_unlearn.io.run_folder import RESULTS
from sd_unlearn.report.cases import Case
from sd_unlearn.report.formatting import GONE, GROUPS, PRESENCE, Line, asked, number, shown
from sd_unlearn.report.metric_cards import cards_of

MOST = 12  # figures on the page; all of them are in the report
LIMITS = (
    "The figures hold for this LoRA file at this strength on this base with this sampler. Without the LoRA the base "
    "draws the concept as before.",
    "Only the prompts counted here were tried. Other wording, pictures as input, or prompts searched on purpose may "
    "bring the concept back.",
    "The detectors err; what they are known to get wrong is stated with them. The intervals cover the chance of which "
    "pictures were drawn, not the detectors' errors.",
)


def context(folder: Path, results: dict[str, Any], cases: Sequence[Case]) -> dict[str, Any]:
    """A page for each LoRA on the concept it was meant to forget, with the hash of the file the figures are from."""
    digest = hashlib.sha256((folder / RESULTS).read_bytes()).hexdigest()
    cards = {card["detector"]: card for card in cards_of(results)}
    meant = [case for case in cases if case.meant] or list(cases)
    base = {"name": "", "kind": "", "resolution": None, "sha256": "", **results["base"]}
    return {
        "results": results,
        "base": base,
        "digest": digest,
        "limits": LIMITS,
        "gone": GONE,
        "pages": [_page(case, cards) for case in meant],
    }


def _page(case: Case, cards: dict[str, Any]) -> dict[str, Any]:
    groups = [x for g in ("direct", "held_out", "generic") if (x := asked(case.lines, g))]
    rest = [x for x in case.lines if x.lora and not any(x is g for g in groups)]
    rest.sort(key=lambda x: x.metric not in PRESENCE)  # first what other judges of the concept's presence found
    figures = [*groups, *rest][:MOST]
    detectors = dict.fromkeys(x.main.detector for x in figures if x.main.detector)
    return {
        "case": case,
        "figures": figures,
        "left_out": len(groups) + len(rest) - len(figures),
        "residual": residual(case),
        "detectors": [cards[d] for d in detectors],
        "untried": [GROUPS[g][0] for g in ("held_out", "alike", "general") if not _measured(case, g)],
    }


def residual(case: Case) -> list[str]:
    """What is left of the concept, a plain sentence for each way it was asked for."""
    ways = {"direct": "asked for by name", "held_out": "asked for in wordings that training never saw"}
    made = []
    for group, way in ways.items():
        line = asked(case.lines, group)
        if line is None or line.lora is None or line.lora.value is None:
            made.append(f"Pictures {way} were not judged.")
            continue
        made.append(_said(line, way))
    return made


def _said(line: Line, way: str) -> str:
    row = line.lora
    assert row is not None
    text = f"Of {row.n:,} pictures {way}, {shown(row)} still show it"
    if row.high is not None:
        text += f": at most {number(row.high, row)} at 95 % confidence (upper end of the 95 % interval)"
    before = f"; the base alone, {shown(line.base)}" if line.base else ""
    return f"{text}{before}."


def _measured(case: Case, group: str) -> bool:
    groups = {group} if group == "held_out" else {group, "kept"}  # kept is both groups that must stay
    return any(x.group in groups for x in case.lines)
