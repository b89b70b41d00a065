"""Generate images from prompts: each image has its own seed, existing images are kept, processes share the work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from sd_unlearn.errors import UnlearnError
from sd_unlearn.io.files import atomic_path
from sd_unlearn.io.images import is_intact
from sd_unlearn.io.progress import Progress
from sd_unlearn.launch import process_count, process_rank
from sd_unlearn.models.base import Base
from sd_unlearn.models.source import DIGITS


@dataclass(frozen=True)
class ImageRequest:
    """One image to generate and the file it is saved to."""

    path: Path
    prompt: str
    seed: int


@dataclass(frozen=True)
class Sampler:
    """Settings of DDIM sampling; `resolution` in pixels, None for the base's own."""

    steps: int
    guidance_scale: float
    batch_size: int
    resolution: int | None = None


BASE_SAMPLERS = {DIGITS: Sampler(steps=25, guidance_scale=3.0, batch_size=100)}
DEFAULT_SAMPLER = Sampler(steps=50, guidance_scale=7.5, batch_size=4)


class SamplerOptions(Protocol):
    """The options of a command that set the sampler; None takes the default."""

    num_inference_steps: int | None
    guidance_scale: float | None
    render_batch_size: int | None
    resolution: int | None


def default_sampler(base_name: str) -> Sampler:
    """The sampler settings that a base is used with unless options change them."""
    return BASE_SAMPLERS.get(base_name, DEFAULT_SAMPLER)


def resolve_sampler(options: SamplerOptions, base_name: str) -> Sampler:
    """The sampler settings of a command: its options, and the base's defaults for those that are None."""
    default = default_sampler(base_name)
    return Sampler(
        options.num_inference_steps or default.steps,
        default.guidance_scale if options.guidance_scale is None else options.guidance_scale,
        options.render_batch_size or default.batch_size,
        options.resolution,
    )


def generate_images(base: Base, prompts: Sequence[str], seeds: Sequence[int], sampler: Sampler) -> list[Image.Image]:
    """Generate one image per prompt and seed, as a single batch.

    Raises:
        UnlearnError: a value is not finite. Diffusers would turn it into a black image.
    """
    import torch

    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    with torch.no_grad(), finite_images(base):
        return base.pipeline(
            list(prompts),
            num_inference_steps=sampler.steps,
            guidance_scale=sampler.guidance_scale,
            generator=generators,
            height=sampler.resolution,
            width=sampler.resolution,
        ).images


@contextmanager
def finite_images(base: Base) -> Iterator[None]:
    """Refuse latents and decoded images with NaN or infinity, which Diffusers would turn into black images.

    Raises:
        UnlearnError: inside the block, naming the network.
    """

    def check(decoder: Any, inputs: tuple[Any, ...], image: Any) -> None:
        for values, network in ((inputs[0], "UNet"), (image, "VAE")):
            if not values.isfinite().all():
                raise UnlearnError(
                    f"The {network} of {base.name} gives values that are not finite (NaN or infinity), so no image is "
                    "saved. It is broken, overflows in fp16 (use --mixed_precision no or bf16), or the LoRA is too "
                    "strong (use a lower strength)."
                )

    hook = base.pipeline.vae.decoder.register_forward_hook(check)
    try:
        yield
    finally:
        hook.remove()


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG file atomically."""
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def generate_missing(
    get_base: Callable[[], Base], requests: Sequence[ImageRequest], sampler: Sampler, title: str
) -> int:
    """Generate the images that do not exist yet or are damaged, and return their number.

    The base is loaded only if an image is missing.

    Requests are split into fixed batches, which the processes of an `accelerate launch` share. A batch with a missing
    image is generated as a whole, because rounding depends on the batch an image is in: an interrupted run that is
    resumed gives the same bytes as an uninterrupted one.
    """
    batches = [requests[i : i + sampler.batch_size] for i in range(0, len(requests), sampler.batch_size)]
    own = batches[process_rank() :: process_count()]
    unfinished = [batch for batch in own if not all(is_intact(request.path) for request in batch)]
    if not unfinished:
        return 0
    base = get_base()
    generated, total = 0, sum(map(len, unfinished))
    with Progress(total, title, "image", shown=process_rank() == 0) as progress:
        for batch in unfinished:
            images = generate_images(base, [r.prompt for r in batch], [r.seed for r in batch], sampler)
            for request, image in zip(batch, images, strict=True):
                if not is_intact(request.path):
                    save_image(image, request.path)
                    generated += 1
            progress.advance(len(batch))
    return generated


def wait_for_images(requests: Sequence[ImageRequest], timeout: float = math.inf) -> None:
    """Wait until the other processes have generated their images; returns at once in a single process.

    Raises:
        UnlearnError: no new image appeared for `timeout` seconds.
    """
    if process_count() < 2:
        return
    fewest, since = len(requests) + 1, time.monotonic()
    missing = list(requests)
    while missing := [request for request in missing if not is_intact(request.path)]:
        if len(missing) < fewest:
            fewest, since = len(missing), time.monotonic()
        if time.monotonic() - since > timeout:
            raise UnlearnError(
                f"{len(missing)} images are still missing: another process must have stopped. Run the command again."
            )
        time.sleep(0.5)
