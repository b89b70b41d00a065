"""The contract of an attack, and what every attack gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sd_unlearn.data.concept import Concept
from sd_unlearn.data.encoding import encode_captions
from sd_unlearn.models.base import Base
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.kinds import KINDS
from sd_unlearn.models.sampling import Sampler
from sd_unlearn.seeds import EVALUATE_SEEDS, image_seed
from sd_unlearn.training.previews import ImageGenerator

MAX_SEED = 2**63


@dataclass(frozen=True)
class Samples:
    """The attacker's images as the network takes them. Latents are sampled from them, as in training."""

    captions: Sequence[str]
    mean: Tensor  # [N, C, H/8, W/8], of the VAE's posterior, scaled
    std: Tensor  # as mean

    @staticmethod
    def none() -> Samples:
        """No images, for an attack that uses none."""
        return Samples([], torch.empty(0), torch.empty(0))

    def first(self, count: int) -> Samples:
        return Samples(self.captions[:count], self.mean[:count], self.std[:count])

    def latents(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Latents [len(rows), C, H/8, W/8] of the images with these indices, on the CPU."""
        noise = torch.randn((len(rows), *self.mean.shape[1:]), generator=generator)
        return self.mean[rows] + self.std[rows] * noise


@dataclass(frozen=True)
class Target:
    """The attacked model and what the attacker has. `base` has the LoRA applied, unless `Attack.applies_lora`."""

    base: Base
    concept: Concept
    sampler: Sampler
    seed: int
    positives: Samples  # the attacker's images of the concept
    unrelated: Samples  # images of other prompts
    applied: Callable[[float], AbstractContextManager[Any]]  # applies the LoRA at a strength; nothing for the base

    @property
    def denoiser(self) -> Denoiser:
        """The attacked network. Timesteps of flow matching are those of the resolution that images are sampled at."""
        return Denoiser(self.base.network, self.base.process(self.sampler.resolution), self.base.conditioning)

    def generator(self, attack: str, restart: int) -> torch.Generator:
        """The random numbers of one restart of an attack, on the CPU."""
        text = f"{attack} {self.concept.caption}"
        return torch.Generator().manual_seed(image_seed((0, MAX_SEED), self.seed, text, restart))

    def seeds(self, count: int, prompt: str | None = None) -> list[int]:
        """Seeds of the judged images: those with which `evaluate` generates images of the prompt (the caption)."""
        text = self.concept.caption if prompt is None else prompt
        return [image_seed(EVALUATE_SEEDS, self.seed, text, index) for index in range(count)]

    def generate(self, text: Tensor, seeds: Sequence[int], **options: Any) -> list[Image.Image]:
        """One image per seed from text embeddings [1 or N, rows, width], as models/conditioning packs them.

        options: further arguments of the pipeline, of up to `sampler.batch_size` images at once.
        """
        rows = text.detach().expand(len(seeds), -1, -1).float().cpu()
        empty = encode_captions(self.base, [""])[0].cpu()

        def embed(captions: Sequence[str]) -> Tensor:
            return torch.stack([rows[int(number)] if number else empty for number in captions])

        generator = ImageGenerator(self.base, self.sampler, embed, self.base.network)
        return generator.generate([str(number) for number in range(len(seeds))], seeds, **options)


@dataclass(frozen=True)
class Outcome:
    """Images of the attacked model. The attack succeeds in a trial if any of the trial's images shows the concept."""

    images: Sequence[Image.Image]
    step: int  # how much of the budget was spent
    trials: Sequence[int] | None = None  # the trial of each image; None: each image is one
    found: str = ""  # what the attack found, in words, e.g. a prompt


def any_base(_base: Mapping[str, Any]) -> str:
    """Of an attack that works on every base."""
    return ""


def needs_ddim(base: Mapping[str, Any]) -> str:
    """Of an attack that changes DDIM's steps."""
    return f"a base of kind {base['kind']} is not sampled with DDIM" if KINDS[base["kind"]].is_flow else ""


def needs_one_vocabulary(base: Mapping[str, Any]) -> str:
    """Of an attack that chooses tokens, which all text encoders must know, and places them as CLIP's tokenizer does."""
    reading = KINDS[base["kind"]].reading
    if reading == "chat":
        return "its text encoder is a language model that reads captions in a chat template"
    has_t5 = reading == "t5" and not base.get("drop_t5")
    return "CLIP and T5 do not have the same tokens (SD 3 works with --drop_t5)" if has_t5 else ""


def no_images(_settings: Any) -> int:
    """Of an attack that uses none of the attacker's images."""
    return 0


@dataclass(frozen=True)
class Attack:
    """An attack and its budgets."""

    name: str
    title: str  # for the report, e.g. "Learned token"
    source: str  # the paper
    access: str  # what the attacker must have
    budgets: Mapping[str, Any]  # quick, standard, full -> a frozen dataclass with `restarts` and `images`
    run: Callable[[Target, Any, int], Iterator[Outcome]]  # target, settings, number of the restart; restores the base
    applies_lora: bool = False  # the attack itself applies the LoRA, with Target.applied
    positives: Callable[[Any], int] = no_images  # how many images of the concept it uses
    unrelated: Callable[[Any], int] = no_images  # how many images of other prompts it uses
    unsupported: Callable[[Mapping[str, Any]], str] = any_base  # why it does not work on a base (its record); else ""
