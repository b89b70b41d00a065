"""A data folder as training examples: images with captions, cached latents, text embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd_unlearn.data.concept import Concept
from sd_unlearn.data.metadata import ImageCaption, read_metadata
from sd_unlearn.errors import UsageError
from sd_unlearn.io.files import atomic_path
from sd_unlearn.io.images import UnreadableImage, image_files, open_image
from sd_unlearn.io.run_folder import METADATA, NEGATIVE, POSITIVE, UNLABELED
from sd_unlearn.models.base import Base, network_sha256
from sd_unlearn.models.conditioning import pack

CACHE_DIR = "cache"


@dataclass(frozen=True)
class Example:
    """One training image."""

    path: Path
    caption: str
    group: str  # generic | mixed_in | keep; positive | negative in the folders of that kind
    positive_set: int = 0  # of a positive: index of its folder in positive_sets()

    @property
    def is_positive(self) -> bool:
        return self.group == "positive"

    @property
    def is_negative(self) -> bool:
        """Whether the image is known not to show the concept."""
        return self.group == "negative"


def positive_sets(folder: Path) -> list[str]:
    """Names of a data folder's sets of positives (1_positive, 1_positive_2, ...). Each set has its own beta."""
    return sorted(p.name for p in folder.glob(f"{POSITIVE}*") if p.is_dir()) or [POSITIVE]


def members_of_sets(examples: Sequence[Example]) -> dict[int, list[int]]:
    """Index of each set of positives -> indices of its examples."""
    sets: dict[int, list[int]] = {}
    for i, example in enumerate(examples):
        if example.is_positive:
            sets.setdefault(example.positive_set, []).append(i)
    return sets


def has_negatives(folder: Path, eta: float) -> bool:
    """Whether the folder has images known not to show the concept and --eta gives them a weight."""
    return eta > 0 and (folder / NEGATIVE).is_dir()


def split_beta(concept: Concept, sets: Sequence[str], beta: float, source: str) -> tuple[list[float], str]:
    """Split beta over the sets of positives; returns (beta of each set, where the values come from).

    The concept file's `betas` are used if it has any, else equal shares. A beta given as an option is always the
    total; the concept file's `betas` then only give the proportions.
    """
    if not concept.betas:
        return [beta / len(sets)] * len(sets), source
    betas = [concept.betas[name] for name in sets]
    return ([beta * b / sum(betas) for b in betas], source) if source == "option" else (betas, "concept")


def _check_betas(concept: Concept, folder: Path, sets: Sequence[str]) -> None:
    if concept.betas and set(concept.betas) != set(sets):
        raise UsageError(
            f"--data_dir {folder} holds the sets {', '.join(sets)}, but the concept file has betas for "
            f"{', '.join(sorted(concept.betas))}. Give every folder a beta, or none."
        )


def scan(folder: Path, concept: Concept, eta: float = 1.0) -> list[Example]:
    """List the images of a data folder with their captions. Each image is decoded once, so that a bad one is reported.

    Captions come from metadata.jsonl; without a line there, images have the concept's `generic` prompt, and positives
    its `caption`. Images in 2_negative are known not to show the concept; with eta 0 they are not read.

    Raises:
        UsageError: a missing folder or fewer than two images, `betas` for other sets of positives, an unreadable image,
            an invalid metadata line, or one that names a missing file.
    """
    sets = positive_sets(folder)
    _check_betas(concept, folder, sets)
    examples = _scan_folder(folder, UNLABELED, "generic", concept.generic)
    for number, name in enumerate(sets):
        examples += _scan_folder(folder, name, "positive", concept.caption, number)
    if has_negatives(folder, eta):
        examples += _scan_folder(folder, NEGATIVE, "negative", concept.generic)
    if not any(e.group in ("generic", "mixed_in") for e in examples):
        raise UsageError(f"--data_dir {folder}: {UNLABELED} holds only keep images. Add images of {concept.generic!r}.")
    return examples


def _scan_folder(data_dir: Path, name: str, group: str, caption: str, positive_set: int = 0) -> list[Example]:
    """The examples of one folder; `group` and `caption` are those of images without metadata."""
    folder = data_dir / name
    images = image_files(folder)
    if len(images) < 2:
        raise UsageError(
            f"--data_dir {data_dir}: {folder} holds {len(images)} images. At least 2 are needed; 20 work better."
        )
    metadata = {line.file_name: line for number, line in read_metadata(folder).items() if _exists(folder, number, line)}
    examples = []
    for path in images:
        try:
            open_image(path)
        except UnreadableImage as error:
            raise UsageError(f"--data_dir: {error}") from None
        line = metadata.get(path.name)
        own_group = group
        # Only among unlabeled images does metadata set the group, and it cannot make one a labeled image: a line that
        # was copied with its image from 1_positive or 2_negative still says so.
        if line and name == UNLABELED and line.group not in ("positive", "negative"):
            own_group = line.group
        examples.append(Example(path, line.text if line else caption, own_group, positive_set))
    return examples


def _exists(folder: Path, number: int, line: ImageCaption) -> bool:
    if not (folder / line.file_name).is_file():
        raise UsageError(
            f"--data_dir: {folder / METADATA} line {number} names {line.file_name}, which is missing. Restore the file "
            "or delete the line."
        )
    return True


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
            text[[n for n, caption in enumerate(captions) if not caption]] = 0
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


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 of the training data: bytes, file name, caption, group and set of every image, not the folder's path."""
    digest = hashlib.sha256()
    for example in examples:
        fields = (example.path.name, example.caption, example.group, str(example.positive_set), "")
        digest.update("\0".join(fields).encode())
        digest.update(example.path.read_bytes())
    return digest.hexdigest()
