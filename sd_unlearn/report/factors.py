"""Which factor of a sweep to use, and why; or what to try if none is good."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sd_unlearn.report.formatting import finite, sentence
from sd_unlearn.report.lines import KEPT, Line, pick, presence
from sd_unlearn.report.verdict import standing_of
from sd_unlearn.results import Problem


@dataclass(frozen=True)
class Outcome:
    """What one factor achieved."""

    factor: float
    lines: list[Line]
    problems: Sequence[Problem] = ()

    @property
    def standing(self) -> str:
        """Key of report.verdict.STANDINGS."""
        return standing_of(self.lines, self.problems)

    @property
    def is_unsure(self) -> bool:
        """Whether it may be gone, but the intervals are too wide to tell."""
        return self.standing in ("nearly", "unsure")

    @property
    def label(self) -> str:
        return f"× {self.factor:g}"

    @property
    def retention(self) -> float:
        """-1 if unknown."""
        line = pick(self.lines, "retention", *KEPT)
        return line.lora.value if line and line.lora and finite(line.lora.value) else -1.0

    @property
    def leakage(self) -> float:
        """The largest of its own prompts and of other wordings; infinite if unknown."""
        found = [presence(self.lines, group) for group in ("direct", "held_out")]
        return max([x.lora.value for x in found if x and x.lora and finite(x.lora.value)], default=math.inf)

    @property
    def measured(self) -> str:
        """Leakage and retention in sentences."""
        direct, other, kept = (
            presence(self.lines),
            presence(self.lines, "held_out"),
            pick(self.lines, "retention", *KEPT),
        )
        text = f"Leakage is {sentence(direct.lora if direct else None)}"
        text += f", in other wordings {sentence(other.lora)}." if other else "."
        return f"{text} Retention is {sentence(kept.lora)}." if kept else text


@dataclass(frozen=True)
class Advice:
    """The answer of the sweep's page."""

    factor: float | None  # None: none is good
    title: str
    text: str


def advise(outcomes: Sequence[Outcome]) -> Advice:
    """Of the factors with which the concept is gone, the one that keeps the most; the smallest if several do."""
    good = [outcome for outcome in outcomes if outcome.standing == "gone"]
    if good:
        best = max(good, key=lambda outcome: (outcome.retention, -outcome.factor))
        text = f"The concept is gone. {best.measured}"
        if others := [other for other in good if other is not best]:
            text += f" It is also gone with {_listed(others)}, but this one keeps the most."
        return Advice(best.factor, f"Use {best.label}", text)
    if unsure := [outcome for outcome in outcomes if outcome.is_unsure]:
        best = min(unsure, key=lambda outcome: (outcome.leakage, -outcome.retention, outcome.factor))
        text = f"{best.measured} Evaluate its run again with a larger --num_images."
        return Advice(None, f"Too few images to be sure; {best.label} looks best", text)
    unknown = all(outcome.standing == "unknown" for outcome in outcomes)
    title = "No verdict on any of these factors" if unknown else "None of these factors is good"
    return Advice(None, title, _what_to_try(sorted(outcomes, key=lambda o: o.factor)))


def _what_to_try(outcomes: Sequence[Outcome]) -> str:
    """outcomes: by factor; none of them is gone, nor may be."""
    partly = [o for o in outcomes if o.standing == "partly"]
    broken = [o for o in outcomes if o.standing == "broken"]
    weak = [o.factor for o in outcomes if o.standing in ("still", "weaker")] + [o.factor for o in partly]
    not_gone = [o for o in outcomes if o.standing in ("unknown", "unreadable")]
    sentences = list(dict.fromkeys(problem.message for o in not_gone for problem in o.problems))
    if partly:
        sentences.append(f"With {_listed(partly)} it is gone when asked for by name, but not in other wordings.")
    if broken:
        sentences.append(f"With {_listed(broken)} the model lost too much else.")
    if any(o.standing == "never" for o in outcomes):
        sentences.append("The base itself hardly generates the concept, so there is nothing to forget.")
    elif broken and not weak:
        sentences.append(f"Try factors below {broken[0].factor:g}.")
    elif broken and weak and max(weak) < broken[0].factor:
        sentences.append(f"Try factors between {max(weak):g} and {broken[0].factor:g}, or train longer.")
    elif weak and not broken:
        sentences.append(f"The concept is still there with × {max(weak):g}. Try larger factors, or train longer.")
    return " ".join(sentences) or "The concept was not measured."


def _listed(outcomes: Sequence[Outcome]) -> str:
    labels = [outcome.label for outcome in outcomes]
    return " and ".join([", ".join(labels[:-1]), labels[-1]]) if len(labels) > 1 else labels[0]
