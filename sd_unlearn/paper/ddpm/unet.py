"""The denoising networks of the paper's DDPMs: from nothing in two sizes, or a published one to fine-tune."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.utils import logging

from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.paper.experiments import Size

PIPELINE_DIR = "pipeline"  # of a run folder: what DDPMPipeline.from_pretrained() loads
# UNet2DModel's blocks from the widest picture to the narrowest; attention where the paper has it.
_SHAPES: dict[Size, dict[str, Any]] = {
    "paper": {"block_out_channels": (128, 128, 256, 512), "layers_per_block": 2, "attention": 2},
    "tiny": {
        "block_out_channels": (16, 48, 80),
        "layers_per_block": 1,
        "attention": 2,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
    },
}


def make_network(size: Size, side: int, channels: int, conditions: int = 0) -> UNet2DModel:
    """A UNet with random weights (torch's global generator) for images [B, channels, side, side].

    conditions: how many classes it is told of by class_labels; 0: none, an unconditional model.
    """
    shape = dict(_SHAPES[size])
    attention, levels = shape.pop("attention"), len(shape["block_out_channels"])
    down = ["AttnDownBlock2D" if level == attention else "DownBlock2D" for level in range(levels)]
    up = [name.replace("Down", "Up") for name in reversed(down)]
    return UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        num_class_embeds=conditions or None,
        **shape,
    )


def make_schedule() -> DDPMScheduler:
    """T = 1,000 steps, beta_t from 1e-4 to 0.02 (Ho et al. 2020, section 4)."""
    return DDPMScheduler(num_train_timesteps=1000)


def load_network(name: str, side: int, channels: int) -> tuple[UNet2DModel, DDPMScheduler]:
    """The UNet and the schedule of a published DDPM, a hub id or a DDPMPipeline's folder.

    Raises:
        UsageError: a folder without a model, one for other images, one that predicts something else than noise.
        UnlearnError: it cannot be had.
    """
    logging.disable_progress_bar()
    option = "--pretrained_model_name_or_path"
    if Path(name).is_dir() and not (Path(name) / "model_index.json").is_file():
        raise UsageError(f"{option} {name} holds no model_index.json; name a DDPMPipeline's folder.")
    try:
        pipeline = DDPMPipeline.from_pretrained(name)
    except Exception as error:  # no network, no such id, a damaged folder: diffusers has a class for each
        reason = " ".join(str(error).split())[:200]
        raise UnlearnError(
            f"{option} {name} cannot be loaded ({reason}). With a network it is fetched from the hub; without one, "
            f"copy its folder here and name that."
        ) from error
    unet = pipeline.unet
    if not isinstance(unet, UNet2DModel):
        raise UsageError(f"{option} {name} holds a {type(unet).__name__}; a DDPM's UNet2DModel is needed.")
    if unet.config.in_channels != channels:
        raise UsageError(f"{option} {name} draws {unet.config.in_channels} channels; this experiment has {channels}.")
    if unet.config.sample_size != side:
        raise UsageError(f"{option} {name} draws {unet.config.sample_size} pixels a side; this experiment has {side}.")
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    if schedule.config.prediction_type != "epsilon":
        raise UsageError(
            f"{option} {name} predicts {schedule.config.prediction_type}; the paper's models predict noise."
        )
    return unet, schedule


def save_pipeline(unet: UNet2DModel, schedule: DDPMScheduler, folder: Path) -> None:
    """Write folder/pipeline, whole or not at all."""
    target = folder / PIPELINE_DIR
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        DDPMPipeline(unet, schedule).save_pretrained(str(temporary))
        shutil.rmtree(target, ignore_errors=True)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
