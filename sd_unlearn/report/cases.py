"""One LoRA (or folder of pictures) on one concept: what every part of the page is about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sd_unlearn.report import formatting
from sd_unlearn.report.formatting import STANDINGS, Line, asked, lines
from sd_unlearn.results import BASE, judged, loras, view


@dataclass(frozen=True)
class Case:
    """A subject judged on a concept, its figures brought together."""

    concept: dict[str, Any]
    subject: dict[str, Any]
    about: dict[str, Any]  # results.view: the words of a single run
    lines: list[Line]
    label: str  # the subject's name, with its strength where there are several
    family: str  # the same for all strengths of a LoRA
    standing: str  # key of formatting.STANDINGS
    verdict: str  # the same in a sentence, with its figures

    @property
    def word(self) -> str:
        return STANDINGS[self.standing]

    @property
    def meant(self) -> bool:
        """Whether the subject was to forget the concept, so that a verdict is due."""
        return self.standing not in ("other", "off")

    @property
    def gone(self) -> Line | None:
        return asked(self.lines)

    def pick(self, metric: str, *groups: str) -> Line | None:
        return formatting.pick(self.lines, metric, *groups)


def cases_of(results: dict[str, Any]) -> list[Case]:
    """Every subject but the base on every concept it was judged on; concepts in order, then subjects in order."""
    found = judged(results) or [(c, s) for s in loras(results) for c in results["concepts"]]
    names = labels(results)
    order = {concept["slug"]: i for i, concept in enumerate(results["concepts"])}
    made = []
    for concept, subject in sorted(found, key=lambda both: order[both[0]["slug"]]):
        about = view(results, concept["slug"], subject["id"])
        if subject["what"] == "images":
            about["without"] = "drawn by the base"
        forgets = subject.get("forgets")
        standing = formatting.standing(mine := lines(about))
        if forgets and forgets != concept["slug"]:
            standing = "other"  # that a LoRA leaves another concept alone is no failure to forget
        elif subject.get("strength") == 0:
            standing = "off"  # nor is it one of the LoRA that it does nothing at 0
        text = formatting.verdict(about)[1]
        name = names[subject["id"]]
        made.append(Case(concept, subject, about, mine, name, family(subject), standing, text))
    return made


def family(subject: dict[str, Any]) -> str:
    """What all strengths of a LoRA share."""
    return str(subject.get("sha256") or subject["name"])


def labels(results: dict[str, Any]) -> dict[str, str]:
    """id -> the name people read: the strength beside it where it is not 1 or there are several."""
    strengths: dict[str, set[Any]] = {}
    for subject in loras(results):
        strengths.setdefault(family(subject), set()).add(subject.get("strength"))
    made = {}
    for subject in results["subjects"]:
        strength, name = subject.get("strength"), subject["name"] or subject["id"]
        told = isinstance(strength, int | float) and (strength != 1 or len(strengths[family(subject)]) > 1)
        made[subject["id"]] = f"{name} × {strength:g}" if told and subject["what"] != BASE else name
    counts = list(made.values())
    return {key: f"{name} ({key})" if counts.count(name) > 1 and name != key else name for key, name in made.items()}
