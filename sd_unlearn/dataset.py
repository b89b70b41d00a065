"""Folders -> records -> cached latents -> stratified batches (k unlabeled and m positive images in every one)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd_unlearn.base import Base
from sd_unlearn.concept import Concept
from sd_unlearn.config import CaptionMode
from sd_unlearn.diffusion import sample_timesteps
from sd_unlearn.errors import UsageError
from sd_unlearn.records import IMAGE_SUFFIXES, METADATA, POSITIVE, UNLABELED, read_jsonl_lines

PLAIN = -1  # the `bracket` of an example that belongs to no caption's bracket
CACHE_DIR = "cache"


@dataclass(frozen=True)
class Example:
    """One training image; group is that of its metadata, `generic` or `positive` for own photos."""

    path: Path
    caption: str
    group: str

    @property
    def is_positive(self) -> bool:
        return self.group == "positive"


@dataclass(frozen=True)
class Batch:
    """What a training step sees. Examples with the same slot share timestep and noise."""

    latents: Tensor  # [B, 4, H/8, W/8], scaled
    text: Tensor  # [B, tokens, width]
    is_positive: Tensor  # [B] bool
    bracket: Tensor  # [B] long, index of the caption's bracket, PLAIN for keep images
    captions: int  # how many brackets
    timesteps: Tensor  # [B] long
    noise: Tensor  # as latents


def scan(folder: Path, concept: Concept) -> list[Example]:
    """All images of both folders with their captions; each image is opened, so a bad one is named early.

    Raises:
        UsageError: a missing or nearly empty folder, an unreadable image, a metadata line without text or without file.
    """
    examples = []
    for sub, group, caption in ((UNLABELED, "generic", concept.generic), (POSITIVE, "positive", concept.caption)):
        place = folder / sub
        images = sorted(p for p in place.glob("*") if p.suffix.lower() in IMAGE_SUFFIXES) if place.is_dir() else []
        if len(images) < 2:
            raise UsageError(
                f"--data_dir {folder}: {place} holds {len(images)} images; at least 2 are needed, 20 work better."
            )
        texts = _captions(place)
        for path in images:
            _check_image(path)
            text, found = texts.get(path.name, (caption, group))
            if sub == POSITIVE or found == "positive":
                found = group  # the folder decides who is positive, whatever a copied metadata line says
            examples.append(Example(path, text, found))
    if not any(e.group in ("generic", "mixed_in") for e in examples):
        raise UsageError(f"--data_dir {folder}: {UNLABELED} holds only keep images; add images of {concept.generic!r}.")
    return examples


def _captions(place: Path) -> dict[str, tuple[str, str]]:
    """File name -> (caption, group) of a folder's metadata.jsonl; empty when there is none."""
    path = place / METADATA
    captions = {}
    for number, line in _metadata(path).items():
        name, text = line.get("file_name"), line.get("text")
        if not isinstance(name, str) or not isinstance(text, str):
            raise UsageError(f'--data_dir: {path} line {number} lacks "file_name" or "text", the caption. Add it.')
        if not (place / name).is_file():
            raise UsageError(
                f"--data_dir: {path} line {number} names {name}, which is missing. Restore it or delete it."
            )
        captions[name] = (text, str(line.get("group", "generic")))
    return captions


def _metadata(path: Path) -> dict[int, dict[str, Any]]:
    try:
        return read_jsonl_lines(path) if path.is_file() else {}
    except UsageError as error:
        raise UsageError(f"--data_dir: {error}") from None


def _check_image(path: Path) -> None:
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        size = path.stat().st_size
        why = "it is empty (0 bytes)" if size == 0 else str(error)
        raise UsageError(f"--data_dir: {path} cannot be read as an image: {why}. Replace or delete it.") from None


