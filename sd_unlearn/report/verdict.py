"""The verdict on a LoRA: is the concept gone?"""

from __future__ import annotations

from collections.abc import Sequence

from sd_unlearn.report.formatting import GONE, WITHOUT, finite, sentence, value_text
from sd_unlearn.report.lines import Line, presence, presence_by_detector
from sd_unlearn.results import Problem, Row

# The standing of a problem's kind, the strictest first; with any other kind there is no verdict. Those of IF_GONE
# change the verdict only if the concept is gone.
OF_KIND = {"never": "never", "retention": "broken", "rarely": "unknown", "few": "unknown", "replacement": "unreadable"}
IF_GONE = ("rarely", "few", "replacement")
STANDINGS = {
    "gone": "Gone",
    "unsure": "Gone when asked for by name, but too few images of other wordings to be sure",
    "partly": "Gone when asked for by name, but not in other wordings",
    "nearly": "Nearly gone, but too few images to be sure",
    "weaker": "Weaker, but still there",
    "still": "Still there",
    "broken": "Broken: the model lost too much else",
    "unreadable": "Unreadable: no clear images in its place",
    "unknown": "Cannot tell",
    "never": "Never there: the base hardly generates it",
    "unmeasured": "Not measured",
    "other": "Not trained to forget it",
    "off": "Switched off: strength 0",
}


def standing_of(lines: Sequence[Line], problems: Sequence[Problem] = ()) -> str:
    """The verdict as a key of STANDINGS."""
    kinds = {problem.kind for problem in problems}
    if kinds - OF_KIND.keys():
        return "unknown"
    measured = _measured_standing(lines)
    for kind in (kind for kind in OF_KIND if kind in kinds):
        if kind not in IF_GONE or measured in ("gone", "unsure", "partly", "nearly"):
            return OF_KIND[kind]
    return measured


def _measured_standing(lines: Sequence[Line]) -> str:
    """The verdict by leakage alone."""
    direct, other = presence(lines), presence(lines, "held_out")
    if direct is None or direct.lora is None:
        return "unmeasured"
    standing = _compare(direct.lora, direct.base)
    if standing not in ("gone", "nearly") or other is None or other.lora is None:
        return standing
    wordings = _compare(other.lora, other.base)
    if wordings in ("gone", "never", "unknown"):  # where the base hardly shows it, there is nothing to forget
        return standing
    if wordings in ("nearly", "unmeasured"):
        return "unsure" if standing == "gone" else "nearly"
    return "partly" if standing == "gone" else wordings  # few direct images do not hide what other wordings show


def _compare(lora: Row, base: Row | None) -> str:
    if not finite(lora.value):
        return "unmeasured"
    high = lora.value if lora.high is None else lora.high
    low = None if base is None else base.value if base.low is None else base.low
    if lora.value > GONE:
        return "weaker" if low and high < low else "still"
    if base and low is not None and low <= GONE:
        return "unknown" if base.high is None or base.high > GONE else "never"
    return "gone" if high <= GONE else "nearly"


def explain(lines: Sequence[Line], asked: str, without: str = WITHOUT, problems: Sequence[Problem] = ()) -> str:
    """The verdict in a sentence with its metrics, after the problems that prevent one.

    Args:
        asked: The direct prompts in words.
        without: How the base is called.
    """
    return " ".join([*dict.fromkeys(problem.message for problem in problems), _measured(lines, asked, without)])


def _measured(lines: Sequence[Line], asked: str, without: str) -> str:
    direct, other = presence(lines), presence(lines, "held_out")
    if direct is None or direct.lora is None:
        return f"No image of {asked} was evaluated."
    text = f"{asked} still shows the concept in {sentence(direct.lora)} of {direct.lora.n:,} images"
    text += f"; {without}, in {value_text(direct.base)}." if direct.base else "."
    if other:
        text += f" In other wordings: {sentence(other.lora)}."
    for line in presence_by_detector(lines, "direct")[1:]:
        text += f" Another detector, {line.main.detector}, finds it in {sentence(line.lora)}."
    return text
