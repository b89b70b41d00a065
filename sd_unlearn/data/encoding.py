"""Encode training images and captions with a base: latents, cached in the data folder, and text embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sd_unlearn.data.dataset import Example
from sd_unlearn.io.files import atomic_path
from sd_unlearn.io.images import open_image
from sd_unlearn.models.base import Base
from sd_unlearn.models.latent_scale import described_scale
from sd_unlearn.models.sampling import VAE_TILE
from sd_unlearn.models.vae import encode


def load_pixels(path: Path, resolution: int) -> Tensor:
    """Read an image upright, scaled and centre-cropped to a square: [3, resolution, resolution] in [-1, 1]."""
    square = ImageOps.fit(open_image(path), (resolution, resolution), Image.Resampling.LANCZOS)
    data = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return data.view(resolution, resolution, 3).permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def encode_images(
    base: Base, examples: Sequence[Example], resolution: int, cache: Path, batch_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's posterior for every image: two tensors [N, C, H/8, W/8] on the CPU.

    Both are scaled (models/vae.py, `encode`). Training samples latents from them. Cached in `cache` by image content.

    batch_size: images at once. Default: 64 up to 64 pixels, else 4.

    Raises:
        UnlearnError: a latent is not finite, or memory is too small for one image.
    """
    vae = base.pipeline.vae
    encoder = f"{base.vae_sha256} {vae.dtype} {described_scale(vae)}"  # a UNet can be used with several VAEs
    digest = hashlib.sha256(f"{base.sha256} {encoder} {resolution}".encode())
    for example in examples:
        digest.update(example.path.read_bytes())
    path = cache / f"latents-{digest.hexdigest()[:16]}.safetensors"
    if cached := _read_cached(path):
        mean, std, tile = cached
        base.vae_tile = int(tile) if tile else base.vae_tile
        return mean, std
    batch_size = batch_size or (64 if resolution <= 64 else 4)
    mean, std = encode(base, [e.path for e in examples], lambda image: load_pixels(image, resolution), batch_size)
    with atomic_path(path) as temporary:
        save_file({"mean": mean, "std": std}, temporary, {VAE_TILE: str(base.vae_tile)} if base.vae_tile else None)
    return mean, std


def _read_cached(path: Path) -> tuple[Tensor, Tensor, str | None] | None:
    """Mean, standard deviation and tile size of a cache file; None if it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as cached:
            return cached.get_tensor("mean"), cached.get_tensor("std"), (cached.metadata() or {}).get(VAE_TILE)
    except (OSError, SafetensorError):
        return None


@torch.no_grad()
def encode_captions(base: Base, captions: Sequence[str]) -> Tensor:
    """Text embeddings [len(captions), rows, width], as the pipeline makes them: padded, without attention mask.

    Those of SDXL, SD 3 and FLUX have the pooled embedding as one more row (conditioning.py), those of Z-Image have rows
    of zeros as padding (chat.py). If the pipeline sets force_zeros_for_empty_prompt, those of the empty caption are
    zeros, which is what guidance then subtracts.

    Raises:
        OutOfMemory: memory is too small for one caption.
    """
    return torch.cat(_encode_in_parts(base, captions, base.device))


@torch.no_grad()
def encode_each(base: Base, captions: Sequence[str]) -> dict[str, Tensor]:
    """Caption -> its text embeddings as of `encode_captions`, [rows, width], on the CPU.

    Each part leaves the base's device once it is encoded: all captions of a training together may be too large for it.

    Raises:
        OutOfMemory: as encode_captions.
    """
    rows = (row for part in _encode_in_parts(base, captions, "cpu") for row in part)
    return dict(zip(captions, rows, strict=True))


def _encode_in_parts(base: Base, captions: Sequence[str], device: Any) -> list[Tensor]:
    """The embeddings of consecutive captions, [part, rows, width] each, on a device."""
    at_once = base.properties.captions_at_once
    return list(base.captioning.map(lambda part: _embed(base, part).to(device), captions, at_once))


def _embed(base: Base, captions: Sequence[str]) -> Tensor:
    text = base.conditioning.encode(base.pipeline, captions, base.device)
    if base.pipeline.config.get("force_zeros_for_empty_prompt"):
        text[[n for n, caption in enumerate(captions) if not caption.strip()]] = 0
    return text if base.properties.is_flow else text.float()  # T5's are megabytes for each caption


def tokenize(base: Base, captions: Sequence[str]) -> Tensor:
    """Token ids [len(captions), tokens] on the CPU, padded and truncated to the model's length."""
    tokenizer = base.pipeline.tokenizer
    return torch.tensor([base.conditioning.tokenized(tokenizer, caption)[0] for caption in captions])


def describe_long_captions(base: Base, captions: Sequence[str]) -> str:
    """How many captions have more tokens than the text encoder reads, in one line; an empty string if none has."""
    tokenizer, limit = base.longest_tokenizer
    distinct = list(dict.fromkeys(captions))
    counts = base.conditioning.token_counts(tokenizer, distinct)
    long = {text for text, count in zip(distinct, counts, strict=True) if count > limit}
    if not long:
        return ""
    count = sum(caption in long for caption in captions)
    first = next(caption for caption in captions if caption in long)
    have = "image has a caption" if count == 1 else "images have captions"
    return f'{count:,} {have} longer than the {limit} tokens the text encoder reads; the end is cut: "{first[:60]}..."'
