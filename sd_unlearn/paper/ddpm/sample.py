"""Pictures of a DDPM, each from its own seed, drawn in parts that a killed run keeps."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from sd_unlearn.paper.experiments import Sampler
from sd_unlearn.seeds import EVALUATE_SEEDS, image_seed

SAMPLES = "samples.npz"  # arr_0 [n, side, side, channels] uint8, as evaluation suites of this field read them
PARTS_DIR = "samples-parts"


def make_sampler(name: Sampler, schedule: DDPMScheduler, steps: int) -> Any:
    """DDPM (Ho et al. 2020, algorithm 2) or DDIM with eta 0 (Song et al. 2021) over `steps` of the T timesteps."""
    scheduler = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[name].from_config(schedule.config)
    scheduler.set_timesteps(steps)
    return scheduler


@torch.no_grad()
def draw(unet: UNet2DModel, sampler: Any, seeds: list[int], conditions: Tensor | None = None) -> Tensor:
    """Pictures [len(seeds), C, side, side] in [-1, 1] on the CPU; a picture depends on its seed, not on its batch.

    conditions: [len(seeds)] long, the class each is asked of; None for an unconditional network.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    config, device = unet.config, unet.device
    shape = (config.in_channels, config.sample_size, config.sample_size)
    noisy = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    told = {} if conditions is None else {"class_labels": conditions.to(device)}
    for timestep in sampler.timesteps:
        noise = unet(noisy, timestep, **told).sample
        extra = {"generator": generators} if isinstance(sampler, DDPMScheduler) else {}
        noisy = sampler.step(noise, timestep, noisy, **extra).prev_sample
    return noisy.clamp(-1, 1).cpu()


def draw_all(
    unet: UNet2DModel, sampler: Any, folder: Path, count: int, seed: int, batch_size: int, classes: int = 0
) -> None:
    """Write folder/samples.npz with `count` pictures [count, side, side, C]; those of a killed run are kept.

    seed: of the run; the pictures' own are of the evaluation's range. classes: of a conditional network, asked for in
    turn; 0: unconditional. Called by every process, each of which draws its share.
    """
    state, parts = PartialState(), folder / PARTS_DIR
    parts.mkdir(parents=True, exist_ok=True)
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    files = [parts / f"{which.start:06d}-{which.stop:06d}.npy" for which in batches]  # other batches, other files
    mine = list(zip(batches, files, strict=True))[state.process_index :: state.num_processes]
    for which, file in tqdm(mine, desc="draw", unit="batch", file=sys.stderr, disable=not state.is_main_process):
        if not file.is_file():
            asked = torch.tensor([i % classes for i in which]) if classes else None
            seeds = [image_seed(EVALUATE_SEEDS, seed, "paper", i) for i in which]
            _save(file, as_bytes(draw(unet, sampler, seeds, asked)))
    state.wait_for_everyone()
    if state.is_main_process:
        _save(folder / SAMPLES, np.concatenate([np.load(file) for file in files]))
        shutil.rmtree(parts)


def load_samples(folder: Path) -> NDArray[np.uint8]:
    """What draw_all wrote."""
    with np.load(folder / SAMPLES) as found:
        return found["arr_0"]


def as_bytes(pictures: Tensor) -> NDArray[np.uint8]:
    """[n, C, side, side] in [-1, 1] -> [n, side, side, C] in 0..255."""
    return ((pictures + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def as_pictures(pixels: NDArray[np.uint8]) -> Tensor:
    """What as_bytes gave, back: [n, C, side, side] in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def _save(path: Path, pixels: NDArray[np.uint8]) -> None:
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # numpy goes by the ending
    if path.suffix == ".npz":
        np.savez_compressed(temporary, arr_0=pixels)
    else:
        np.save(temporary, pixels)
    temporary.replace(path)
