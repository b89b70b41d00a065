"""The small named types that pass between stages, and how they lie on disk.

A stage writes its files first and its manifest last, both through a temporary name and a rename, so a file
under its final name is always whole and a manifest's presence means its stage was finished.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import unicodedata
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sd_unlearn.errors import UnlearnError, UsageError

UNLABELED, POSITIVE, NEGATIVE = "0_unlabeled", "1_positive", "2_negative"
DATA_MANIFEST, METADATA = "manifest.json", "metadata.jsonl"
TRAINING, RESULTS, METRICS, CONFIG, CONCEPT = (
    "training.json", "results.json", "metrics.jsonl", "config.yaml", "concept.yaml",
)  # fmt: skip
ADAPTER_DIR, TEXT_ADAPTER_DIR, UNET_DIR = "adapter", "text_encoder_adapter", "unet"
PREVIEW_DIR, EXPORT_DIR, IMAGE_DIR = "previews", "export", "images"
EVALUATION = "evaluate.yaml"  # what an evaluation was asked, for `evaluate --config`
BEST_DIR, CHECKPOINT_DIR = "best", "checkpoints"
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})

# One range of seeds a purpose, so that nothing is judged on noise it was trained on.
SEED_SPAN = 1_000_000_000
RENDER_SEEDS = (0, SEED_SPAN)
TRAIN_SEEDS = (SEED_SPAN, 2 * SEED_SPAN)
EVALUATE_SEEDS = (2 * SEED_SPAN, 3 * SEED_SPAN)


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """One rendered image; a line of metadata.jsonl."""

    file_name: str
    text: str
    seed: int
    guidance_scale: float
    steps: int
    group: str  # generic | mixed_in | keep | positive


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure of results.json. Every rate says what was counted, n and a 95 % interval."""

    metric: str
    group: str
    subject: str  # base, or the id of a LoRA or folder of images
    value: float | None  # None: unknown, e.g. a ratio over zero
    n: int
    low: float | None = None
    high: float | None = None
    detector: str = ""
    interval: str = ""  # wilson | paired-bootstrap | bootstrap | none
    note: str = ""
    concept: str = ""
    seeds: tuple[float, ...] | None = None  # the value for each of several seeds


@dataclasses.dataclass(frozen=True)
class Pair:
    """One prompt and seed drawn with and without a LoRA; paths are relative to the folder of results.json."""

    concept: str
    subject: str
    group: str
    prompt: str
    seed: int
    base: str  # "" where there is none
    image: str
    expected: str = ""
    base_read: str = ""
    image_read: str = ""
    leak: bool = False
    lost: bool = False  # was as asked, and is no more
    faces: tuple[tuple[float, ...], ...] = ()  # [x0, y0, x1, y1] as shares of width and height
    base_faces: tuple[tuple[float, ...], ...] = ()


def image_seed(span: tuple[int, int], seed: int, prompt: str, index: int) -> int:
    """Seed of the index-th image of a prompt: the same whatever else is drawn, inside its purpose's range."""
    digest = hashlib.blake2b(f"{seed}\0{prompt}\0{index}".encode(), digest_size=8).digest()
    return span[0] + int.from_bytes(digest, "big") % (span[1] - span[0])


def slugify(name: str) -> str:
    """A file name from any concept name: letters, digits and hyphens, never empty, never a path."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60].strip("-")
    return slug or f"concept-{zlib.crc32(name.encode()):08x}"


def write_text(path: Path, text: str) -> None:
    """As write_bytes, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write through a temporary name, so a reader never sees half a file.

    Raises:
        UnlearnError: when the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)
        raise UnlearnError(f"Cannot write {path}: {error.strerror}. Choose another folder.") from error


def check_writable(folder: Path, option: str) -> None:
    """Refuse, creating nothing, a folder that could not be made or written.

    Raises:
        UsageError: naming the option.
    """
    nearest = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UsageError(f"{option} {folder} cannot be written: {nearest} is no folder you may write to. Name another.")


def write_json(path: Path, data: Any) -> None:
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UsageError: when it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid JSON ({error}). Delete it and run the stage again.") from None


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    lines = (json.dumps(dataclasses.asdict(r), ensure_ascii=False) for r in records)
    write_text(path, "".join(line + "\n" for line in lines))


def read_jsonl_lines(path: Path) -> dict[int, dict[str, Any]]:
    """Line number, from 1, -> object of a JSONL file; blank lines passed over.

    Raises:
        UsageError: naming the line that is not a JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON strings may hold U+2028 and U+0085
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from None
    records = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{path} line {number} is not JSON ({error.msg}). Mend or delete the line.") from None
        if not isinstance(record, dict):
            raise UsageError(f"{path} line {number} is not a JSON object. Mend or delete the line.")
        records[number] = record
    return records


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, as read_jsonl_lines."""
    return list(read_jsonl_lines(path).values())


def file_sha256(*files: Path) -> str:
    """SHA-256 of what files hold, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as data:
            while block := data.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def weights_sha256(run: Path) -> str:
    """SHA-256 of what a run has learned.

    Raises:
        UsageError: the run folder holds neither a LoRA nor a UNet.
    """
    names = (f"{ADAPTER_DIR}/adapter_model.safetensors", f"{TEXT_ADAPTER_DIR}/adapter_model.safetensors",
             f"{UNET_DIR}/diffusion_pytorch_model.safetensors")  # fmt: skip
    files = [run / name for name in names if (run / name).is_file()]
    if not files:
        raise UsageError(f"--run {run} holds no trained LoRA ({run / names[0]}). Run sd-unlearn train first.")
    return file_sha256(*files)
