"""Trainings of the leaderboards: what is finished is not repeated, and what was interrupted is continued."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sd_unlearn
from sd_unlearn.config.paths import recorded
from sd_unlearn.config.train import TrainConfig, resolve_steps
from sd_unlearn.io.reading import file_sha256, json_sha256, read_yaml
from sd_unlearn.io.run_folder import ADAPTER_DIR, CHECKPOINT_DIR, CONFIG, TEXT_ADAPTER_DIR, TRAINING, UNET_DIR
from sd_unlearn.models.sampling import BASE_SAMPLERS

UNWATCHED: Mapping[str, Any] = {"validation_steps": 0, "report_to": "none"}  # without previews and logs


def train_once(concept: str, run: Path, options: Mapping[str, Any], concepts: int = 1) -> Path:
    """Train into `run` unless it holds such a training already.

    concepts: how many are erased at once. A finished training with other options, e.g. of former defaults, is repeated.
    """
    if not (run / TRAINING).is_file():
        sd_unlearn.train(concept, output_dir=run, **continued(run), **options)
    elif not is_current(run, options, concepts):
        sd_unlearn.train(concept, output_dir=run, overwrite=True, **options)
    return run


def is_current(run: Path, options: Mapping[str, Any], concepts: int = 1) -> bool:
    """Whether a finished training had these options and today's defaults.

    What a run does not record, e.g. the learning rate of a closed form, cannot differ.
    """
    config = TrainConfig(concept=[""], **options)
    now = recorded(config) | {"concept": None, "max_train_steps": resolve_steps(config, concepts, is_flow=False)}
    before = read_yaml(run / CONFIG, "")
    return all(None in (value, before.get(name)) or before[name] == value for name, value in now.items())


def sampling_of(base: str) -> dict[str, Any]:
    """Options that sample another base like a bundled one."""
    sampler = BASE_SAMPLERS[base]
    return {
        "num_inference_steps": sampler.steps,
        "guidance_scale": sampler.guidance_scale,
        "render_batch_size": sampler.batch_size,
    }


def continued(run: Path) -> dict[str, Any]:
    """Options of `train` that continue an interrupted run, from its last checkpoint if it has one."""
    if any(run.glob(f"{CHECKPOINT_DIR}/*")):
        return {"resume_from_checkpoint": "latest"}
    return {"overwrite": run.exists()}


def trained_files(run: Path) -> list[Path]:
    """The weights that a run has learned, without checkpoints."""
    return [
        file for folder in (ADAPTER_DIR, TEXT_ADAPTER_DIR, UNET_DIR) for file in run.glob(f"{folder}/*.safetensors")
    ]


def weights_in(folder: Path) -> str:
    """SHA-256 of the weights in a folder."""
    return file_sha256(*sorted(folder.rglob("*.safetensors")))


def digest(content: Any) -> str:
    """Identifies what JSON can hold."""
    return json_sha256(content)[:12]
