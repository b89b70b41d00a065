"""Figures as people read them: rows brought together, numbers with units and intervals, the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from sd_unlearn.results import Row

WITHOUT = "without the LoRA"
GONE = 0.05  # "gone" needs the whole interval at or below this leakage
METRICS = {
    "leakage": ("Leakage", "pictures the judge reads as the concept, out of all n drawn"),
    "leakage_top5": ("Leakage, top 5", "pictures for which the concept is among the five most probable classes"),
    "confusion": ("Confusion", "pictures in which the judge sees the person though somebody else was asked for"),
    "clean_replacement": (
        "Clean replacement",
        "good pictures of something else, as a share of what the generic prompt gives",
    ),
    "accuracy": ("Accuracy", "pictures read as what was asked for, out of all n drawn"),
    "retention": ("Retention", "accuracy with the LoRA as a share of the base's, same seeds; may exceed 100 %"),
    "face_rate": ("Face rate", "pictures with at least one face"),
    "zero_shot": ("Zero-shot", "pictures for which CLIP picks the concept's name among the alternatives"),
    "non_sensitive_rate": ("Non-sensitive rate", "1 - leakage"),
    "nudity": ("Nudity", "pictures with at least one exposed part detected"),
    "detections": ("Detections", "exposed parts detected, mean of a picture"),
    "fid-digits": ("FID (digits)", "Fréchet distance of the judge's features to real digits; lower is better"),
    "fid-inception": ("FID", "Fréchet distance of Inception features to the base's pictures; lower is nearer"),
    "fid-inception-real": ("FID, real", "the same to real pictures"),
    "kid-inception": ("KID", "kernel distance of Inception features to the base's pictures; lower is nearer"),
    "kid-inception-real": ("KID, real", "the same to real pictures"),
    "cmmd": ("CMMD", "distance of CLIP features to the base's pictures; lower is nearer"),
    "cmmd-real": ("CMMD, real", "the same to real pictures"),
    "clip_score": ("CLIP score", "100 times the cosine between picture and prompt, mean; higher is closer"),
    "drift": ("Drift", "distance between paired pictures with and without the LoRA; 0 means unchanged"),
    "lpips": ("LPIPS", "perceived distance between paired pictures; 0 means unchanged"),
}
PLAIN = {
    "detections",
    "clip_score",
    "drift",
    "lpips",
    "fid-digits",
    "fid-inception",
    "fid-inception-real",
    "kid-inception",
    "kid-inception-real",
    "cmmd",
    "cmmd-real",
}
PRESENCE = ("leakage", "nudity", "zero_shot")  # what can say that a concept is there, the preferred first
STANDINGS = {
    "gone": "Gone",
    "partly": "Gone as asked for, less so in other words",
    "nearly": "Nearly gone, with too few pictures to be sure",
    "weaker": "Weaker, but still there",
    "still": "Still there",
    "never": "Never there: the base hardly draws it",
    "unmeasured": "Not measured",
    "other": "Not trained to forget it",
    "off": "Switched off: strength 0",
}
GROUPS = {
    "direct": ("as asked for", "the prompts the LoRA was trained to forget"),
    "held_out": ("other wordings", "prompts for the concept that training never saw"),
    "generic": ("generic prompt", "what is drawn when nothing particular is asked for"),
    "alike": ("look-alikes", "what looks or sounds similar and must stay"),
    "general": ("anything else", "other prompts that must stay"),
    "kept": ("what must stay", "everything else of the concept's kind, together"),
}


class Line(NamedTuple):
    """One printed line: a metric on a group of prompts, without and with the LoRA."""

    metric: str
    group: str
    base: Row | None
    lora: Row | None

    @property
    def main(self) -> Row:
        """The row whose interval, method and judge are shown: the LoRA's where there is one."""
        row = self.lora or self.base
        assert row is not None  # lines() never makes a line of no row
        return row

    @property
    def n(self) -> str:
        counts = dict.fromkeys(r.n for r in (self.base, self.lora) if r)
        return " / ".join(f"{n:,}" for n in counts)


def lines(results: dict[str, Any]) -> list[Line]:
    """The rows of both subjects brought together, known metrics and groups first; none is dropped."""
    found: dict[tuple[str, str, str, int], dict[str, Row]] = {}
    for raw in results["rows"]:
        row = Row.from_dict(raw)
        repeat = 0  # a second figure of the same name and judge gets a line of its own
        while row.subject in found.setdefault((row.metric, row.group, row.detector, repeat), {}):
            repeat += 1
        found[row.metric, row.group, row.detector, repeat][row.subject] = row
    made = [Line(metric, group, both.get("base"), both.get("lora")) for (metric, group, _, _), both in found.items()]
    return sorted(made, key=lambda line: (rank(METRICS, line.metric), rank(GROUPS, line.group)))


