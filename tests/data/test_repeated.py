"""Blocks of batches that are repeated."""

from __future__ import annotations

import dataclasses
from itertools import islice

import pytest
import torch
from data.test_batches import make_batches

from sd_unlearn.data.batch import Batch
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.repeated import RepeatedBatches

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE, TIMES = 3, 2


def make(concept: Concept, times: int = TIMES, **identity: object) -> RepeatedBatches:
    return RepeatedBatches(make_batches(concept, "both", teacher=True), SIZE, times, identity)


def same(one: Batch, other: Batch) -> bool:
    """Whether two batches have equal rows."""
    names = [f.name for f in dataclasses.fields(Batch) if isinstance(getattr(one, f.name), torch.Tensor)]
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def test_each_block_is_repeated_and_the_blocks_follow_each_other(concept: Concept) -> None:
    plain = list(islice(make_batches(concept, "both", teacher=True), 2 * SIZE))
    got = list(islice(make(concept), 2 * SIZE * TIMES))
    first, second = plain[:SIZE], plain[SIZE:]
    for batch, expected in zip(got, [*first, *first, *second, *second], strict=True):
        assert same(dataclasses.replace(expected, bank_rows=batch.bank_rows), batch)
    assert [batch.visit for batch in got] == [n // SIZE % TIMES for n in range(len(got))]
    assert [batch.is_repeated for batch in got] == [n % (SIZE * TIMES) >= SIZE for n in range(len(got))]


def test_the_rows_of_a_block_have_numbers_of_their_own(concept: Concept) -> None:
    batches = make(concept)
    got = list(islice(batches, SIZE * TIMES))
    numbers = torch.cat([batch.bank_rows for batch in got[:SIZE] if batch.bank_rows is not None])
    assert sorted(numbers.tolist()) == list(range(got[0].bank_size))
    assert all(torch.equal(a.bank_rows, b.bank_rows) for a, b in zip(got[:SIZE], got[SIZE:], strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("done", range(2 * SIZE * TIMES + 1))
def test_resuming_anywhere_continues_with_the_same_batches(concept: Concept, done: int) -> None:
    whole = list(islice(make(concept), done + SIZE * TIMES))
    stopped, resumed = make(concept), make(concept)
    list(islice(stopped, done))
    resumed.load_state_dict(stopped.state_dict())
    assert all(same(a, b) for a, b in zip(whole[done:], islice(resumed, SIZE * TIMES), strict=True))


def test_after_resuming_nothing_is_stored_yet(concept: Concept) -> None:
    stopped, resumed = make(concept), make(concept)
    list(islice(stopped, SIZE + 1))
    resumed.load_state_dict(stopped.state_dict())
    assert [batch.is_repeated for batch in islice(resumed, SIZE - 1)] == [False] * (SIZE - 1)


@pytest.mark.parametrize(("times", "identity"), [(2, {}), (5, {}), (3, {"images": 8})])
def test_other_blocks_start_anew_where_the_sampler_is(
    concept: Concept, times: int, identity: dict[str, object]
) -> None:
    """As with --force_resume and another --teacher_reuse (also one that the position exceeds) or other options."""
    stopped, resumed = make(concept, times=3), make(concept, times, **identity)
    list(islice(stopped, 3 * SIZE - 1))
    resumed.load_state_dict(stopped.state_dict())
    plain = list(islice(make_batches(concept, "both", teacher=True), 3 * SIZE))
    got = list(islice(resumed, SIZE * times + SIZE))
    for batch, expected in zip(got, [*plain[SIZE : 2 * SIZE] * times, *plain[2 * SIZE :]], strict=True):
        assert same(dataclasses.replace(expected, bank_rows=batch.bank_rows), batch)
    assert [batch.visit for batch in got] == [n // SIZE % times for n in range(len(got))]


def test_a_sampler_continues_with_and_without_blocks(concept: Concept) -> None:
    plain, blocks = make_batches(concept, "both", teacher=True), make(concept)
    list(islice(plain, 2))
    blocks.load_state_dict(plain.state_dict())
    assert torch.equal(next(iter(plain)).noise, next(iter(blocks)).noise)
    plain.load_state_dict(blocks.state_dict())
    assert plain.state_dict()["generator"].equal(blocks.state_dict()["start"]["generator"])
