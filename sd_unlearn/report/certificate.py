"""The certificate: what was asked and measured of each LoRA, on one printed page. It claims no more than that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sd_unlearn.errors import counted
from sd_unlearn.io.reading import file_sha256
from sd_unlearn.io.run_folder import RESULTS
from sd_unlearn.report.cases import Case
from sd_unlearn.report.formatting import GONE, number, value_text
from sd_unlearn.report.lines import Line, presence
from sd_unlearn.report.metric_cards import MetricCard, cards_of
from sd_unlearn.report.metric_names import PRESENCE, REPORT_ONLY, group_name
from sd_unlearn.report.reproduce import base_record
from sd_unlearn.results import ATTACK_METRIC, Results

MOST = 12  # lines of the table; the report has all of them
ALWAYS = ("retention", "clean_replacement")  # metrics that are never left out
NOT_ATTACKED = (
    "Only the prompts counted here were tried. Other wordings, input images, or prompts optimized to find the concept "
    "may bring it back."
)
ATTACKED = (
    "Only the prompts and attacks counted here were tried. Other wordings, or stronger attacks, with more steps or "
    "another start, may bring more back."
)
HOLDS_FOR = {  # by SubjectEntry.method
    "LoRA": "The values hold for this LoRA file at this strength, on this base, with this sampler. Without the LoRA "
    "the base generates the concept as before.",
    "safe latent diffusion": "The values hold for safe latent diffusion with these settings, on this base, with this "
    "sampler. Without it the base generates the concept as before.",
    "": "The values hold for the given images. How they were generated was not checked.",
}
LIMITS = (
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
        "digest": file_sha256(folder / RESULTS),
        "gone": GONE,
        "pages": [_page(case, cards) for case in targets],
    }


def _page(case: Case, cards: Mapping[str, MetricCard]) -> dict[str, Any]:
    shown, left_out = _chosen(case)
    detectors = dict.fromkeys(line.main.detector for line in shown if line.main.detector)
    return {
        "case": case,
        "lines": shown,
        "left_out": _further(shown, left_out),
        "limits": (HOLDS_FOR[case.subject.method], ATTACKED if case.attacks else NOT_ATTACKED, *LIMITS),
        "remaining": remaining(case),
        "detectors": [cards[detector] for detector in detectors],
        "untried": _untried(case),
    }


def _chosen(case: Case) -> tuple[list[Line], list[Line]]:
    """The lines of the table, and those that only the report has. Of many attacks, the most successful are shown."""
    lines = [line for line in case.lines if line.lora]
    main = [line for group in ("direct", "held_out", "generic") if (line := presence(case.lines, group))]
    always = [line for line in lines if line.metric in ALWAYS]
    others = [line for line in lines if line.metric in PRESENCE and not any(line is one for one in main)]
    attacks = sorted(
        (line for line in lines if line.metric == ATTACK_METRIC), key=lambda line: -(line.main.value or 0.0)
    )
    apart = (*PRESENCE, *ALWAYS, ATTACK_METRIC, *REPORT_ONLY)
    rest = [*others, *attacks, *(line for line in lines if line.metric not in apart)]
    room = max(0, MOST - len(main) - len(always))
    of_concept = min(room, len(others) + len(attacks))
    shown = [*main, *rest[:of_concept], *always, *rest[of_concept:room]]
    return shown, [line for line in lines if not any(line is one for one in shown)]


def _further(shown: Sequence[Line], left_out: Sequence[Line]) -> str:
    """How many attacks and other lines are left out, as a sentence; "" if none is."""
    known = {line.group for line in shown if line.metric == ATTACK_METRIC}
    attacks = {line.group for line in left_out if line.metric == ATTACK_METRIC} - known
    lines = sum(line.metric != ATTACK_METRIC or line.group in known for line in left_out)
    counts = ((len(attacks), "further attack"), (lines, "further line"))
    text = " and ".join(counted(number, what) for number, what in counts if number)
    return text and f"{text} {'is' if len(attacks) + lines == 1 else 'are'} in the report."


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


def _untried(case: Case) -> list[str]:
    """The prompt groups without a line. A line of `kept` is of look-alikes, of anything else, or of both."""
    measured = {line.group for line in case.lines}
    if "kept" in measured and not measured & {"alike", "general"}:
        measured |= {"alike", "general"}
    return [group_name(group) for group in ("held_out", "alike", "general") if group not in measured]
