"""Encode and decode with a base's VAE: without overflow in fp16, and in parts if memory is short."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sd_unlearn.errors import UnlearnError
from sd_unlearn.io.progress import say
from sd_unlearn.models.base import Base
from sd_unlearn.models.latent_scale import LatentScale
from sd_unlearn.models.sampling import VAE_TILE

# Side in latents of the smallest tiles. The VAE normalizes each tile by itself, so small ones differ in colour.
MIN_TILE = 32


@torch.no_grad()
def decode(base: Base, latents: Tensor) -> list[Image.Image]:
    """The images of latents [B, C, h, w] as the pipeline samples them (scaled, latent_scale.py).

    Raises:
        UnlearnError: a latent or a pixel is not finite, which Diffusers would turn into a black image.
        OutOfMemory: memory is too small for one image in the smallest tiles.
    """
    _check_finite(base, latents, base.properties.title)

    def work(batch: Sequence[Tensor]) -> list[Image.Image]:
        together = torch.cat(list(batch))

        def pixels_of(vae: Any) -> Tensor:
            latents = together.to(vae.dtype)
            return decoded(vae, LatentScale.of(vae, latents).undo(latents))

        pixels = _without_overflow(base, pixels_of)
        _check_finite(base, pixels, "VAE")
        images = base.pipeline.image_processor.postprocess(pixels, output_type="pil")
        for image in images if base.vae_tile else ():
            image.info[VAE_TILE] = str(base.vae_tile)
        return images

    rows = latents.split(1)
    parts = base.decoding.map(work, rows, len(rows), lambda: use_smaller_tiles(base, max(latents.shape[2:])))
    return [image for part in parts for image in part]


@torch.no_grad()
def encode(base: Base, images: Sequence[Any], load: Callable[[Any], Tensor], batch_size: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's posterior: two tensors [N, C, h, w] on the CPU, in float32.

    Both are scaled as the network takes latents (latent_scale.py).

    load: returns the pixels [3, H, W] in [-1, 1] of one of `images`.

    Raises:
        UnlearnError: a value is not finite.
        OutOfMemory: memory is too small for one image in the smallest tiles.
    """
    side = 0

    def work(batch: Sequence[Any]) -> Tensor:
        nonlocal side
        pixels = torch.stack([load(image) for image in batch])
        side = max(pixels.shape[2:]) // base.pipeline.vae_scale_factor

        def moments_of(vae: Any) -> Tensor:
            mean, std = posterior(vae, pixels.to(base.device, vae.dtype))
            return torch.stack([mean - LatentScale.of(vae, mean).shift, std])

        moments = _without_overflow(base, moments_of)
        _check_finite(base, moments, "VAE")
        moments = moments.float().cpu()
        return moments * LatentScale.of(base.pipeline.vae, moments).factor

    while True:
        tile = base.vae_tile
        parts = list(base.encoding.map(work, images, batch_size, lambda: use_smaller_tiles(base, side)))
        if base.vae_tile == tile:  # else again: all images in the same tiles
            break
    mean, std = torch.cat(parts, dim=1)
    return mean.contiguous(), std.contiguous()  # a large VAE may return channels-last tensors


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """The pixels [B, 3, H, W] of a VAE's latents [B, C, h, w]."""
    if is_for_videos(vae):
        return vae.decode(latents.unsqueeze(2), return_dict=False)[0][:, :, 0]
    return vae.decode(latents, return_dict=False)[0]


def posterior(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, C, h, w] of the latents of pixels [B, 3, H, W]."""
    if is_for_videos(vae):
        found = vae.encode(pixels.unsqueeze(2)).latent_dist
        return found.mean[:, :, 0], found.std[:, :, 0]
    found = vae.encode(pixels).latent_dist
    return found.mean, found.std


def is_for_videos(vae: Any) -> bool:
    """Whether a VAE takes videos, as Qwen-Image's: an image is one of a single frame."""
    return hasattr(vae, "temperal_downsample")


def use_smaller_tiles(base: Base, side: int) -> bool:
    """`use_tiles` of half the size; returns False if they would be too small. side: of a whole image, in latents."""
    vae, scale = base.pipeline.vae, base.pipeline.vae_scale_factor
    tile = (base.vae_tile // scale if vae.use_tiling and base.vae_tile else side) // 2
    if tile < MIN_TILE:
        return False
    use_tiles(base, tile)
    say(f"Out of memory in the VAE: images are processed in tiles of {base.vae_tile} pixels.")
    return True


def use_tiles(base: Base, tile: int) -> None:
    """Let the VAE work in overlapping tiles of `tile` latents. The pixels change slightly, most at the seams."""
    vae = base.pipeline.vae
    base.vae_tile = tile * base.pipeline.vae_scale_factor
    if is_for_videos(vae):
        stride = base.vae_tile * 3 // 4
        vae.enable_tiling(base.vae_tile, base.vae_tile, stride, stride)
        return
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = tile, base.vae_tile


def _without_overflow(base: Base, work: Callable[[Any], Tensor]) -> Tensor:
    """work(vae), in full precision if the VAE's activations leave the range of fp16 (65,504).

    SDXL's VAE does (`force_upcast` in its configuration). For others, fp16 is tried first.
    """
    vae = base.pipeline.vae
    if vae.dtype != torch.float16:
        return work(vae)
    if not (base.kind == "sdxl" and vae.config.force_upcast):
        values = work(vae)
        if values.isfinite().all():
            return values
    with _full_precision(vae):
        return work(vae)


@contextmanager
def _full_precision(vae: Any) -> Iterator[None]:
    try:
        vae.float()
        yield
    finally:
        vae.half()


def _check_finite(base: Base, values: Tensor, network: str) -> None:
    if not values.isfinite().all():
        raise UnlearnError(
            f"The {network} of {base.name} gives values that are not finite (NaN or infinity), so nothing is saved. It "
            "is broken, overflows in fp16 (use --mixed_precision no or bf16), or the LoRA is too strong (use a lower "
            "strength)."
        )
