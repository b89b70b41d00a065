"""The few pairs at the top of the page: the first images of the evaluation, of the concept and of what should stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from sd_unlearn.report.before_after import Outcome, PairCard, cards_of_pairs, embed_cards, outcome_of
from sd_unlearn.report.cases import Case
from sd_unlearn.results import Pair, Results

SHOWN = 4
ASKED, KEPT = ("direct", "held_out", "generic"), ("alike", "general")  # prompt groups, in order of preference


@dataclass(frozen=True)
class Examples:
    """What the page shows below the verdict."""

    cards: list[PairCard]
    has_faults: bool  # pairs that leak or were lost are among them


def examples(results: Results, folder: Path, cases: Sequence[Case], blur_faces: bool) -> Examples:
    """Up to four pairs of the cases, with their images."""
    chosen = choose(results, cases)
    cards = cards_of_pairs(results, chosen)
    embed_cards(folder, cards, blur_faces)
    return Examples(cards, any(outcome != "good" for _, outcome in chosen))


def choose(results: Results, cases: Sequence[Case]) -> list[tuple[Pair, Outcome]]:
    """The first pairs of the concept and of what should stay, in the order of the evaluation, for each case in turn.

    Unless the concept is gone, a pair that leaks (or was lost) comes first: clean images alone would be misleading.
    """
    queues = [_queue(results, case, groups) for groups in (ASKED, KEPT) for case in cases]
    turns = [both for turn in zip_longest(*queues) for both in turn if both][:SHOWN]
    return [both for queue in queues for both in queue if any(both is other for other in turns)]


def _queue(results: Results, case: Case, groups: Sequence[str]) -> list[tuple[Pair, Outcome]]:
    """The case's pairs of the first of the groups that has any, one of each prompt before a second of any."""
    own = [p for p in results.pairs if (p.concept, p.subject) == (case.concept.slug, case.subject.id)]
    by_group = [[(p, outcome_of(p, case.is_target)) for p in own if p.group == group] for group in groups]
    pairs = next(filter(None, by_group), [])
    if case.standing != "gone":
        faults = [both for members in by_group for both in members if both[1] != "good"][:1]
        pairs = faults + [both for both in pairs if both not in faults]
    seen: Counter[str] = Counter()
    repeats = []
    for pair, _ in pairs:
        repeats.append(seen[pair.prompt])
        seen[pair.prompt] += 1
    return [both for _, both in sorted(zip(repeats, pairs, strict=True), key=lambda item: item[0])]
