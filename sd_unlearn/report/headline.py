"""The four big figures of one LoRA on one concept: gone, drawn instead, stayed, cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sd_unlearn.report.formatting import GROUPS, WITHOUT, Line, asked, pick, sentence, shown, span


def answers(results: dict[str, Any], found: Sequence[Line]) -> list[dict[str, Any]]:
    """The four big figures: gone, drawn instead, stayed, cost; each with a plain sentence and side figures."""

    def side(metric: str, *groups: str) -> list[tuple[str, str]]:
        hits = [x for g in groups if (x := pick(found, metric, g))]
        return [(GROUPS[x.group][0], sentence(x.lora, x.base, without)) for x in hits]

    without = results.get("without", WITHOUT)
    gone = asked(found)
    clean = pick(found, "clean_replacement", "direct")
    kept = pick(found, "retention", "kept", "general", "alike")
    return [
        _answer(
            "Is it gone?",
            gone,
            "of the pictures asked for by name still show it",
            side(gone.metric if gone else "leakage", "generic", "held_out"),
            without,
        ),
        _answer(
            "What is drawn instead?",
            clean,
            "as many clean pictures of something else as the base's generic prompt gives",
            [],
            without,
        ),
        _answer(
            "What stayed?",
            kept,
            "of the base's accuracy on " + (GROUPS[kept.group][0] if kept else ""),
            side("retention", *[g for g in ("alike", "general") if not kept or g != kept.group]),
            without,
        ),
        cost_answer(results["cost"]),
    ]


def _answer(
    question: str, line: Line | None, meaning: str, side: list[tuple[str, str]], without: str
) -> dict[str, Any]:
    if line is None or line.lora is None:
        return {"question": question, "big": "–", "text": "not measured", "interval": "", "side": side}
    before = f"{without} {shown(line.base)}; " if line.base else ""
    interval = f"95 % interval {span(line.lora)}; " if span(line.lora) != "–" else "no interval; "
    return {
        "question": question,
        "big": shown(line.lora),
        "text": meaning,
        "interval": f"{interval}{before}n = {line.n}",
        "side": side,
    }


def cost_answer(cost: dict[str, Any]) -> dict[str, Any]:
    """Training cost in the units a person uses; what was not recorded is left out."""
    cost = {k: v for k, v in cost.items() if isinstance(v, int | float) or k == "device"}
    seconds, memory = cost.get("seconds"), cost.get("peak_memory_mb")
    big = "–" if seconds is None else duration(seconds)
    side = [
        (label, f"{cost[key]:,}")
        for key, label in (("steps", "optimizer steps"), ("images_seen", "images seen"))
        if cost.get(key)
    ]
    if memory:
        side.append(("peak memory", f"{memory:,.0f} MB" if memory < 1000 else f"{memory / 1000:,.1f} GB"))
    return {
        "question": "What did it cost?",
        "big": big,
        "text": "of training" if big != "–" else "not measured",
        "interval": f"on {cost['device']}" if cost.get("device") else "",
        "side": side,
    }


def duration(seconds: float) -> str:
    """41 s, 12 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
