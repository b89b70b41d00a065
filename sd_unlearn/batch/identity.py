"""What a base and own images are identified by, so that equal work is recognized and changed input is not."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

from sd_unlearn.data.photos import CACHE_DIR
from sd_unlearn.io.reading import file_sha256, json_sha256
from sd_unlearn.models.source import Source

# Options that name a file or folder: of models, and of images.
MODELS = {"pretrained_model_name_or_path", "vae", "single_file_config", "floor", "classifier", "clip_pretrained"}
FILES = MODELS | {"face_weights", "inception_weights", "prompt_set"}
IMAGES = {"reference", "others", "real_images", "attacker_images"}
SAMPLES, SAMPLE_BYTES = 16, 1 << 16  # of a large file
_BASE_FILES = re.compile(r".*\.(safetensors|bin|ckpt|json|txt)")


def digest_of(*parts: Any) -> str:
    """12 hexadecimal digits of a SHA-256 over JSON values; the order of keys does not matter."""
    return json_sha256(parts)[:12]


def base_identity(source: Source) -> str:
    """What identifies a base before it is loaded: of local files the content, of a Hub id the name.

    Of each file the size and 16 blocks are read instead of gigabytes: a training or merge changes all of the weights.
    `train` compares the full hashes with those of the rendered images when it loads the base.
    """
    options = (source.prediction_type, source.variant, source.single_file_config, *["drop_t5"] * source.drop_t5)
    return digest_of(_content(str(source.place), source.name), source.vae and _content(source.vae, source.vae), options)


@cache
def _content(place: str, name: str) -> Any:
    path = Path(place)
    if path.is_file():
        return _sampled_sha256(path)
    files = sorted(p for p in path.rglob("*") if _BASE_FILES.fullmatch(p.name) and p.is_file()) if path.is_dir() else []
    return [(p.relative_to(path).as_posix(), _sampled_sha256(p)) for p in files] or name


def _sampled_sha256(path: Path) -> str:
    size = path.stat().st_size
    if size <= SAMPLES * SAMPLE_BYTES:
        return file_sha256(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(SAMPLES):
            file.seek(i * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def content_of(option: str, value: Any) -> Any:
    """The value of an option; of files and folders that exist their content."""
    if isinstance(value, list):
        return [content_of(option, each) for each in value]
    if isinstance(value, str) and option in FILES:
        return _content(value, value)
    if isinstance(value, str) and option in IMAGES:
        return images_identity(value.partition("=")[2] if option == "reference" else value)
    return value


@cache
def images_identity(folder: str) -> str:
    """What identifies a folder of own images: names and content of all files but the cache of `train`."""
    root = Path(folder).expanduser()
    files = [p for p in sorted(root.rglob("*")) if p.is_file() and CACHE_DIR not in p.relative_to(root).parts]
    shown = [p for p in files if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    return digest_of([(p.relative_to(root).as_posix(), file_sha256(p)) for p in shown])
