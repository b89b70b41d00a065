"""The denoising networks of the DDPM experiments: new ones in two sizes, or a published one to fine-tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from sd_unlearn.errors import UnlearnError, UsageError, reason
from sd_unlearn.io.files import atomic_path
from sd_unlearn.io.noise import silence_libraries
from sd_unlearn.paper.experiments import Size

PIPELINE_DIR = "pipeline"  # of a run folder, for DDPMPipeline.from_pretrained()
# UNet2DModel's blocks, from the highest resolution to the lowest; `attention`: the level that has it, as in the paper.
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
    """A UNet with random weights (from torch's global generator) for images [B, channels, side, side].

    conditions: number of classes of `class_labels`; 0: an unconditional model.
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
    """The UNet and schedule of a published DDPM: a hub id or the folder of a DDPMPipeline.

    Raises:
        UsageError: a folder without a model, a model for other images, or one that does not predict noise.
        UnlearnError: it cannot be loaded.
    """
    silence_libraries()
    option = f"--pretrained_model_name_or_path {name}"
    if Path(name).is_dir() and not (Path(name) / "model_index.json").is_file():
        raise UsageError(f"{option} has no model_index.json. Choose the folder of a DDPMPipeline.")
    try:
        pipeline = DDPMPipeline.from_pretrained(name)
    except Exception as error:  # no network, an unknown id, a damaged folder: diffusers has a class for each
        raise UnlearnError(
            f"{option} cannot be loaded ({reason(error)}). It is downloaded from the Hub; without a network, copy its "
            "folder here and give its path."
        ) from error
    unet = pipeline.unet
    if not isinstance(unet, UNet2DModel):
        raise UsageError(f"{option} has a {type(unet).__name__}, but a DDPM needs a UNet2DModel.")
    if unet.config.in_channels != channels:
        raise UsageError(f"{option} has {unet.config.in_channels} channels; this experiment needs {channels}.")
    if unet.config.sample_size != side:
        raise UsageError(f"{option} has images of {unet.config.sample_size} pixels; this experiment needs {side}.")
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    if schedule.config.prediction_type != "epsilon":
        raise UsageError(f"{option} predicts {schedule.config.prediction_type}; a model that predicts noise is needed.")
    return unet, schedule


def save_pipeline(unet: UNet2DModel, schedule: DDPMScheduler, folder: Path) -> None:
    """Write folder/pipeline, completely or not at all."""
    with atomic_path(folder / PIPELINE_DIR) as temporary:
        DDPMPipeline(unet, schedule).save_pretrained(str(temporary))
