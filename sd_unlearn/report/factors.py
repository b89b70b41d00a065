"""Which factor of a sweep to use, and why; or what to try if none is good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sd_unlearn.report.formatting import finite, sentence
from sd_unlearn.report.lines import KEPT, Line, pick, presence
from sd_unlearn.report.verdict import GONE, standing_of
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
        other = presence(self.lines, "held_out")
        seldom = other is not None and other.lora is not None and finite(other.lora.value) and other.lora.value <= GONE
        return self.standing == "nearly" or (self.standing == "partly" and seldom)

    @property
    def label(self) -> str:
        return f"× {self.factor:g}"

    @property
    def retention(self) -> float:
        """-1 if unknown."""
        line = pick(self.lines, "retention", *KEPT)
        return line.lora.value if line and line.lora and finite(line.lora.value) else -1.0


@dataclass(frozen=True)
class Advice:
    """The answer of the sweep's page."""

    factor: float | None  # None: none is good
    title: str
    text: str


def advise(outcomes: Sequence[Outcome]) -> Advice:
    """Of the factors with which the concept is gone, the one that keeps the most; the smallest if several do."""
    good = [outcome for outcome in outcomes if outcome.standing == "gone"]
    if not good:
        return Advice(None, "None of these factors is good", _what_to_try(sorted(outcomes, key=lambda o: o.factor)))
    best = max(good, key=lambda outcome: (outcome.retention, -outcome.factor))
    leaks, kept = presence(best.lines), pick(best.lines, "retention", *KEPT)
    text = f"The concept is gone: leakage {sentence(leaks.lora if leaks else None)}."
    if kept and kept.lora:
        others = "the highest of the factors that make it forget" if len(good) > 1 else "which is what it costs"
        text += f" Retention is {sentence(kept.lora)}, {others}."
    if also := [other for other in good if other is not best]:
        text += f" It is also gone with {_listed(also)}."
    return Advice(best.factor, f"Use {best.label}", text)


def _what_to_try(outcomes: Sequence[Outcome]) -> str:
    """outcomes: by factor, none of them "gone"."""
    unsure = [o for o in outcomes if o.is_unsure]
    partly = [o for o in outcomes if o.standing == "partly" and not o.is_unsure]
    broken = [o for o in outcomes if o.standing == "broken"]
    weak = [o.factor for o in outcomes if o.standing in ("still", "weaker")] + [o.factor for o in partly]
    sentences = list(dict.fromkeys(p.message for o in outcomes if o.standing == "unknown" for p in o.problems))
    if unsure:
        sentences.append(
            f"With {_listed(unsure)} the concept may be gone, but there are too few images to be sure: evaluate again "
            "with a larger --num_images."
        )
    if partly:
        sentences.append(f"With {_listed(partly)} it is gone when asked for by name, but not in other wordings.")
    if broken:
        sentences.append(f"With {_listed(broken)} the model lost too much else.")
    if any(o.standing == "never" for o in outcomes):
        sentences.append("The base itself hardly generates the concept, so there is nothing to forget.")
    elif broken and not (unsure or weak):
        sentences.append(f"Try factors below {broken[0].factor:g}.")
    elif broken and weak and max(weak) < broken[0].factor:
        sentences.append(f"Try factors between {max(weak):g} and {broken[0].factor:g}, or train longer.")
    elif weak and not (broken or unsure):
        sentences.append(f"The concept is still there with × {max(weak):g}. Try larger factors, or train longer.")
    return " ".join(sentences) or "The concept was not measured."


def _listed(outcomes: Sequence[Outcome]) -> str:
    labels = [outcome.label for outcome in outcomes]
    return " and ".join([", ".join(labels[:-1]), labels[-1]]) if len(labels) > 1 else labels[0]
