"""The batches of a training several times over, so that the frozen base's predictions for them can be reused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch

from sd_unlearn.data.batch import Batch
from sd_unlearn.data.batches import StratifiedBatches
from sd_unlearn.data.turns import InTurn

REPEATED_STEPS = 20  # of a block


class RepeatedBatches:
    """Blocks of `size` batches, each block `times` times: the same images, noise and timesteps under the same captions.

    A repeated batch is sampled again from the sampler's state, because its caption embeddings would take much memory.
    Each row of a block has a number below `Batch.bank_size`, `Batch.bank_rows`, under which predictions for it can be
    stored.

    identity: what else determines the batches and what is stored for them.
    """

    def __init__(
        self, batches: StratifiedBatches | InTurn, size: int, times: int, identity: Mapping[str, Any] | None = None
    ) -> None:
        self.batches, self.size, self.times = batches, size, times
        self.block = {"size": size, "times": times, **(identity or {})}
        self.position = 0  # in the block
        self.states: list[dict[str, Any]] = []  # of the sampler before each batch of the block so far
        self.seen: set[int] = set()  # batches of the block that this process has sampled

    @property
    def images_per_step(self) -> int:
        """Over all processes."""
        return self.batches.images_per_step

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self._next()

    def _next(self) -> Batch:
        if self.position >= self.size * self.times:
            self._start_block()
        visit, number = divmod(self.position, self.size)
        batch = self._sample() if self.position < self.size else self._sample_again(number)
        self.position += 1
        count = len(batch.label)  # the same in every batch of a process
        rows = torch.arange(number * count, (number + 1) * count)
        seen = number in self.seen
        batch = replace(batch, bank_rows=rows, bank_size=self.size * count, is_repeated=seen, visit=visit)
        self.seen.add(number)
        return batch

    def _start_block(self) -> None:
        self.position, self.states, self.seen = 0, [], set()

    def _sample(self) -> Batch:
        self.states.append(self.batches.state_dict())
        return next(iter(self.batches))

    def _sample_again(self, number: int) -> Batch:
        latest = self.batches.state_dict()
        self.batches.load_state_dict(self.states[number])
        batch = next(iter(self.batches))
        self.batches.load_state_dict(latest)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the block started, the position in it, and what determines it."""
        start = self.states[0] if self.states else self.batches.state_dict()
        return {"start": start, "position": self.position, "block": self.block}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next batch becomes the one that would have followed. Stored predictions are not part of the state.

        If something else determines the blocks (--force_resume), or the state is of a sampler without blocks, a new
        block starts.
        """
        self.batches.load_state_dict(state)
        self.position, self.states, self.seen = state.get("position", 0), [], set()
        for _ in range(min(self.position, self.size)):
            self._sample()
        if state.get("block") != self.block:
            self._start_block()


class Steps(Protocol):
    """Endless batches, one for each step, that a resumed training continues exactly."""

    @property
    def images_per_step(self) -> int:
        """Over all processes."""

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
