"""The section "Does it stay gone?": how often each attack brought the concept back, with images of the worst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sd_unlearn.errors import counted
from sd_unlearn.report.cases import Case
from sd_unlearn.report.formatting import value_text
from sd_unlearn.report.images import Embedded, embed
from sd_unlearn.report.metric_names import group_name
from sd_unlearn.results import ATTACK_METRIC, BASE, FLOOR, AttackEntry, Results, Row

HALF = 0.5  # share of the base's success that counts as "back" when steps of fine-tuning are counted


@dataclass(frozen=True)
class AttackLine:
    """An attack on one LoRA, with the same attack on the base and on a model that never saw the concept."""

    name: str
    entry: AttackEntry
    lora: Row
    base: Row | None
    floor: Row | None

    @property
    def effort(self) -> str:
        """What was tried, and for fine-tuning after how many steps the concept is half back."""
        restarts, tries = len({one.restart for one in self.entry.tries}), len(self.entry.tries)
        text = f"{self.entry.budget}, {counted(restarts, 'restart')}"
        text += f", {tries} {'tries' if tries > 1 else 'try'}"
        return f"{text}; {self._half_back()}" if self.entry.attack in ("finetune", "benign") else text

    def _half_back(self) -> str:
        """After how many steps half of the base's success is reached, or 50 % if the base's is unknown or 0."""
        ceiling = self.base.value if self.base else None
        half = f"half of the base's {value_text(self.base)}" if ceiling else f"{100 * HALF:g} %"
        steps = [one.step for one in self.entry.tries if one.value >= HALF * (ceiling or 1.0)]
        last = max(one.step for one in self.entry.tries)
        return f"{half} is reached after {min(steps)} steps" if steps else f"{half} is not reached in {last} steps"

    @property
    def found(self) -> str:
        """The prompt or setting of the best try, if the attack searches one."""
        return max(self.entry.tries, key=lambda one: one.value).found


@dataclass(frozen=True)
class AttackSection:
    """The attacks on one LoRA, the most successful first."""

    case: Case
    lines: Sequence[AttackLine]
    images: Sequence[Embedded]  # of the most successful attack

    @property
    def worst(self) -> AttackLine:
        """The most successful attack, by the detector that gives the verdict."""
        return _worst(self.case, self.lines)

    @property
    def detectors(self) -> list[str]:
        return list(dict.fromkeys(line.lora.detector for line in self.lines))

    @property
    def has_floor(self) -> bool:
        return any(line.floor for line in self.lines)


def attack_sections(results: Results, cases: Sequence[Case], folder: Path, blur_faces: bool) -> list[AttackSection]:
    """One section for each LoRA that was attacked. Without images if faces must be blurred: none were looked for."""
    sections = []
    for case in cases:
        lines = _lines(results, case)
        if lines:
            places = () if blur_faces else _worst(case, lines).entry.images
            images = [image for place in places if (image := embed(folder, place))]
            sections.append(AttackSection(case, lines, images))
    return sections


def failures(results: Results) -> list[str]:
    """A sentence for each attack that could not be carried out, so that nobody takes it for one without success."""
    names = {subject.id: subject.name for subject in results.subjects}
    return [
        f"{group_name(one.attack).capitalize()} failed on {names.get(one.subject, one.subject)}: {one.message}"
        for one in results.failed_attacks
    ]


def attack_note(section: AttackSection) -> str:
    """The most successful attack in a sentence, shown next to the verdict."""
    worst, attacks = section.worst, {line.entry.attack for line in section.lines}
    tried = f"Of {len(attacks)} attacks, the most successful" if len(attacks) > 1 else "The attack tried"
    beside = f"; from a model that never saw it, {value_text(worst.floor)}" if worst.floor else ""
    return f"{tried} ({worst.name}) brings it back in {value_text(worst.lora)}{beside}."


def _worst(case: Case, lines: Sequence[AttackLine]) -> AttackLine:
    worst = case.attacks[0].lora
    return next((line for line in lines if line.lora == worst), lines[0])


def _lines(results: Results, case: Case) -> list[AttackLine]:
    rows = {
        (row.subject, row.group, row.detector): row
        for row in results.rows
        if row.metric == ATTACK_METRIC and row.concept == case.concept.slug
    }
    lines = []
    for entry in results.attacks:
        row = rows.get((case.subject.id, entry.attack, entry.detector))
        if row and (entry.concept, entry.subject) == (case.concept.slug, case.subject.id) and entry.tries:
            others = [rows.get((model, entry.attack, entry.detector)) for model in (BASE, FLOOR)]
            base, floor = (other if other and results.is_same_attack(row, other) else None for other in others)
            lines.append(AttackLine(group_name(entry.attack), entry, row, base, floor))
    return sorted(lines, key=lambda line: -(line.lora.value or 0))
