"""Encode training images and captions with a base: latents, cached in the data folder, and text embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd_unlearn.data.dataset import Example
from sd_unlearn.io.files import atomic_path
from sd_unlearn.io.images import open_image
from sd_unlearn.models.base import Base, network_sha256
from sd_unlearn.models.conditioning import pack


def load_pixels(path: Path, resolution: int) -> Tensor:
    """Read an image upright, scaled and centre-cropped to a square: [3, resolution, resolution] in [-1, 1]."""
    square = ImageOps.fit(open_image(path), (resolution, resolution), Image.Resampling.LANCZOS)
    data = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return data.view(resolution, resolution, 3).permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def encode_images(base: Base, examples: Sequence[Example], resolution: int, cache: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's posterior for every image: two tensors [N, 4, H/8, W/8] on the CPU.

    Both are multiplied by the scaling factor. Training samples latents from them. Cached in `cache` by image content.
    """
    vae, means, stds = base.pipeline.vae, [], []
    encoder = f"{network_sha256(vae)} {vae.config.scaling_factor}"  # a UNet can be used with several VAEs
    digest = hashlib.sha256(f"{base.sha256} {encoder} {resolution}".encode())
    for example in examples:
        digest.update(example.path.read_bytes())
    path = cache / f"latents-{digest.hexdigest()[:16]}.safetensors"
    if path.is_file():
        cached = load_file(path)
        return cached["mean"], cached["std"]
    batch_size = 64 if resolution <= 64 else 4
    with _full_precision_vae(base) as vae:
        for batch in (examples[i : i + batch_size] for i in range(0, len(examples), batch_size)):
            pixels = torch.stack([load_pixels(e.path, resolution) for e in batch]).to(base.device, vae.dtype)
            posterior = vae.encode(pixels).latent_dist
            means.append(posterior.mean.float().cpu() * vae.config.scaling_factor)
            stds.append(posterior.std.float().cpu() * vae.config.scaling_factor)
    # contiguous: a large VAE may return channels-last tensors
    mean, std = (torch.cat(parts).contiguous() for parts in (means, stds))
    with atomic_path(path) as temporary:
        save_file({"mean": mean, "std": std}, temporary)
    return mean, std


@contextmanager
def _full_precision_vae(base: Base) -> Iterator[Any]:
    """The VAE, in full precision where fp16 overflows (SDXL), as the pipeline does when it decodes."""
    vae = base.pipeline.vae
    overflows = base.kind == "sdxl" and vae.dtype == torch.float16 and vae.config.force_upcast
    try:
        yield vae.float() if overflows else vae
    finally:
        if overflows:
            vae.half()


@torch.no_grad()
def encode_captions(base: Base, captions: Sequence[str]) -> Tensor:
    """Text embeddings [len(captions), tokens, width], as the pipeline makes them: padded, without attention mask.

    SDXL's have the pooled embedding as one more row (conditioning.py). If the pipeline sets
    force_zeros_for_empty_prompt, those of the empty caption are zeros, which is what guidance then subtracts.
    """
    if base.kind == "sdxl":
        pipeline = base.pipeline
        tokens, _, pooled, _ = pipeline.encode_prompt(
            list(captions), device=base.device, do_classifier_free_guidance=False
        )
        text = pack(tokens.float(), pooled.float())
        if pipeline.config.force_zeros_for_empty_prompt:
            text[[n for n, caption in enumerate(captions) if not caption.strip()]] = 0
        return text
    return base.pipeline.text_encoder(tokenize(base, captions).to(base.device))[0].float()


def tokenize(base: Base, captions: Sequence[str]) -> Tensor:
    """Token ids [len(captions), tokens] on the CPU, padded and truncated to the model's length."""
    tokenizer = base.pipeline.tokenizer
    return tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def describe_long_captions(base: Base, captions: Sequence[str]) -> str:
    """How many captions have more tokens than the text encoder reads, in one line; an empty string if none has."""
    tokenizer = base.pipeline.tokenizer
    limit = tokenizer.model_max_length
    distinct = list(dict.fromkeys(captions))
    tokens = tokenizer(distinct, truncation=False, verbose=False).input_ids
    long = {text for text, ids in zip(distinct, tokens, strict=True) if len(ids) > limit}
    if not long:
        return ""
    count = sum(caption in long for caption in captions)
    first = next(caption for caption in captions if caption in long)
    have = "image has a caption" if count == 1 else "images have captions"
    return f'{count:,} {have} longer than the {limit} tokens the text encoder reads; the end is cut: "{first[:60]}..."'