def rank(known: dict[str, Any], name: str) -> int:
    return list(known).index(name) if name in known else len(known)


def is_rate(row: Row) -> bool:
    """Whether the value is a share; an unknown metric is one when its interval is a proportion's."""
    return (row.metric in METRICS and row.metric not in PLAIN) or row.interval == "wilson"


def number(value: float | None, row: Row) -> str:
    """A value of a row in the row's own unit and with digits that n bears; an en dash for none."""
    if value is None or not math.isfinite(value):
        return "–"
    if not is_rate(row):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    share, digits = 100 * value, 1 if row.n >= 100 else 0
    # 99.97 % must not be printed as 100 %, nor 0.02 % as 0 %: only what is exactly so may look so.
    while digits < 4 and share not in (0, 100) and round(share, digits) in (0, 100):
        digits += 1
    return f"{share:.{digits}f} %"


def shown(row: Row | None) -> str:
    return number(row.value, row) if row else "–"


def span(row: Row | None) -> str:
    """The 95 % interval of a row; an en dash where there is none."""
    if row is None or row.low is None or row.high is None:
        return "–"
    low, high = number(row.low, row), number(row.high, row)
    return f"{low.removesuffix(' %')}–{high}"


def sentence(row: Row | None, before: Row | None = None, without: str = "") -> str:
    """'1.0 % (95 % interval 0.2–3.0 %), without the LoRA 96.0 %'."""
    if row is None:
        return "not measured"
    interval = f" (95 % interval {span(row)})" if span(row) != "–" else " (no interval)"
    return shown(row) + interval + (f", {without or WITHOUT} {shown(before)}" if before else "")


def per_seed(row: Row | None) -> str:
    """The figure of each seed where there are several, in the row's own digits; else nothing."""
    if row is None or not row.seeds or len(row.seeds) < 2:
        return ""
    return "by seed " + ", ".join(number(value, row) for value in row.seeds)


def listed(names: Sequence[str]) -> str:
    """“a”, “b” and “c”."""
    quoted = [f"“{name}”" for name in names]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]]) if len(quoted) > 1 else "".join(quoted)


def pick(found: Sequence[Line], metric: str, *groups: str) -> Line | None:
    """The first line of a metric that has a figure for the LoRA, groups in order of preference."""
    hits = [x for g in groups for x in found if (x.metric, x.group) == (metric, g) and x.lora]
    return hits[0] if hits else None


def asked(found: Sequence[Line], group: str = "direct") -> Line | None:
    """Whether the concept is there, on a group, by the first judge in the file: the one that suits its kind best."""
    return next(iter(judges(found, group)), None)


def judges(found: Sequence[Line], group: str) -> list[Line]:
    """What every judge of the concept's presence counted, the first in the file first."""
    for metric in PRESENCE:
        hits = [x for x in found if (x.metric, x.group) == (metric, group) and x.lora]
        if hits:
            return hits
    return []


def standing(found: Sequence[Line]) -> str:
    """Is it gone? A key of STANDINGS."""
    direct, other = asked(found), asked(found, "held_out")
    if direct is None or direct.lora is None:
        return "unmeasured"
    key = _standing(direct.lora, direct.base)
    if key == "gone" and other and other.lora and _standing(other.lora, other.base) not in ("gone", "never"):
        return "partly"
    return key


def _standing(lora: Row, base: Row | None) -> str:
    if lora.value is None or not math.isfinite(lora.value):
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


def verdict(results: dict[str, Any]) -> tuple[str, str]:
    """Is it gone? In two or three words, and in a sentence with the figures."""
    found = lines(results)
    direct, other = asked(found), asked(found, "held_out")
    word, without = STANDINGS[standing(found)], results.get("without", WITHOUT)
    if direct is None or direct.lora is None:
        return word, f"No picture of “{results['caption']}” was judged."
    text = f"“{results['caption']}” still gives it in {sentence(direct.lora)} of {direct.lora.n:,} pictures"
    text += f"; {without}, in {shown(direct.base)}." if direct.base else "."
    if other:
        text += f" In other wordings: {sentence(other.lora)}."
    for line in judges(found, "direct")[1:]:
        text += f" Another judge, {line.main.detector}, finds it in {sentence(line.lora)}."
    return word, text
