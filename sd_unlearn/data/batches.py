"""Cached latents -> the stratified batches of a step: images of every kind in every bracket.

A step's batch is drawn whole, the same on every process, and then cut into parts, one for each process and
micro-batch. So the objective is the same however it is cut, and a resumed run needs one sampler's state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd_unlearn.choices import CaptionMode
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.dataset import Example, has_negatives, members_of_sets, positive_sets
from sd_unlearn.errors import UsageError
from sd_unlearn.models.diffusion import sample_timesteps
from sd_unlearn.risk import NORMAL, UNLABELED

PLAIN = -1  # the `bracket` of an example that belongs to no caption's bracket


@dataclass(frozen=True)
class Batch:
    """What one forward pass sees: a part of a step's whole batch. Examples with a slot share timestep and noise."""

    latents: Tensor  # [B, 4, H/8, W/8], scaled; of a DDPM the images, [B, C, H, W] in [-1, 1]
    text: Tensor  # [B, tokens, width], or what else Denoiser.predict takes
    teacher_text: Tensor  # as text: the caption each image was drawn from, under which the frozen base predicts
    label: Tensor  # [B] long: the number of a positive's set, from 0; UNLABELED, or NORMAL if known to be
    bracket: Tensor  # [B] long, index of the caption's bracket, PLAIN for keep images
    captions: int  # how many brackets
    timesteps: Tensor  # [B] long
    noise: Tensor  # as latents
    unconditional: Tensor  # [B] bool, seen under the empty caption
    weight: Tensor  # [B]: with it, the mean over parts of sum(weight * l) is the whole batch's mean, of each kind
    held: Tensor | None = None  # see rows_held; given where the device need not be asked
    pushed: Tensor | None = None

    def rows_held(self) -> Tensor:
        """[H] long: keep images under a caption. Those without one have no guidance that could be held."""
        return _held(self.bracket, self.unconditional) if self.held is None else self.held

    def rows_pushed(self) -> Tensor:
        """[P] long: positives in brackets."""
        return _pushed(self.label, self.bracket) if self.pushed is None else self.pushed

    @property
    def is_positive(self) -> Tensor:
        """[B] bool."""
        return self.label >= 0

    def only(self, rows: Tensor) -> Batch:
        """The batch of these rows ([B] bool), their weights as they are."""
        kept: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        kept |= {"held": None, "pushed": None}
        kept |= {name: value[rows] for name, value in kept.items() if isinstance(value, Tensor)}
        return Batch(**kept)


def _held(bracket: Tensor, unconditional: Tensor) -> Tensor:
    return torch.nonzero((bracket == PLAIN) & ~unconditional)[:, 0]


