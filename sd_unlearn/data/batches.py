"""Cached latents -> the stratified batches of a step: images of every kind in every caption group.

The whole batch of a step is sampled identically in every process and then divided among the processes. The objective
is therefore the same however many there are, and resuming needs the state of one sampler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sd_unlearn.data.batch import NO_GROUP, Batch
from sd_unlearn.data.dataset import UNUSED, Example, members_of_sets
from sd_unlearn.data.layout import GroupCaption, Layout
from sd_unlearn.models.diffusion import Process, sample_positions
from sd_unlearn.risk import NORMAL, UNLABELED


@dataclass(frozen=True)
class EncodedImages:
    """Training images as the network takes them."""

    examples: Sequence[Example]
    mean: Tensor  # [N, C, H/8, W/8], of the VAE's posterior, scaled; of a DDPM the images, [N, C, H, W] in [-1, 1]
    std: Tensor  # as mean; zeros for a DDPM
    text: dict[str, Tensor]  # caption -> what Denoiser.predict takes: embeddings, token ids or a class number

    def subset(self, indices: list[int]) -> EncodedImages:
        return replace(
            self, examples=[self.examples[i] for i in indices], mean=self.mean[indices], std=self.std[indices]
        )


@dataclass(frozen=True)
class NoiseSampling:
    """How timesteps and noise are sampled."""

    process: Process  # its timesteps
    timestep_bias: float = 0.0  # of images in caption groups; the timesteps of keep images are uniform
    share_timesteps: bool = True  # positives get timesteps and noise of unlabeled images: a less noisy bracket sign


@dataclass(frozen=True)
class Sharding:
    """Which share of a step's batch this process gets."""

    rank: int = 0
    processes: int = 1


class Cycle:
    """Endless indices of a pool, without replacement within an epoch."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.generator = size, torch.Generator().manual_seed(seed)
        self.left: list[int] = []

    def take(self, count: int) -> list[int]:
        while len(self.left) < count:
            self.left += torch.randperm(self.size, generator=self.generator).tolist()
        taken, self.left = self.left[:count], self.left[count:]
        return taken


@dataclass(frozen=True)
class BatchRow:
    """One example of a step's batch."""

    example: int
    caption: str
    caption_group: int
    slot: int  # rows with the same slot share timestep and noise, and are in the same process
    kind_size: int  # images of its kind in the whole batch


