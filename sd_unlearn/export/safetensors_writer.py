"""safetensors files whose bytes depend on nothing but their content: the library's writer orders metadata by chance."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sd_unlearn.errors import UnlearnError

HEADER_LIMIT = 1024 * 1024  # above this ComfyUI shows no header at all
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}


def pack(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file in memory.

    Raises:
        UnlearnError: the header reaches 1 MiB.
    """
    return b"".join([header(tensors, metadata), *payload(tensors)])


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file on disk, tensor by tensor, so that a whole checkpoint is not held twice.

    Raises:
        UnlearnError: the header reaches 1 MiB.
        OSError: the place cannot be written; nothing is left there.
    """
    first, temporary = header(tensors, metadata), path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(first)
            for block in payload(tensors):
                file.write(block)
        temporary.replace(path)
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def header(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The length and the header: metadata sorted, tensors in their order in the payload."""
    entries, end = {}, 0
    for name, tensor in _ordered(tensors):
        start, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of eight bytes
    if len(text) >= HEADER_LIMIT:
        raise UnlearnError(
            f"The header would take {len(text)} bytes, and ComfyUI shows none above {HEADER_LIMIT}. "
            "Shorten concept.yaml."
        )
    return len(text).to_bytes(8, "little") + text


def payload(tensors: dict[str, Tensor]) -> Iterator[bytes]:
    """Everything after the header, a tensor at a time."""
    for _, tensor in _ordered(tensors):
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of everything after the header, in hex: what ModelSpec and kohya put into it."""
    made = hashlib.sha256()
    for block in payload(tensors):
        made.update(block)
    return made.hexdigest()


def converted(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights as `dtype`; alphas, which are single numbers, stay as they are.

    Raises:
        UnlearnError: a weight is too large for half precision.
    """
    made = {}
    for name, tensor in tensors.items():
        made[name] = tensor.to(dtype) if tensor.ndim and tensor.is_floating_point() else tensor
        if dtype == torch.float16 and not torch.isfinite(made[name]).all():
            raise UnlearnError(f'"{name}" holds values above 65504, the largest that fp16 can hold. Use --dtype fp32.')
    return made


def _ordered(tensors: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Widest numbers first, so that each tensor starts at a multiple of its own, then by name."""
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