def _pushed(label: Tensor, bracket: Tensor) -> Tensor:
    return torch.nonzero((label >= 0) & (bracket != PLAIN))[:, 0]


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
class Layout:
    """How many images of each kind a step's batch holds, per bracket and of keep images."""

    positive: int  # of each set of positives
    unlabeled: int
    keep: int
    negative: int = 0
    sets: int = 1

    @classmethod
    def of(
        cls, batch_size: int, brackets: int, has_keep: bool, parts: int = 1, sets: int = 1, negatives: bool = False
    ) -> Layout:
        """Of a batch a quarter positives and 35 % unlabeled, shared out over the brackets, the rest keep images.

        Without keep images the rest is unlabeled, without positives their quarter. Sets share the positives out, and
        negatives get half of the unlabeled images' share. Every bracket has at least one image of each kind in each of
        the parts that the batch will be cut into.

        Raises:
            UsageError: a batch too small for that.
        """
        kinds = sets + 1 + negatives
        if batch_size < parts * brackets * kinds:
            raise UsageError(
                f"--train_batch_size {batch_size // parts} is too small: brackets ({brackets}, by --caption_mode) "
                f"times kinds of images in each ({kinds}) are {brackets * kinds}, the least for a micro-batch."
            )
        positive = max(parts, int(0.25 * batch_size / brackets / sets)) if sets else 0
        usual = int((0.35 if sets else 0.6) * batch_size / brackets)
        unlabeled = usual if has_keep else batch_size // brackets - sets * positive
        negative = max(parts, unlabeled // 2) if negatives else 0
        unlabeled = max(parts, unlabeled - negative)
        layout = cls(positive, unlabeled, 0, negative, sets)
        return replace(layout, keep=max(0, batch_size - layout.total(brackets)) if has_keep else 0)

    def total(self, brackets: int) -> int:
        return brackets * (self.sets * self.positive + self.unlabeled + self.negative) + self.keep


def captions_of_brackets(concept: Concept, mode: CaptionMode) -> list[str | None]:
    """The caption of each bracket; None: every image under its own.

    own: one bracket, every image under its own caption; shared: one, all under the generic caption; both: one under the
    generic caption and one under each wording of the concept, positives and generic images seen under all of them.
    """
    brackets: dict[str, list[str | None]] = {
        "own": [None],
        "shared": [concept.generic],
        "both": [concept.generic, *concept.captions],
    }
    return brackets[mode]


def check_batch_size(config: TrainConfig, concept: Concept, folder: Path) -> None:
    """Refuse a batch that cannot hold what every step needs, before anything loads.

    Raises:
        UsageError: naming --train_batch_size and the least that would do.
    """
    brackets, sets = len(captions_of_brackets(concept, config.caption_mode)), len(positive_sets(folder))
    Layout.of(config.train_batch_size, brackets, True, sets=sets, negatives=has_negatives(folder, config.eta))


@dataclass(frozen=True)
class Row:
    """One example of a step's batch: which picture, under which caption, in which bracket, with whose noise."""

    example: int
    caption: str
    bracket: int
    slot: int
    order: int  # its number among its kind: kinds are dealt out to the parts like cards
    kind: int  # how many of its kind the whole batch has


class StratifiedBatches:
    """Endless steps, each a list of this process's micro-batches; mode: see captions_of_brackets.

    There may be no positives and no keep images. batch_size is the whole step's, layout how it is shared out, if not
    as usual. share_timesteps gives positives the timesteps and noise of unlabeled images, which takes most of the noise
    out of the bracket's sign. timestep_bias is for the brackets: what must stay must stay at every timestep.
    unconditional is the share of keep rows without a caption. noise_offset (>= 0) is the deviation of noise that is
    constant over each channel, added to the other.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        latents: tuple[Tensor, Tensor],
        captions: dict[str, Tensor],
        concept: Concept,
        mode: CaptionMode,
        batch_size: int,
        num_train_timesteps: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        micro_batches: int = 1,
        device: torch.device | str = "cpu",
        teacher: bool = False,
        timestep_bias: float = 0.0,
        share_timesteps: bool = True,
        unconditional: float = 0.25,
        noise_offset: float = 0.0,
        layout: Layout | None = None,
    ) -> None:
        self.teacher, self.timestep_bias, self.share_timesteps = teacher, timestep_bias, share_timesteps
        self.unconditional, self.noise_offset = unconditional, noise_offset
        self.examples, (self.mean, self.std), self.embeddings = examples, latents, captions
        self.brackets = captions_of_brackets(concept, mode)
        sets = members_of_sets(examples)
        self.positives = ["positive", *(f"positive {k}" for k in range(1, len(sets)))][: len(sets)]
        outside = ("positive", "negative", "keep")
        self.pools = {  # their order seeds their cycles
            "positive": sets.get(0, []),
            "unlabeled": [i for i, e in enumerate(examples) if e.group not in outside],
            "keep": [i for i, e in enumerate(examples) if e.group == "keep"],
            "any": list(range(len(examples))),
            "negative": [i for i, e in enumerate(examples) if e.is_negative],
            **{name: sets[k] for k, name in enumerate(self.positives) if k},
        }
        self.parts, self.mine = world * micro_batches, [micro * world + rank for micro in range(micro_batches)]
        has_keep = bool(self.pools["keep"]) or teacher
        negatives = bool(self.pools["negative"])
        usual = (batch_size, len(self.brackets), has_keep, self.parts, len(sets), negatives)
        self.layout = layout or Layout.of(*usual)
        self.num_train_timesteps, self.device = num_train_timesteps, device
        self.generator = torch.Generator().manual_seed(seed)
        self.cycles = {
            (pool, bracket): Cycle(len(members), seed + 7919 * index + 101 * bracket)
            for index, (pool, members) in enumerate(self.pools.items())
            for bracket in range(1 if pool in ("keep", "any") else len(self.brackets))
            if members
        }

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            yield self._next()

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler stands; the next step after load_state_dict is the one that would have come."""
        cycles = {key: (cycle.left, cycle.generator.get_state()) for key, cycle in self.cycles.items()}
        return {"generator": self.generator.get_state(), "cycles": cycles}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        for key, (left, generator) in state["cycles"].items():
            if cycle := self.cycles.get(key):  # --force_resume may bring fewer images and captions
                cycle.left = [i for i in left if i < cycle.size]
                cycle.generator.set_state(generator)

    def _next(self) -> list[Batch]:
        rows: list[Row] = []
        slots = 0
        for index, caption in enumerate(self.brackets):
            start = slots
            counts = {"unlabeled": self.layout.unlabeled} | dict.fromkeys(self.positives, self.layout.positive)
            for pool, count in (counts | {"negative": self.layout.negative}).items():
                first = start if self.share_timesteps and pool in self.positives else slots
                for order, i in enumerate(self._draw(pool, index, count)):
                    rows.append(Row(i, caption or self.examples[i].caption, index, first + order, order, count))
                slots = max(slots, first + count)
        kept = self._keep_rows()
        rows += [Row(i, caption, PLAIN, slots + n, n, len(kept)) for n, (i, caption) in enumerate(kept)]
        timesteps = [self._timesteps(slots, self.timestep_bias), self._timesteps(len(kept), 0.0)]
        return self._collate(rows, torch.cat(timesteps))

    def _keep_rows(self) -> list[tuple[int, str]]:
        """(example, caption) of the keep images; with a teacher also pictures and captions that were never a pair.

        A teacher knows what any picture should become under any caption. So a third of the rows with a caption show
        any picture (the way there starts from noise that looks like something else), and the share `unconditional` of
        all rows any picture under the empty caption, which every prompt's guidance subtracts.
        """
        if not self.teacher:
            return [(i, self.examples[i].caption) for i in self._draw("keep", 0, self.layout.keep)]
        unconditional = int(self.layout.keep * self.unconditional) if self.pools["keep"] else self.layout.keep
        own = self._draw("keep", 0, self.layout.keep - unconditional)
        mixed = self._draw("any", 0, len(own) // 3)
        rows = [(i, self.examples[k].caption) for i, k in zip([*mixed, *own[len(mixed) :]], own, strict=True)]
        return rows + [(i, "") for i in self._draw("any", 0, unconditional)]

    def _draw(self, pool: str, bracket: int, count: int) -> list[int]:
        return [self.pools[pool][i] for i in self.cycles[pool, bracket].take(count)] if count else []

    def _timesteps(self, count: int, bias: float) -> Tensor:
        return sample_timesteps(count, self.num_train_timesteps, self.generator, bias)

    def _collate(self, rows: list[Row], timesteps: Tensor) -> list[Batch]:
        index = torch.tensor([row.example for row in rows])
        slot = torch.tensor([row.slot for row in rows])
        mean, std = self.mean[index], self.std[index]
        latents = mean + std * torch.randn(mean.shape, generator=self.generator)
        noise = torch.randn((len(timesteps), *mean.shape[1:]), generator=self.generator)
        if self.noise_offset > 0:  # no draw without it: a run's noise is then what it is without the option
            noise += self.noise_offset * torch.randn((*noise.shape[:2], 1, 1), generator=self.generator)
        noise, timesteps = noise[slot], timesteps[slot]
        batches = []
        for part in self.mine:
            here = [n for n, row in enumerate(rows) if row.order % self.parts == part]
            batches.append(self._batch([rows[n] for n in here], latents[here], noise[here], timesteps[here]))
        return batches

    def _batch(self, rows: list[Row], latents: Tensor, noise: Tensor, timesteps: Tensor) -> Batch:
        examples = [self.examples[row.example] for row in rows]
        taught = [row.caption if row.bracket == PLAIN else e.caption for row, e in zip(rows, examples, strict=True)]
        label, bracket = torch.tensor([_label(e) for e in examples]), torch.tensor([row.bracket for row in rows])
        unconditional = torch.tensor([row.caption == "" for row in rows])
        return Batch(
            self._send(latents),
            self._embed([row.caption for row in rows]),
            self._embed(taught),
            self._send(label),
            self._send(bracket),
            len(self.brackets),
            self._send(timesteps),
            self._send(noise),
            self._send(unconditional),
            self._send(torch.tensor([self.parts / row.kind for row in rows])),
            self._send(_held(bracket, unconditional)),
            self._send(_pushed(label, bracket)),
        )

    def _embed(self, captions: list[str]) -> Tensor:
        return self._send(torch.stack([self.embeddings[caption] for caption in captions]))

    def _send(self, tensor: Tensor) -> Tensor:
        """To the device without waiting for it, which takes pinned memory."""
        on_gpu = torch.device(self.device).type == "cuda"
        return tensor.pin_memory().to(self.device, non_blocking=True) if on_gpu else tensor.to(self.device)


def _label(example: Example) -> int:
    if example.is_positive:
        return example.positive_set
    return NORMAL if example.is_negative else UNLABELED
