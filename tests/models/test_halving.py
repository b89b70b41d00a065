"""Batches that are halved when memory runs out."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import pytest
import torch

from sd_unlearn.errors import OutOfMemory
from sd_unlearn.models.halving import HalvingBatches, smaller

Work = Callable[[Sequence[int]], list[int]]


def at_most(count: int, seen: list[list[int]]) -> Work:
    """Squares of at most `count` numbers at once; records the batches that fitted."""

    def work(batch: Sequence[int]) -> list[int]:
        if len(batch) > count:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        seen.append(list(batch))
        return [number**2 for number in batch]

    return work


def test_each_smaller_size_divides_the_larger_one() -> None:
    assert [smaller(size) for size in (100, 50, 25, 9, 7, 4, 2)] == [50, 25, 5, 3, 1, 2, 1]


@pytest.mark.parametrize(("size", "most", "fitting"), [(8, 8, 8), (8, 7, 4), (8, 3, 2), (8, 1, 1), (9, 4, 3)])
def test_the_batches_are_those_of_the_smaller_size_from_the_start(size: int, most: int, fitting: int) -> None:
    seen: list[list[int]] = []
    halved = [n for part in HalvingBatches("testing").map(at_most(most, seen), range(21), size) for n in part]
    expected: list[list[int]] = []
    list(HalvingBatches("testing").map(at_most(21, expected), range(21), fitting))
    assert halved == [number**2 for number in range(21)]
    assert seen == expected


def test_the_size_is_remembered_and_said_once_per_halving(capsys: pytest.CaptureFixture[str]) -> None:
    batches, seen = HalvingBatches("generating images"), []
    for _ in range(2):
        list(batches.map(at_most(3, seen), range(8), 8))
    assert [len(batch) for batch in seen] == [2] * 8
    assert capsys.readouterr().err.splitlines() == [
        "Out of memory while generating images, 8 at once: continuing with 4 at once.",
        "Out of memory while generating images, 4 at once: continuing with 2 at once.",
    ]
    list(batches.map(at_most(3, seen), range(9), 9))  # another size: still at most what fitted
    assert len(seen[-1]) == 1


def test_a_last_batch_that_is_not_full_is_halved_too() -> None:
    seen: list[list[int]] = []
    list(HalvingBatches("testing").map(at_most(2, seen), range(3), 8))
    assert seen == [[0, 1], [2]]


def test_one_item_that_does_not_fit_is_an_error_that_says_what_to_try() -> None:
    done: list[list[int]] = []
    with pytest.raises(OutOfMemory, match=r"while testing, even one at a time \(CUDA out of memory.*\)\. Buy more\.$"):
        done += HalvingBatches("testing", "Buy more.").map(at_most(0, []), range(2), 2)
    assert done == []


def test_the_last_resort_is_tried_as_long_as_it_helps() -> None:
    room, seen = [0], []

    def work(batch: Sequence[int]) -> int:
        if room[0] < 2:
            raise MemoryError
        seen.extend(batch)
        return len(batch)

    def more() -> bool:
        room[0] += 1
        return True

    assert list(HalvingBatches("testing").map(work, range(2), 1, more)) == [1, 1]
    assert (room, seen) == ([2], [0, 1])


def test_other_errors_are_not_swallowed() -> None:
    def work(batch: Sequence[int]) -> int:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        list(HalvingBatches("testing").map(work, range(2), 2))


def test_tensors_of_the_failed_work_are_freed_before_it_is_repeated() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def work(batch: Sequence[int]) -> bool:
        alive = any(reference() is not None for reference in held)
        large = torch.ones(len(batch))
        held.append(weakref.ref(large))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return alive

    assert list(HalvingBatches("testing").map(work, range(4), 4)) == [False] * 4
