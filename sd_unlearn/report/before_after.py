"""Before and after: images of the same prompt and seed, grouped so that the base's image appears once for all LoRAs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sd_unlearn.errors import UsageError
from sd_unlearn.report.cases import cases_of, labels
from sd_unlearn.report.images import Boxes, Embedded, embed_all
from sd_unlearn.report.metric_names import group_rank
from sd_unlearn.results import BASE, MAX_FACES, ConceptEntry, Pair, Results

FIRST = 12  # cards of a group that are visible before the rest is unfolded
Outcome = Literal["leak", "lost", "good"]
_ORDER = {"leak": 0, "lost": 1, "good": 2}
_WHOLE = (0.0, 0.0, 1.0, 1.0)  # box around an image


@dataclass
class Shot:
    """One image of a card."""

    subject: str
    path: str
    read: str  # what the detector read
    faces: Boxes
    outcome: Outcome = "good"
    image: Embedded | None = None
    name: str = ""  # of the subject
    method: str = "LoRA"  # SubjectEntry.method
    crowded: bool = False  # may have more faces than boxes

    @property
    def blurred(self) -> Boxes:
        """What --blur_faces blurs."""
        return [_WHOLE] if self.crowded else self.faces


@dataclass
class PairCard:
    """One prompt and seed: the base's image, then that of each LoRA."""

    concept: str
    group: str
    prompt: str
    seed: int
    expected: str
    shots: list[Shot] = field(default_factory=list)

    @property
    def worst(self) -> int:
        return min(_ORDER[shot.outcome] for shot in self.shots)


@dataclass(frozen=True)
class CardGroup:
    """The cards of one concept and prompt group, leaks and losses first."""

    concept: ConceptEntry
    name: str
    cards: list[PairCard]

    @property
    def _loras(self) -> list[Shot]:
        return [shot for card in self.cards for shot in card.shots if shot.subject != BASE]

    @property
    def total(self) -> int:
        return len(self._loras)

    @property
    def leaks(self) -> int:
        return sum(shot.outcome == "leak" for shot in self._loras)

    @property
    def lost(self) -> int:
        return sum(shot.outcome == "lost" for shot in self._loras)

    @property
    def first(self) -> int:
        """How many cards are visible before the rest is unfolded."""
        return len(self.cards) if len(self.cards) <= FIRST + 4 else FIRST

    @property
    def tiny(self) -> bool:
        return all(shot.image.tiny for card in self.cards for shot in card.shots if shot.image)

    @property
    def one_prompt(self) -> bool:
        return len({card.prompt for card in self.cards}) == 1


def before_after(results: Results, folder: Path, max_pairs: int, blur_faces: bool) -> dict[str, Any]:
    """What the section "Before and after" shows: cards by concept and prompt group, leaks and losses first.

    blur_faces: the results are those of `with_known_faces`.
    """
    # a LoRA that was not trained to forget a concept does not leak it
    targets = {(case.concept.slug, case.subject.id) for case in cases_of(results) if case.is_target}
    outcomes = [(pair, outcome_of(pair, (pair.concept, pair.subject) in targets)) for pair in results.pairs]
    chosen = sorted(outcomes, key=lambda both: both[1] == "good")[:max_pairs]  # keeps the order otherwise
    cards = cards_of_pairs(results, chosen)
    embed_cards(folder, cards, blur_faces)
    groups = _groups(results, cards)
    used = {pair.subject for pair, _ in chosen}
    names = labels(results.subjects)
    counts = [count for count in results.pair_counts if count.subject in used]
    return {
        "groups": groups,
        "several": len(used) > 1,
        "total": len(chosen),
        "left_out": len(outcomes) - len(chosen),
        "leaks": sum(outcome == "leak" for _, outcome in chosen),
        "lost": sum(outcome == "lost" for _, outcome in chosen),
        "all_leaks": sum(count.leaks for count in counts if (count.concept, count.subject) in targets),
        "all_lost": sum(count.lost for count in counts),
        "boxed": any(pair.faces or pair.base_faces for pair, _ in chosen),
        "blurred": blur_faces,
        "box": "faces" if _concepts_with_faces(results) else "detections",  # else boxes are of something else
        "concepts": list({group.concept.slug: group.concept for group in groups}.values()),
        "subjects": [(subject.id, names[subject.id]) for subject in results.subjects if subject.id in used],
        "names": list(dict.fromkeys(group.name for group in groups)),
    }


