"""The verdict on a LoRA: is the concept gone?"""

from __future__ import annotations

from collections.abc import Sequence

from sd_unlearn.report.formatting import WITHOUT, finite, sentence, value_text
from sd_unlearn.report.lines import Line, presence, presence_by_detector
from sd_unlearn.results import Problem, Row

GONE = 0.05  # a concept is gone when the whole interval of its leakage lies at or below this
BROKEN = "retention"  # kind of the problem that the model lost its other abilities; all other kinds: cannot tell
STANDINGS = {
    "gone": "Gone",
    "unsure": "Gone when asked for by name, but too few images of other wordings to be sure",
    "partly": "Gone when asked for by name, less so in other wordings",
    "nearly": "Nearly gone, but too few images to be sure",
    "weaker": "Weaker, but still there",
    "still": "Still there",
    "broken": "Broken: the model lost too much else",
    "unknown": "Cannot tell",
    "never": "Never there: the base hardly generates it",
    "unmeasured": "Not measured",
    "other": "Not trained to forget it",
    "off": "Switched off: strength 0",
}


def standing_of(lines: Sequence[Line], problems: Sequence[Problem] = ()) -> str:
    """The verdict as a key of STANDINGS. With a problem no verdict is given."""
    if any(problem.kind != BROKEN for problem in problems):
        return "unknown"
    if problems:
        return "broken"
    direct, other = presence(lines), presence(lines, "held_out")
    if direct is None or direct.lora is None:
        return "unmeasured"
    standing = _compare(direct.lora, direct.base)
    if standing != "gone" or other is None or other.lora is None:
        return standing
    wordings = _compare(other.lora, other.base)
    return {"gone": "gone", "never": "gone", "nearly": "unsure", "unmeasured": "unsure"}.get(wordings, "partly")


def _compare(lora: Row, base: Row | None) -> str:
    if not finite(lora.value):
        return "unmeasured"
    high = lora.value if lora.high is None else lora.high
    if base and base.value is not None and (base.value if base.high is None else base.high) <= GONE:
        return "never"
    if high <= GONE:
        return "gone"
    if lora.value <= GONE:
        return "nearly"
    low = base and (base.value if base.low is None else base.low)
    return "weaker" if low and high < low else "still"


def explain(lines: Sequence[Line], caption: str, without: str = WITHOUT, problems: Sequence[Problem] = ()) -> str:
    """The verdict in a sentence with its metrics, after the problems that prevent one.

    Args:
        caption: What was asked for.
        without: How the base is called.
    """
    return " ".join([*dict.fromkeys(problem.message for problem in problems), _measured(lines, caption, without)])


def _measured(lines: Sequence[Line], caption: str, without: str) -> str:
    direct, other = presence(lines), presence(lines, "held_out")
    if direct is None or direct.lora is None:
        return f"No image of “{caption}” was evaluated."
    text = f"“{caption}” still shows the concept in {sentence(direct.lora)} of {direct.lora.n:,} images"
    text += f"; {without}, in {value_text(direct.base)}." if direct.base else "."
    if other:
        text += f" In other wordings: {sentence(other.lora)}."
    for line in presence_by_detector(lines, "direct")[1:]:
        text += f" Another detector, {line.main.detector}, finds it in {sentence(line.lora)}."
    return text
