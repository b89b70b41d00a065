"""The section "Does it stay gone?": how often each attack brought the concept back, with images of the worst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sd_unlearn.report.cases import Case
from sd_unlearn.report.formatting import value_text
from sd_unlearn.report.images import Embedded, embed
from sd_unlearn.report.metric_names import group_name
from sd_unlearn.results import ATTACK_METRIC, BASE, FLOOR, AttackEntry, Results, Row

HALF = 0.5  # success that counts as "back" when steps of fine-tuning are counted


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
        """What was tried, and for fine-tuning after how many steps half of the images showed the concept."""
        restarts = len({one.restart for one in self.entry.tries})
        text = f"{self.entry.budget}, {restarts} restart{'s' if restarts > 1 else ''}"
        if self.entry.attack in ("finetune", "benign"):
            steps = [one.step for one in self.entry.tries if one.value >= HALF]
            last = max(one.step for one in self.entry.tries)
            text += f"; half is back after {min(steps)} steps" if steps else f"; half is not back after {last} steps"
        return text

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
    def has_floor(self) -> bool:
        return any(line.floor for line in self.lines)


def attack_sections(results: Results, cases: Sequence[Case], folder: Path, blur_faces: bool) -> list[AttackSection]:
    """One section for each LoRA that was attacked. Without images if faces must be blurred: none were looked for."""
    sections = []
    for case in cases:
        lines = _lines(results, case)
        if lines:
            places = () if blur_faces else lines[0].entry.images
            images = [image for place in places if (image := embed(folder, place))]
            sections.append(AttackSection(case, lines, images))
    return sections


def attack_note(section: AttackSection) -> str:
    """The most successful attack in a sentence, shown next to the verdict."""
    worst = section.lines[0]
    tried = f"Of {len(section.lines)} attacks, the most successful" if len(section.lines) > 1 else "The attack tried"
    beside = f"; from a model that never saw it, {value_text(worst.floor)}" if worst.floor else ""
    return f"{tried} ({worst.name}) brings it back in {value_text(worst.lora)}{beside}."


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
