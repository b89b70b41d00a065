"""The few pairs at the top of the page: the first images of the evaluation, of the concept and of what should stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

from sd_unlearn.report.before_after import Outcome, PairCard, cards_of_pairs, embed_cards, outcome_of
from sd_unlearn.report.cases import Case
from sd_unlearn.results import Pair, Results

SHOWN = 4
ASKED, KEPT = ("direct", "held_out", "generic"), ("alike", "general")  # prompt groups, in order of preference
T = TypeVar("T")


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
    queues = [[(p, outcome_of(p, c.is_target)) for p in _queue(results, c, g)] for g in (ASKED, KEPT) for c in cases]
    turns = [both for turn in zip_longest(*queues) for both in turn if both][:SHOWN]
    return [both for queue in queues for both in queue if any(both is other for other in turns)]


def _queue(results: Results, case: Case, groups: Sequence[str]) -> list[Pair]:
    """The case's pairs of the first of the groups that has any."""
    own = [p for p in results.pairs if (p.concept, p.subject) == (case.concept.slug, case.subject.id)]
    by_group = [[p for p in own if p.group == group] for group in groups]
    pairs = next(filter(None, by_group), [])
    if case.standing != "gone":
        faults = [p for members in by_group for p in members if outcome_of(p, case.is_target) != "good"][:1]
        pairs = faults + [p for p in pairs if p not in faults]
    return one_of_each_prompt(pairs, [pair.prompt for pair in pairs])


def one_of_each_prompt(items: Sequence[T], prompts: Sequence[str]) -> list[T]:
    """The first item of each prompt, then the second of each, and so on.

    Args:
        prompts: The prompt of each item.
    """
    seen: Counter[str] = Counter()
    turns = []
    for prompt in prompts:
        turns.append(seen[prompt])
        seen[prompt] += 1
    return [item for _, item in sorted(zip(turns, items, strict=True), key=lambda both: both[0])]
