"""Generate images with a DDPM, each from its own seed; finished batches survive an interruption."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from numpy.typing import NDArray
from torch import Tensor

from sd_unlearn.io.files import atomic_path
from sd_unlearn.io.own_files import delete_own
from sd_unlearn.io.progress import track
from sd_unlearn.paper.experiments import Sampler
from sd_unlearn.seeds import EVALUATE_SEEDS, image_seed

SAMPLES = "samples.npz"  # arr_0 [n, side, side, channels] uint8, the format of evaluation suites such as ADM's
PARTS_DIR = "samples-parts"


def make_sampler(name: Sampler, schedule: DDPMScheduler, steps: int) -> Any:
    """DDPM (Ho et al. 2020, algorithm 2) or DDIM with eta 0 (Song et al. 2021) over `steps` of the T timesteps."""
    scheduler = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[name].from_config(schedule.config)
    scheduler.set_timesteps(steps)
    return scheduler


@torch.no_grad()
def generate(unet: UNet2DModel, sampler: Any, seeds: list[int], conditions: Tensor | None = None) -> Tensor:
    """Images [len(seeds), C, side, side] in [-1, 1] on the CPU. An image depends on its seed, not on its batch.

    conditions: class of each image, long [len(seeds)]; None for an unconditional network.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    config, device = unet.config, unet.device
    shape = (config.in_channels, config.sample_size, config.sample_size)
    noisy = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    labels = {} if conditions is None else {"class_labels": conditions.to(device)}
    extra = {"generator": generators} if isinstance(sampler, DDPMScheduler) else {}
    for timestep in sampler.timesteps:
        noise = unet(noisy, timestep, **labels).sample
        noisy = sampler.step(noise, timestep, noisy, **extra).prev_sample
    return noisy.clamp(-1, 1).cpu()


def generate_all(
    unet: UNet2DModel, sampler: Any, folder: Path, count: int, seed: int, batch_size: int, classes: int = 0
) -> None:
    """Write `count` images [count, side, side, C] to folder/samples.npz. Every process calls this for its share.

    Args:
        seed: Seed of the run; the seeds of the images are derived from it in the evaluation's range.
        classes: Number of classes of a conditional network, which are cycled through; 0: unconditional.
    """
    state, parts = PartialState(), folder / PARTS_DIR
    parts.mkdir(parents=True, exist_ok=True)
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    files = [parts / f"{batch.start:06d}-{batch.stop:06d}.npy" for batch in batches]  # other batch sizes, other names
    mine = list(zip(batches, files, strict=True))[state.process_index :: state.num_processes]
    for batch, file in track(mine, "generate", "batch", shown=state.is_main_process):
        if not file.is_file():
            conditions = torch.tensor([i % classes for i in batch]) if classes else None
            seeds = [image_seed(EVALUATE_SEEDS, seed, "paper", i) for i in batch]
            _save(file, to_bytes(generate(unet, sampler, seeds, conditions)))
    state.wait_for_everyone()
    if state.is_main_process:
        _save(folder / SAMPLES, np.concatenate([np.load(file) for file in files]))
        delete_own(parts, (r"\d+-\d+\.npy",))
        with contextlib.suppress(OSError):  # it holds files of others
            parts.rmdir()


def load_samples(folder: Path) -> NDArray[np.uint8]:
    """The images [n, side, side, C] that generate_all wrote."""
    with np.load(folder / SAMPLES) as content:
        return content["arr_0"]


def to_bytes(images: Tensor) -> NDArray[np.uint8]:
    """[n, C, side, side] in [-1, 1] -> [n, side, side, C] in 0..255."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def from_bytes(pixels: NDArray[np.uint8]) -> Tensor:
    """The inverse of to_bytes: [n, C, side, side] in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def _save(path: Path, pixels: NDArray[np.uint8]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:  # numpy adds an ending to a name
        if path.suffix == ".npz":
            np.savez_compressed(file, arr_0=pixels)
        else:
            np.save(file, pixels)