def sampler_state(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a sampler without that of RobustSteps and RepeatedBatches, which --force_resume may remove."""
    state = state.get("steps", state)
    return state.get("start", state)


class StratifiedBatches:
    """Endless steps, each this process's share of its images, on the CPU.

    groups: the caption of each caption group, see `caption_groups`. layout: the counts of a whole step, over all
    processes. There may be no positives and no keep images. With few images a process may lack some kinds.

    unconditional: None without a teacher, when keep images are seen under their own captions. With a teacher, the
    share of keep rows under the empty caption; see `_keep_rows`.
    """

    def __init__(
        self,
        images: EncodedImages,
        groups: Sequence[GroupCaption],
        layout: Layout,
        sampling: NoiseSampling,
        seed: int,
        *,
        unconditional: float | None = None,
        sharding: Sharding = Sharding(),
    ) -> None:
        self.images, self.examples, self.caption_groups, self.layout = images, images.examples, groups, layout
        self.sampling, self.unconditional, self.sharding = sampling, unconditional, sharding
        sets = members_of_sets(self.examples)
        self.positives = ["positive", *(f"positive {k}" for k in range(1, len(sets)))][: len(sets)]
        others = ("positive", "negative", "keep", UNUSED)
        self.pools = {  # their order determines the seeds of their cycles
            "positive": sets.get(0, []),
            "unlabeled": [i for i, e in enumerate(self.examples) if e.group not in others],
            "keep": [i for i, e in enumerate(self.examples) if e.group == "keep"],
            "any": list(range(len(self.examples))),
            "negative": [i for i, e in enumerate(self.examples) if e.is_negative],
            **{name: sets[k] for k, name in enumerate(self.positives) if k},
        }
        self.generator = torch.Generator().manual_seed(seed)
        self.cycles = {
            (pool, group): Cycle(len(members), seed + 7919 * index + 101 * group)
            for index, (pool, members) in enumerate(self.pools.items())
            for group in range(1 if pool in ("keep", "any") else len(groups))
            if members
        } | {
            ("caption", group): Cycle(len(captions), seed + 104_729 * (group + 1))
            for group, captions in enumerate(groups)
            if isinstance(captions, tuple)
        }

    @property
    def images_per_step(self) -> int:
        """Over all processes."""
        return self.layout.total(len(self.caption_groups))

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self._next()

    def state_dict(self) -> dict[str, Any]:
        """The sampler's state; load_state_dict makes the next step the one that would have followed."""
        cycles = {key: (list(cycle.left), cycle.generator.get_state()) for key, cycle in self.cycles.items()}
        return {"generator": self.generator.get_state(), "cycles": cycles}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = sampler_state(state)
        if "generator" not in state:
            return  # of several concepts, with --force_resume
        self.generator.set_state(state["generator"])
        for key, (left, generator) in state["cycles"].items():
            if cycle := self.cycles.get(key):  # with --force_resume there may be fewer images and captions
                cycle.left = [i for i in left if i < cycle.size]
                cycle.generator.set_state(generator)

    def _next(self) -> Batch:
        rows: list[BatchRow] = []
        slots = 0
        for group in range(len(self.caption_groups)):
            start, caption = slots, self._caption(group)
            counts = {"unlabeled": self.layout.unlabeled} | dict.fromkeys(self.positives, self.layout.positive)
            for pool, count in (counts | {"negative": self.layout.negative}).items():
                first = start if self.sampling.share_timesteps and pool in self.positives else slots
                for order, i in enumerate(self._take(pool, group, count)):
                    rows.append(BatchRow(i, caption or self.examples[i].caption, group, first + order, count))
                slots = max(slots, first + count)
        keep = self._keep_rows()
        rows += [BatchRow(i, caption, NO_GROUP, slots + n, len(keep)) for n, (i, caption) in enumerate(keep)]
        timesteps = [self._timesteps(slots, self.sampling.timestep_bias), self._timesteps(len(keep), 0.0)]
        return self._collate(rows, torch.cat(timesteps))

    def _keep_rows(self) -> list[tuple[int, str]]:
        """(example, caption) of the keep rows. With a teacher, also pairs of images and captions that do not match.

        A teacher knows the prediction for any image under any caption. So a third of the captioned rows use any image
        (sampling a prompt starts from noise that resembles other images), and the share `unconditional` of all rows
        uses any image under the empty caption, which classifier-free guidance subtracts from every prompt.
        """
        if self.unconditional is None:
            return [(i, self.examples[i].caption) for i in self._take("keep", 0, self.layout.keep)]
        unconditional = int(self.layout.keep * self.unconditional) if self.pools["keep"] else self.layout.keep
        own = self._take("keep", 0, self.layout.keep - unconditional)
        mixed = self._take("any", 0, len(own) // 3)
        rows = [(i, self.examples[k].caption) for i, k in zip([*mixed, *own[len(mixed) :]], own, strict=True)]
        return rows + [(i, "") for i in self._take("any", 0, unconditional)]

    def _caption(self, group: int) -> str | None:
        """The caption of a group in the next step."""
        caption = self.caption_groups[group]
        return caption[self.cycles["caption", group].take(1)[0]] if isinstance(caption, tuple) else caption

    def _take(self, pool: str, group: int, count: int) -> list[int]:
        return [self.pools[pool][i] for i in self.cycles[pool, group].take(count)] if count else []

    def _timesteps(self, count: int, bias: float) -> Tensor:
        return self.sampling.process.at(sample_positions(count, self.generator, bias))

    def _collate(self, rows: list[BatchRow], timesteps: Tensor) -> Batch:
        index = torch.tensor([row.example for row in rows])
        slot = torch.tensor([row.slot for row in rows])
        mean, std = self.images.mean[index], self.images.std[index]
        latents = mean + std * torch.randn(mean.shape, generator=self.generator)
        noise = torch.randn((len(timesteps), *mean.shape[1:]), generator=self.generator)
        noise, timesteps = noise[slot], timesteps[slot]
        rank, processes = self.sharding.rank, self.sharding.processes
        mine = [n for n, row in enumerate(rows) if row.slot % processes == rank]
        return self._batch([rows[n] for n in mine], latents[mine], noise[mine], timesteps[mine])

    def _batch(self, rows: list[BatchRow], latents: Tensor, noise: Tensor, timesteps: Tensor) -> Batch:
        return Batch(
            latents,
            self._embed([row.caption for row in rows]),
            self._embed([self._teacher_caption(row) for row in rows]),
            torch.tensor([_label(self.examples[row.example]) for row in rows]),
            torch.tensor([row.caption_group for row in rows]),
            len(self.caption_groups),
            timesteps,
            noise,
            torch.tensor([row.caption == "" for row in rows]),
            torch.tensor([self.sharding.processes / row.kind_size for row in rows]),
        )

    def _teacher_caption(self, row: BatchRow) -> str:
        return row.caption if row.caption_group == NO_GROUP else self.examples[row.example].caption

    def _embed(self, captions: list[str]) -> Tensor:
        return torch.stack([self.images.text[caption] for caption in captions])


def _label(example: Example) -> int:
    if example.is_positive:
        return example.positive_set
    return NORMAL if example.is_negative else UNLABELED