def load_pixels(path: Path, resolution: int) -> Tensor:
    """An image, turned upright, scaled and centre-cropped to a square: [3, resolution, resolution] in [-1, 1]."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    square = ImageOps.fit(upright, (resolution, resolution), Image.Resampling.LANCZOS)
    data = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return data.view(resolution, resolution, 3).permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def encode_images(base: Base, examples: Sequence[Example], resolution: int, cache: Path) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation of every image, [N, 4, H/8, W/8] scaled, on CPU; cached by content.

    Both are kept so that training goes on sampling latents as the VAE's posterior has them.
    """
    digest = hashlib.sha256(f"{base.sha256} {resolution}".encode())
    for example in examples:
        digest.update(example.path.read_bytes())
    path = cache / f"latents-{digest.hexdigest()[:16]}.safetensors"
    if path.is_file():
        found = load_file(path)
        return found["mean"], found["std"]
    vae, means, stds = base.pipeline.vae, [], []
    size = 64 if resolution <= 64 else 4
    for chunk in (examples[i : i + size] for i in range(0, len(examples), size)):
        pixels = torch.stack([load_pixels(e.path, resolution) for e in chunk]).to(base.device, vae.dtype)
        posterior = vae.encode(pixels).latent_dist
        means.append(posterior.mean.float().cpu() * vae.config.scaling_factor)
        stds.append(posterior.std.float().cpu() * vae.config.scaling_factor)
    mean, std = torch.cat(means), torch.cat(stds)
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({"mean": mean, "std": std}, temporary)
    temporary.replace(path)
    return mean, std


@torch.no_grad()
def encode_captions(base: Base, captions: Sequence[str]) -> Tensor:
    """Text embeddings [len(captions), tokens, width], as the pipeline makes them: padded, without attention mask."""
    tokenizer, encoder = base.pipeline.tokenizer, base.pipeline.text_encoder
    ids = tokenizer(list(captions), padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                    return_tensors="pt").input_ids  # fmt: skip
    return encoder(ids.to(base.device))[0].float()


class Cycle:
    """Endless indices of a pool, without replacement within an epoch, each process its own share of every epoch."""

    def __init__(self, size: int, seed: int, rank: int, world: int) -> None:
        self.size, self.rank, self.world = size, rank, world
        self.generator = torch.Generator().manual_seed(seed)  # the same on every process: they cut one permutation
        self.left: list[int] = []

    def take(self, count: int) -> list[int]:
        while len(self.left) < count:
            order = torch.randperm(self.size, generator=self.generator).tolist()
            usable = order * self.world if self.size < self.world else order[: self.size - self.size % self.world]
            self.left += usable[self.rank :: self.world]
        taken, self.left = self.left[:count], self.left[count:]
        return taken


