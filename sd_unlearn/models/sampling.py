"""Generate images from prompts: each image has its own seed, existing images are kept, processes share the work."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd_unlearn.errors import UsageError
from sd_unlearn.io.files import atomic_path
from sd_unlearn.io.images import is_intact, png_note
from sd_unlearn.io.progress import Progress
from sd_unlearn.launch import process_count, process_rank, wait_for_others
from sd_unlearn.models.base import Base
from sd_unlearn.models.kinds import KINDS, Kind
from sd_unlearn.models.source import BUNDLED, EMOJI, Source

VAE_TILE = "sd_unlearn.vae_tile"  # in the metadata of an image or of latents: side in pixels of the VAE's tiles


@dataclass(frozen=True)
class ImageRequest:
    """One image to generate and the file it is saved to."""

    path: Path
    prompt: str
    seed: int


@dataclass(frozen=True)
class Sampler:
    """Settings of sampling (with the sampler of the base's kind); `resolution` in pixels, None for the base's own."""

    steps: int
    guidance_scale: float
    batch_size: int
    resolution: int | None = None


BASE_SAMPLERS = {name: Sampler(steps=25, guidance_scale=3.0, batch_size=100) for name in BUNDLED}
BASE_SAMPLERS[EMOJI] = replace(BASE_SAMPLERS[EMOJI], steps=12)  # the classifier reads as much as after 25
DEFAULT_SAMPLER = Sampler(steps=50, guidance_scale=7.5, batch_size=4)
# Of the flow-matching models, as published: SD 3, 3.5 medium and large, FLUX.1 dev, the distilled FLUX.1 schnell and
# SD 3.5 large turbo, which sample without guidance, FLUX.2 dev and klein base, the distilled FLUX.2 klein, Z-Image, and
# the distilled Z-Image-Turbo, Qwen-Image.
SD3_SAMPLER = Sampler(steps=28, guidance_scale=7.0, batch_size=4)
SD35_SAMPLER = Sampler(steps=40, guidance_scale=4.5, batch_size=4)
SD35_LARGE_SAMPLER = Sampler(steps=28, guidance_scale=3.5, batch_size=4)
DEV_SAMPLER = Sampler(steps=28, guidance_scale=3.5, batch_size=4)
SCHNELL_SAMPLER = Sampler(steps=4, guidance_scale=0.0, batch_size=4)
FLUX2_SAMPLER = Sampler(steps=50, guidance_scale=4.0, batch_size=4)
QWEN_SAMPLER = Sampler(steps=50, guidance_scale=4.0, batch_size=4)
KLEIN_SAMPLER = Sampler(steps=4, guidance_scale=1.0, batch_size=4)
Z_IMAGE_SAMPLER = Sampler(steps=50, guidance_scale=4.0, batch_size=4)
Z_IMAGE_TURBO_SAMPLER = Sampler(steps=8, guidance_scale=0.0, batch_size=4)
PUBLISHED_SAMPLERS = {
    re.compile(r"stabilityai/stable-diffusion-3-.*"): SD3_SAMPLER,
    re.compile(r"stabilityai/stable-diffusion-3\.5-.*-turbo"): SCHNELL_SAMPLER,
    re.compile(r"stabilityai/stable-diffusion-3\.5-large"): SD35_LARGE_SAMPLER,
    re.compile(r"stabilityai/stable-diffusion-3\.5-.*"): SD35_SAMPLER,
    re.compile(r"black-forest-labs/FLUX\.1-schnell"): SCHNELL_SAMPLER,
    re.compile(r"black-forest-labs/FLUX\.1-.*"): DEV_SAMPLER,
    re.compile(r"black-forest-labs/FLUX\.2-(dev|klein-base-.*)"): FLUX2_SAMPLER,
    re.compile(r"black-forest-labs/FLUX\.2-klein-.*"): KLEIN_SAMPLER,
    re.compile(r"Tongyi-MAI/Z-Image-Turbo"): Z_IMAGE_TURBO_SAMPLER,
    re.compile(r"Tongyi-MAI/Z-Image"): Z_IMAGE_SAMPLER,
    re.compile(r"Qwen/Qwen-Image(-2512)?"): QWEN_SAMPLER,
}


class SamplerOptions(Protocol):
    """The options of a command that set the sampler; None takes the default."""

    num_inference_steps: int | None
    guidance_scale: float | None
    render_batch_size: int | None
    resolution: int | None


def default_sampler(base: Source | str) -> Sampler:
    """The sampler settings that a base is used with unless options change them.

    base: of a Hub id only the name is known, of a folder or file its configuration.
    """
    source = Source(base) if isinstance(base, str) else base
    if source.name in BASE_SAMPLERS:
        return BASE_SAMPLERS[source.name]
    published = next((sampler for name, sampler in PUBLISHED_SAMPLERS.items() if name.fullmatch(source.name)), None)
    kind, network = known_network(source)
    if kind == "flux":
        return DEV_SAMPLER if network.get("guidance_embeds") else SCHNELL_SAMPLER
    if kind == "sd3" and network.get("qk_norm"):  # 3.5 normalizes queries and keys; only medium has second attentions
        return SD35_SAMPLER if network.get("dual_attention_layers") else SD35_LARGE_SAMPLER
    if kind == "sd3":
        return SD3_SAMPLER
    if kind in ("flux2", "flux2-klein"):
        is_distilled = source.config_of("", "model_index.json").get("is_distilled")
        return KLEIN_SAMPLER if is_distilled else FLUX2_SAMPLER
    if kind == "z-image":  # the two differ in the shift of their schedulers only: 6, and 3 of Turbo
        shift = source.config_of("scheduler", "scheduler_config.json").get("shift", 1.0)
        return Z_IMAGE_SAMPLER if shift > 4 else Z_IMAGE_TURBO_SAMPLER
    if kind == "qwen-image":
        return QWEN_SAMPLER
    return published or DEFAULT_SAMPLER


def known_network(source: Source) -> tuple[str | None, dict[str, Any]]:
    """The kind of a local base and the configuration of its network.

    (None, {}) for a Hub id, and for a pickle that may not be opened.
    """
    try:
        return source.kind, source.network_config
    except UsageError:  # a pickle, damaged or not supported: finding or loading it says so
        return None, {}


def resolve_sampler(options: SamplerOptions, source: Source) -> Sampler:
    """The sampler settings of a command: its options, and the base's defaults for those that are None.

    Raises:
        UsageError: the base cannot generate images of this resolution.
    """
    default, (kind, _) = default_sampler(source), known_network(source)
    if options.resolution and kind:
        check_resolution(options.resolution, KINDS[kind], source.name)
    return Sampler(
        options.num_inference_steps or default.steps,
        default.guidance_scale if options.guidance_scale is None else options.guidance_scale,
        options.render_batch_size or default.batch_size,
        options.resolution,
    )


def check_resolution(resolution: int, kind: Kind, name: str) -> None:
    """Refuse a side in pixels of which a base cannot have images.

    Raises:
        UsageError
    """
    if resolution % kind.multiple:
        raise UsageError(f"--resolution {resolution}: {name} needs a multiple of {kind.multiple} pixels.")


def generate_images(base: Base, prompts: Sequence[str], seeds: Sequence[int], sampler: Sampler) -> list[Image.Image]:
    """Generate one image per prompt and seed, as a single batch, or in smaller ones if memory runs out.

    An image depends on its own seed only, so it is the same in a smaller batch, up to rounding.

    Raises:
        UnlearnError: a latent or a pixel is not finite.
        OutOfMemory: memory is too small for one image.
    """

    def work(pairs: Sequence[tuple[str, int]]) -> list[Image.Image]:
        return sample(base, [seed for _, seed in pairs], sampler, prompt=[prompt for prompt, _ in pairs])

    pairs = list(zip(prompts, seeds, strict=True))
    batches = base.generating.map(work, pairs, max(sampler.batch_size, len(pairs)))
    return [image for batch in batches for image in batch]


def sample(base: Base, seeds: Sequence[int], sampler: Sampler, **prompts: Any) -> list[Image.Image]:
    """One image per seed, as a single batch. prompts: the arguments of the pipeline with the prompts or embeddings.

    Raises:
        UsageError: the base cannot generate images of this resolution.
        UnlearnError: a latent or a pixel is not finite.
        OutOfMemory: memory is too small to decode one image.
        torch.OutOfMemoryError: memory is too small for all seeds at once.
    """
    import torch

    from sd_unlearn.models.vae import decode

    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    resolution = sampler.resolution or base.resolution
    if sampler.resolution:  # checked again: the kind of a Hub id is known only once it is loaded
        check_resolution(sampler.resolution, base.properties, base.name)
    with torch.no_grad():
        latents = base.pipeline(
            **prompts,
            **base.conditioning.options(base.pipeline),
            num_inference_steps=sampler.steps,
            **base.conditioning.guidance(sampler.guidance_scale, prompts),
            generator=generators,
            height=resolution,
            width=resolution,
            output_type="latent",
        ).images
    side = resolution // base.pipeline.vae_scale_factor
    return decode(base, base.conditioning.finished(base.pipeline, latents, side, side))


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG file atomically, with a note if the image was decoded in tiles (see `count_tiled`)."""
    info = PngInfo()
    if tile := image.info.get(VAE_TILE):
        info.add_text(VAE_TILE, tile)
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def count_tiled(paths: Iterable[Path]) -> int:
    """How many of these images were decoded in tiles, because memory was too small for whole images."""
    return sum(png_note(path, VAE_TILE) is not None for path in paths)


def generate_missing(
    get_base: Callable[[], Base],
    requests: Sequence[ImageRequest],
    sampler: Sampler,
    title: str,
    share: int | None = None,
) -> int:
    """Generate the images that do not exist yet or are damaged, and return their number.

    The base is loaded only if an image is missing.

    Requests are split into fixed batches. A batch with a missing image is generated as a whole, because rounding
    depends on the batch an image is in: an interrupted run that is resumed gives the same bytes as an uninterrupted
    one. The processes of an `accelerate launch` take turns of `share` images; each cuts them into batches for its own
    memory.

    share: the same in all processes, ideally a multiple of their batch sizes; None: sampler.batch_size.

    Raises:
        UnlearnError: an image is not finite, or memory is too small for one.
    """
    shares = _cut(requests, share or sampler.batch_size)[process_rank() :: process_count()]
    batches = [batch for own in shares for batch in _cut(own, sampler.batch_size)]
    unfinished = [batch for batch in batches if not all(is_intact(request.path) for request in batch)]
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


def _cut(requests: Sequence[ImageRequest], size: int) -> list[Sequence[ImageRequest]]:
    return [requests[start : start + size] for start in range(0, len(requests), size)]


def wait_for_images(requests: Sequence[ImageRequest], timeout: float = math.inf) -> None:
    """Wait until the other processes have generated their images; returns at once in a single process.

    Raises:
        UnlearnError: no new image appeared for `timeout` seconds.
    """
    missing = list(requests)

    def still_missing() -> int:
        missing[:] = [request for request in missing if not is_intact(request.path)]
        return len(missing)

    wait_for_others(still_missing, "images", timeout)
