"""Find where a condition begins to hold, with few evaluations; and check that it then holds throughout."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence


def strengths_up_to(maximum: float, step: float) -> list[float]:
    """0, step, 2 step, ... up to `maximum`, which is the last one even if it is no multiple of step."""
    count = int(maximum / step + 1e-9)
    values = [round(index * step, 6) for index in range(count + 1)]
    return values if values[-1] == maximum else [*values, maximum]


def first_holding(
    values: Sequence[float], holds: Callable[[float], bool], known: Collection[float] = ()
) -> float | None:
    """The first of `values` from which on a condition holds, by bisection; None if no tried value satisfies it.

    The ends and the `known` values are tried first. If the condition changes more than once along `values`, the result
    is a value at which it holds and before which it does not: `exceptions` finds the contradictions.

    Args:
        values: In the order of the search, e.g. ascending for the smallest and descending for the largest value.
        holds: Called at most once for each value.
        known: Values that are cheap to try, a part of `values`.
    """
    tried = {index: holds(values[index]) for index in sorted({0, *map(values.index, known), len(values) - 1})}
    if not any(tried.values()):
        return None
    high = min(index for index, is_held in tried.items() if is_held)
    low = max((index for index in tried if index < high), default=high - 1)  # high is 0: nothing comes before it
    while high - low > 1:
        middle = (low + high) // 2
        if holds(values[middle]):
            high = middle
        else:
            low = middle
    return values[high]


def exceptions(values: Sequence[float], found: float | None, outcomes: Mapping[float, bool]) -> list[float]:
    """The tried values after `found` at which the condition does not hold. Empty for a monotone condition.

    Args:
        values: In the order of the search.
        outcomes: The tried values and whether the condition held.
    """
    if found is None:
        return []
    return [value for value in values[values.index(found) :] if outcomes.get(value) is False]
