"""Names of the files and folders of a run, and of its training images.

Each stage writes its manifest last, and every write is atomic: if a manifest exists, its stage is complete.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sd_unlearn.errors import UsageError
from sd_unlearn.io.reading import file_sha256

UNLABELED, POSITIVE, NEGATIVE = "0_unlabeled", "1_positive", "2_negative"
DATA_MANIFEST, METADATA = "manifest.json", "metadata.jsonl"
TRAINING, RESULTS, METRICS, CONFIG, CONCEPT = (
    "training.json",
    "results.json",
    "metrics.jsonl",
    "config.yaml",
    "concept.yaml",
)
ADAPTER_DIR, TEXT_ADAPTER_DIR, UNET_DIR = "adapter", "text_encoder_adapter", "unet"
WEIGHTS_FILE = "adapter_model.safetensors"  # in a folder of an adapter
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # in an export: the LoRA for Diffusers
PREVIEW_DIR, EXPORT_DIR, IMAGE_DIR = "previews", "export", "images"
CALIBRATION = "calibration.json"  # the strengths that erase and retain enough
EVALUATION = "evaluate.yaml"  # the options of an evaluation, for `evaluate --config`
BEST_DIR, CHECKPOINT_DIR = "best", "checkpoints"
PROBE = "probe.json"  # in the folder of the best weights: the step they are of, and what the probe measured
IMAGE_SUFFIXES = frozenset(
    ".png .jpg .jpeg .jfif .webp .avif .gif .tif .tiff .bmp .heic .heif".split()  # in any case
)


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """One generated image; a line of metadata.jsonl."""

    file_name: str
    text: str
    seed: int
    guidance_scale: float
    steps: int
    group: str  # generic | mixed_in | keep | positive


def check_trained(folder: Path) -> None:
    """Refuse a folder that is not the run folder of a finished training.

    Raises:
        UsageError
    """
    if not folder.is_dir():
        raise UsageError(f"--run {folder} does not exist. Name the run folder of a finished training.")
    for name in (TRAINING, CONCEPT):
        if not (folder / name).is_file():
            raise UsageError(f"--run {folder} holds no finished training: {folder / name} is missing. Train first.")


def weights_sha256(run: Path) -> str:
    """SHA-256 (hexadecimal) of a run's trained weights.

    Raises:
        UsageError: the run folder contains neither a LoRA nor a UNet.
    """
    names = (
        f"{ADAPTER_DIR}/{WEIGHTS_FILE}",
        f"{TEXT_ADAPTER_DIR}/{WEIGHTS_FILE}",
        f"{UNET_DIR}/diffusion_pytorch_model.safetensors",
    )
    files = [run / name for name in names if (run / name).is_file()]
    if not files:
        raise UsageError(f"--run {run} contains no trained LoRA ({run / names[0]}). Run sd-unlearn train first.")
    return file_sha256(*files)
