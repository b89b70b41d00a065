"""Folders -> records -> cached latents and text embeddings."""

from __future__ import annotations

import hashlib
import os
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
from sd_unlearn.errors import UsageError
from sd_unlearn.io.files import read_jsonl_lines
from sd_unlearn.io.run_folder import IMAGE_SUFFIXES, METADATA, NEGATIVE, POSITIVE, UNLABELED
from sd_unlearn.models.base import Base, network_sha256
from sd_unlearn.models.conditioning import pack

CACHE_DIR = "cache"


@dataclass(frozen=True)
class Example:
    """One training image; group is that of its metadata, but `positive` or `negative` in these folders."""

    path: Path
    caption: str
    group: str
    positive_set: int = 0  # of a positive: the number of its folder among those of positive_sets()

    @property
    def is_positive(self) -> bool:
        return self.group == "positive"

    @property
    def is_negative(self) -> bool:
        """Known to be normal."""
        return self.group == "negative"


def positive_sets(folder: Path) -> list[str]:
    """Names of a data folder's sets of positives: 1_positive, 1_positive_2, ..., each with a beta of its own."""
    return sorted(p.name for p in folder.glob(f"{POSITIVE}*") if p.is_dir()) or [POSITIVE]


def members_of_sets(examples: Sequence[Example]) -> dict[int, list[int]]:
    """The number of each set of positives -> the indices of its examples."""
    sets: dict[int, list[int]] = {}
    for i, example in enumerate(examples):
        if example.is_positive:
            sets.setdefault(example.positive_set, []).append(i)
    return sets


def has_negatives(folder: Path, eta: float) -> bool:
    """Whether there are images known to be normal, and they count."""
    return eta > 0 and (folder / NEGATIVE).is_dir()


def share_beta(concept: Concept, sets: Sequence[str], beta: float, source: str) -> tuple[list[float], str]:
    """(beta of each set of positives, where they are from): the concept file's, else equal shares of the total.

    A total given as an option wins over the concept file's, but keeps their proportions.
    """
    if not concept.betas:
        return [beta / len(sets)] * len(sets), source
    betas = [concept.betas[name] for name in sets]
    return ([beta * b / sum(betas) for b in betas], source) if source == "option" else (betas, "concept")


def _check_sets(concept: Concept, folder: Path, sets: Sequence[str]) -> None:
    if concept.betas and set(concept.betas) != set(sets):
        raise UsageError(
            f"--data_dir {folder} holds the sets {', '.join(sets)}, but the concept file has betas for "
            f"{', '.join(sorted(concept.betas))}. Give each folder its beta, or none."
        )


def scan(folder: Path, concept: Concept, eta: float = 1.0) -> list[Example]:
    """All images of the data folder with their captions; each image is opened, so a bad one is named early.

    Those of 2_negative, where there is one, are known to be normal; at an eta of 0 they do not count.

    Raises:
        UsageError: a missing or nearly empty folder, betas for other sets of positives than there are, an unreadable
            image, a metadata line without text or without file.
    """
    examples = []
    sets = positive_sets(folder)
    _check_sets(concept, folder, sets)
    places = [(UNLABELED, "generic", concept.generic), *((name, "positive", concept.caption) for name in sets)]
    if has_negatives(folder, eta):
        places.append((NEGATIVE, "negative", concept.generic))
    for sub, group, caption in places:
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
            if sub != UNLABELED or found in ("positive", "negative"):
                found = group  # the folder decides who is what, whatever a copied metadata line says
            examples.append(Example(path, text, found, sets.index(sub) if sub in sets else 0))
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
    vae, means, stds = base.pipeline.vae, [], []
    encoder = f"{network_sha256(vae)} {vae.config.scaling_factor}"  # one UNet is used with several VAEs
    digest = hashlib.sha256(f"{base.sha256} {encoder} {resolution}".encode())
    for example in examples:
        digest.update(example.path.read_bytes())
    path = cache / f"latents-{digest.hexdigest()[:16]}.safetensors"
    if path.is_file():
        found = load_file(path)
        return found["mean"], found["std"]
    size = 64 if resolution <= 64 else 4
    with _upcast(base) as vae:
        for chunk in (examples[i : i + size] for i in range(0, len(examples), size)):
            pixels = torch.stack([load_pixels(e.path, resolution) for e in chunk]).to(base.device, vae.dtype)
            posterior = vae.encode(pixels).latent_dist
            means.append(posterior.mean.float().cpu() * vae.config.scaling_factor)
            stds.append(posterior.std.float().cpu() * vae.config.scaling_factor)
    mean, std = torch.cat(means).contiguous(), torch.cat(stds).contiguous()  # a large VAE may answer channels last
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({"mean": mean, "std": std}, temporary)
    temporary.replace(path)
    return mean, std


@contextmanager
def _upcast(base: Base) -> Iterator[Any]:
    """The VAE; SDXL's overflows in fp16 and is lent in full precision, as the pipeline does to draw with it."""
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

    SDXL's have the pooled embedding as one row more (conditioning.py), and those of the empty caption are zeros where
    the pipeline's force_zeros_for_empty_prompt says so, since that is what guidance then subtracts.
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
    """Token ids [len(captions), tokens] on the CPU, padded and cut to the model's length."""
    tokenizer = base.pipeline.tokenizer
    return tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 of what is trained on: every image's bytes, caption, group and set, wherever the folder lies."""
    digest = hashlib.sha256()
    for example in examples:
        told = (example.path.name, example.caption, example.group, str(example.positive_set), "")
        digest.update("\0".join(told).encode())
        digest.update(example.path.read_bytes())
    return digest.hexdigest()