@dataclass(frozen=True)
class Layout:
    """How many images of each kind a batch holds, per bracket and of keep images."""

    positive: int
    unlabeled: int
    keep: int

    @classmethod
    def of(cls, batch_size: int, brackets: int, has_keep: bool) -> Layout:
        """Of a batch a quarter positives and 35 % unlabeled, shared out over the brackets, the rest keep images.

        Without keep images the rest is unlabeled. Every bracket has at least one positive and one unlabeled image.
        """
        positive = max(1, int(0.25 * batch_size / brackets))
        unlabeled = max(1, int(0.35 * batch_size / brackets) if has_keep else batch_size // brackets - positive)
        return cls(positive, unlabeled, max(0, batch_size - brackets * (positive + unlabeled)) if has_keep else 0)


class StratifiedBatches:
    """Endless training batches with the same number of positives and unlabeled images in every bracket.

    caption_mode own: one bracket, every image under its own caption; shared: one, all under the generic caption;
    both: one under the generic and one under the concept's caption, positives and generic images seen under either.
    """

    def __init__(
        self, examples: Sequence[Example], latents: tuple[Tensor, Tensor], captions: dict[str, Tensor],
        concept: Concept,
        mode: CaptionMode, batch_size: int, num_train_timesteps: int, seed: int, rank: int = 0, world: int = 1,
        device: torch.device | str = "cpu", teacher_keep: bool = False,
    ) -> None:  # fmt: skip
        self.teacher_keep = teacher_keep
        self.examples, (self.mean, self.std), self.embeddings = examples, latents, captions
        brackets: dict[str, list[str | None]] = {
            "own": [None],
            "shared": [concept.generic],
            "both": [concept.generic, concept.caption],
        }
        self.brackets = brackets[mode]
        self.pools = {
            "positive": [i for i, e in enumerate(examples) if e.is_positive],
            "unlabeled": [i for i, e in enumerate(examples) if not e.is_positive and e.group != "keep"],
            "keep": [i for i, e in enumerate(examples) if e.group == "keep"],
            "any": list(range(len(examples))),
        }
        self.layout = Layout.of(batch_size, len(self.brackets), bool(self.pools["keep"]) or teacher_keep)
        self.num_train_timesteps, self.device = num_train_timesteps, device
        self.generator = torch.Generator().manual_seed(seed + rank)
        self.cycles = {
            (pool, bracket): Cycle(len(members), seed + 7919 * index + 101 * bracket, rank, world)
            for index, (pool, members) in enumerate(self.pools.items())
            for bracket in range(len(self.brackets) if pool in ("positive", "unlabeled") else 1)
            if members
        }

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self._next()

    def _next(self) -> Batch:
        rows: list[tuple[int, str, int, int]] = []  # (example, caption, bracket, slot)
        slots = 0
        for index, caption in enumerate(self.brackets):
            for pool, count in (("unlabeled", self.layout.unlabeled), ("positive", self.layout.positive)):
                # Positives reuse the unlabeled images' timesteps and noise: most of the noise of the bracket cancels.
                for slot, i in enumerate(self._draw(pool, index, count), slots):
                    rows.append((i, caption or self.examples[i].caption, index, slot))
            slots += max(self.layout.unlabeled, self.layout.positive)
        for slot, (i, caption) in enumerate(self._keep_rows(), slots):
            rows.append((i, caption, PLAIN, slot))
        slots += self.layout.keep
        return self._collate(rows, slots)

    def _keep_rows(self) -> list[tuple[int, str]]:
        """(example, caption) of the keep images; with a teacher also pictures and captions that were never a pair.

        A teacher knows what any picture should become under any caption. So a quarter of the rows show any picture
        under a keep caption (the way there starts from noise that looks like something else), and a quarter under the
        empty caption: guidance subtracts the unconditional prediction, and when that moves every prompt moves.
        """
        if not self.teacher_keep:
            return [(i, self.examples[i].caption) for i in self._draw("keep", 0, self.layout.keep)]
        unconditional = self.layout.keep // 4 if self.pools["keep"] else self.layout.keep
        own = self._draw("keep", 0, self.layout.keep - unconditional)
        mixed = self._draw("any", 0, len(own) // 3)
        rows = [(i, self.examples[k].caption) for i, k in zip([*mixed, *own[len(mixed) :]], own, strict=True)]
        return rows + [(i, "") for i in self._draw("any", 0, unconditional)]

    def _draw(self, pool: str, bracket: int, count: int) -> list[int]:
        return [self.pools[pool][i] for i in self.cycles[pool, bracket].take(count)] if count else []

    def _collate(self, rows: list[tuple[int, str, int, int]], slots: int) -> Batch:
        index = torch.tensor([row[0] for row in rows])
        slot = torch.tensor([row[3] for row in rows])
        mean, std = self.mean[index], self.std[index]
        latents = mean + std * torch.randn(mean.shape, generator=self.generator)
        noise = torch.randn((slots, *mean.shape[1:]), generator=self.generator)[slot]
        timesteps = sample_timesteps(slots, self.num_train_timesteps, self.generator)[slot]
        return Batch(
            latents.to(self.device), torch.stack([self.embeddings[row[1]] for row in rows]).to(self.device),
            torch.tensor([self.examples[i].is_positive for i in index.tolist()], device=self.device),
            torch.tensor([row[2] for row in rows], device=self.device), len(self.brackets),
            timesteps.to(self.device), noise.to(self.device),
        )  # fmt: skip
