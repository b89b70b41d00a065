"""The four headline answers about one LoRA: gone, replacement, retention, cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sd_unlearn.report.cases import Case
from sd_unlearn.report.formatting import NONE, duration, finite, interval_text, sentence, value_text
from sd_unlearn.report.lines import KEPT, Line
from sd_unlearn.report.metric_names import group_name


@dataclass(frozen=True)
class Answer:
    """A question with one large value."""

    question: str
    value: str
    text: str = "not measured"  # what the value counts
    interval: str = ""  # with n and the base's value
    details: tuple[tuple[str, str], ...] = ()  # label and value


def answers(case: Case, cost: Mapping[str, Any]) -> list[Answer]:
    """The four questions that a reader has first. cost: of the training, as training.json records it."""
    gone, kept = case.presence, case.pick("accuracy", *KEPT) or case.retention
    others = [group for group in ("alike", "general") if not kept or group != kept.group]
    is_ratio = kept is not None and kept.metric == "retention"
    return [
        _answer(
            "Is it gone?",
            gone,
            case.without,
            "of the images asked for by name still show it",
            _details(case, gone.metric if gone else "leakage", "generic", "held_out"),
        ),
        _answer(
            "What appears instead?",
            case.pick("clean_replacement", "direct"),
            case.without,
            "of the base's usual number of clear images, but of something else",
        ),
        _answer(
            "What was kept?",
            kept,
            case.without,
            "of the base's accuracy on other things" if is_ratio else "of the images of other things are as requested",
            _details(case, kept.metric if kept else "retention", *others),
        ),
        cost_answer(cost),
    ]


def _details(case: Case, metric: str, *groups: str) -> tuple[tuple[str, str], ...]:
    lines = [line for group in groups if (line := case.pick(metric, group))]
    return tuple((group_name(line.group), sentence(line.lora, line.base, case.without)) for line in lines)


def _answer(
    question: str, line: Line | None, without: str, text: str, details: tuple[tuple[str, str], ...] = ()
) -> Answer:
    if line is None or line.lora is None:
        return Answer(question, NONE, details=details)
    interval = interval_text(line.lora)
    if (line.lora.value or 0.0) > 1:  # a ratio, whose exact value is in the table of all metrics
        return Answer(question, "100 %", f"or more {text}", f"n = {line.n}", details)
    parts = ["no interval" if interval == NONE else f"95 % interval {interval}"]
    parts += [f"{without} {value_text(line.base)}"] if line.base else []
    return Answer(question, value_text(line.lora), text, "; ".join([*parts, f"n = {line.n}"]), details)


def cost_answer(cost: Mapping[str, Any]) -> Answer:
    """Training cost in everyday units; what was not recorded is left out."""
    numbers = {k: v for k, v in cost.items() if finite(v)}
    details = [
        (label, f"{numbers[key]:,}")
        for key, label in (("steps", "optimizer steps"), ("images_seen", "images seen"))
        if numbers.get(key)
    ]
    if memory := numbers.get("peak_memory_mb"):
        details.append(("peak memory", f"{memory:,.0f} MB" if memory < 1024 else f"{memory / 1024:,.1f} GB"))
    timed = "seconds" in numbers
    return Answer(
        "What did it cost?",
        duration(numbers["seconds"]) if timed else NONE,
        "of training" if timed else "not measured",
        f"on {cost['device']}" if cost.get("device") else "",
        tuple(details),
    )
