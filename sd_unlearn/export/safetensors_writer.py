"""Write safetensors files with reproducible bytes. (The library's own writer stores metadata in random order.)"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sd_unlearn.errors import UnlearnError
from sd_unlearn.io.files import atomic_path

HEADER_LIMIT = 1024 * 1024  # ComfyUI ignores longer headers
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}


def pack(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The bytes of a safetensors file.

    Raises:
        UnlearnError: the header reaches 1 MiB.
    """
    return b"".join([header(tensors, metadata), *payload(tensors)])


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file tensor by tensor, so that a whole checkpoint is in memory only once.

    Raises:
        UnlearnError: the header reaches 1 MiB.
        OSError: the path cannot be written; nothing is left there.
    """
    start = header(tensors, metadata)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(start)
        for block in payload(tensors):
            file.write(block)


def header(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The first bytes of the file: the header's length and the header. Metadata is sorted by key.

    Raises:
        UnlearnError: the header reaches 1 MiB.
    """
    entries, end = {}, 0
    for name, tensor in _ordered(tensors):
        start, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of eight bytes
    if len(text) >= HEADER_LIMIT:
        raise UnlearnError(
            f"The header would take {len(text)} bytes, but ComfyUI ignores headers above {HEADER_LIMIT} bytes. "
            "Shorten concept.yaml."
        )
    return len(text).to_bytes(8, "little") + text


def payload(tensors: dict[str, Tensor]) -> Iterator[bytes]:
    """The bytes after the header, one tensor at a time."""
    for _, tensor in _ordered(tensors):
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the bytes after the header, in hex; ModelSpec and kohya store it in the header."""
    sha256 = hashlib.sha256()
    for block in payload(tensors):
        sha256.update(block)
    return sha256.hexdigest()


def converted(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Convert all weights to `dtype`, except alphas (0-d tensors) and integers.

    Raises:
        UnlearnError: a weight is too large for half precision.
    """
    weights = {}
    for name, tensor in tensors.items():
        weights[name] = tensor.to(dtype) if tensor.ndim and tensor.is_floating_point() else tensor
        if dtype == torch.float16 and not torch.isfinite(weights[name]).all():
            raise UnlearnError(f'"{name}" holds values above 65504, the largest fp16 number. Use --dtype fp32.')
    return weights


def _ordered(tensors: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Sorted by dtype width, widest first, then by name. Each tensor then starts at a multiple of its element size."""
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