def with_known_faces(results: Results) -> tuple[Results, list[str]]:
    """The results without the pairs of concepts on whose images no face detector was run, and their names.

    Raises:
        UsageError: a face detector was run on no concept that has pairs.
    """
    known = _concepts_with_faces(results)
    pairs = tuple(pair for pair in results.pairs if pair.concept in known)
    if results.pairs and not pairs:
        raise UsageError(
            "--blur_faces: results.json has no faces because no face detector was run. Evaluate with one (the identity "
            "metric) first, or omit --blur_faces."
        )
    counts = tuple(count for count in results.pair_counts if count.concept in known)
    left_out = {pair.concept for pair in results.pairs} - known
    names = [concept.name for concept in results.concepts if concept.slug in left_out]
    return replace(results, pairs=pairs, pair_counts=counts), names


def _concepts_with_faces(results: Results) -> set[str]:
    """The slugs of the concepts on whose images a face detector was run."""
    return {row.concept for row in results.rows if row.metric == "face_rate"}


def outcome_of(pair: Pair, is_target: bool) -> Outcome:
    """is_target: whether the LoRA should have forgotten the concept; else it cannot leak."""
    return "leak" if pair.leak and is_target else "lost" if pair.lost else "good"


def cards_of_pairs(results: Results, pairs: Sequence[tuple[Pair, Outcome]]) -> list[PairCard]:
    """One card per prompt and seed, with the LoRAs in the order of results.json."""
    place = {subject.id: i for i, subject in enumerate(results.subjects)}
    names, methods = labels(results.subjects), {subject.id: subject.method for subject in results.subjects}
    cards: dict[tuple[Any, ...], PairCard] = {}
    for pair, outcome in sorted(pairs, key=lambda both: place[both[0].subject]):
        key = (pair.concept, pair.group, pair.prompt, pair.seed)
        card = cards.setdefault((*key, pair.base), PairCard(*key, pair.expected))
        if not card.shots and pair.base:
            card.shots.append(_shot(BASE, pair.base, pair.base_read, pair.base_faces))
        shot = _shot(pair.subject, pair.image, pair.image_read, pair.faces, outcome)
        shot.name, shot.method = names[pair.subject], methods[pair.subject]
        card.shots.append(shot)
    return list(cards.values())


def _shot(subject: str, path: str, read: str, faces: Boxes, outcome: Outcome = "good") -> Shot:
    return Shot(subject, path, read, _boxes(faces), outcome, crowded=len(faces) >= MAX_FACES)


def _boxes(boxes: Boxes) -> Boxes:
    """Boxes cut to the image; empty ones are dropped."""
    cut = [[min(1.0, max(0.0, value)) for value in box] for box in boxes]
    return [box for box in cut if box[0] < box[2] and box[1] < box[3]]


def embed_cards(folder: Path, cards: Sequence[PairCard], blur_faces: bool) -> None:
    """Load the image of each shot."""
    shots = [shot for card in cards for shot in card.shots]
    uses: dict[str, int] = {}
    faces: dict[str, Boxes] = {}
    for shot in shots:
        uses[shot.path] = uses.get(shot.path, 0) + 1
        if blur_faces:
            faces[shot.path] = [*faces.get(shot.path, ()), *shot.blurred]
    images = embed_all(folder, uses, faces)
    for shot in shots:
        shot.image = images[shot.path]


def _groups(results: Results, cards: Sequence[PairCard]) -> list[CardGroup]:
    concepts = {concept.slug: concept for concept in results.concepts}
    order = {slug: i for i, slug in enumerate(concepts)}
    found: dict[tuple[str, str], list[PairCard]] = {}
    for card in cards:
        found.setdefault((card.concept, card.group), []).append(card)
    keys = sorted(found, key=lambda key: (order[key[0]], group_rank(key[1])))
    return [CardGroup(concepts[slug], name, sorted(found[slug, name], key=lambda c: c.worst)) for slug, name in keys]
