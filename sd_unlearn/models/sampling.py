"""Prompts -> images of a base: seeded per image, resumable, sharded over processes."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from sd_unlearn.config.base import RenderConfig
from sd_unlearn.config.evaluate import Drawing
from sd_unlearn.errors import UnlearnError
from sd_unlearn.launch import process_count, process_rank
from sd_unlearn.models.base import Base
from sd_unlearn.models.source import DIGITS


@dataclass(frozen=True)
class ImageRequest:
    """One image to draw and where it goes."""

    path: Path
    prompt: str
    seed: int


@dataclass(frozen=True)
class Sampler:
    """DDIM with these settings; `resolution` None is the base's own."""

    steps: int
    guidance_scale: float
    batch_size: int
    resolution: int | None = None


def draw(base: Base, prompts: Sequence[str], seeds: Sequence[int], sampler: Sampler) -> list[Image.Image]:
    """Images of these prompts, each from its own seed, as one batch."""
    import torch

    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    with torch.no_grad():
        return base.pipeline(
            list(prompts),
            num_inference_steps=sampler.steps,
            guidance_scale=sampler.guidance_scale,
            generator=generators,
            height=sampler.resolution,
            width=sampler.resolution,
        ).images


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG through a temporary name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    image.save(temporary, format="PNG")
    temporary.replace(path)


def draw_missing(get_base: Callable[[], Base], requests: Sequence[ImageRequest], sampler: Sampler, title: str) -> int:
    """Draw every image that is not there yet; returns how many were drawn. The base is loaded only if one is missing.

    Chunks are shared among the processes of a distributed run.
    """
    rank, world = process_rank(), process_count()
    chunks = [requests[i : i + sampler.batch_size] for i in range(0, len(requests), sampler.batch_size)]
    todo = [c for c in chunks[rank::world] if not all(r.path.is_file() for r in c)]
    if not todo:
        return 0
    base = get_base()
    for folder in {r.path.parent for r in requests}:
        folder.mkdir(parents=True, exist_ok=True)
    drawn = 0
    with tqdm(total=sum(map(len, todo)), desc=title, unit="image", file=sys.stderr, disable=rank > 0) as bar:
        for chunk in todo:
            for request, image in zip(
                chunk, draw(base, [r.prompt for r in chunk], [r.seed for r in chunk], sampler), strict=True
            ):
                if not request.path.is_file():
                    save_image(image, request.path)
                    drawn += 1
            bar.update(len(chunk))
    return drawn


def sampler_of(config: RenderConfig | Drawing, name: str) -> Sampler:
    """How a base's images are drawn: the options, else what is usual for that base."""
    usual = sampling_of(name)
    return Sampler(
        config.num_inference_steps or usual.steps,
        usual.guidance_scale if config.guidance_scale is None else config.guidance_scale,
        config.render_batch_size or usual.batch_size,
        config.resolution,
    )


def wait_for(requests: Sequence[ImageRequest], patience: float = math.inf) -> None:
    """Wait until the other processes have drawn their shares.

    Raises:
        UnlearnError: none came for `patience` seconds.
    """
    if process_count() < 2:
        return
    missing, since = len(requests) + 1, time.monotonic()
    while left := sum(not request.path.is_file() for request in requests):
        if left < missing:
            missing, since = left, time.monotonic()
        if time.monotonic() - since > patience:
            raise UnlearnError(f"{left} images are still missing; another process must have stopped. Start again.")
        time.sleep(0.5)


SAMPLING = {DIGITS: Sampler(25, 3.0, 100)}
DEFAULT_SAMPLING = Sampler(50, 7.5, 4)


def sampling_of(name: str) -> Sampler:
    """The sampler settings a base is used with by default."""
    return SAMPLING.get(name, DEFAULT_SAMPLING)
