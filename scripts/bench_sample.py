"""What generating images with sd-unlearn costs over the bare pipeline of Diffusers, at the same batch size.

Both variants run in one process on one loaded base, in interleaved rounds: `bare` calls the pipeline and saves PNG
files with Pillow; `ours` is what `render` and `evaluate` do (`generate_missing`): a random generator for each image,
latents checked and decoded apart from the sampling, files that are written whole and synced to disk.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from sd_unlearn.config.evaluate import EvaluateConfig
from sd_unlearn.models.base import Base, load_base
from sd_unlearn.models.find_base import find_base
from sd_unlearn.models.sampling import ImageRequest, Sampler, generate_missing, resolve_sampler

PROMPT = "a photo of the digit seven"


def bare(base: Base, sampler: Sampler, count: int, folder: Path) -> None:
    """The pipeline's own call, batch by batch."""
    for start in range(0, count, sampler.batch_size):
        size = min(sampler.batch_size, count - start)
        images = base.pipeline(
            [PROMPT] * size,
            num_inference_steps=sampler.steps,
            guidance_scale=sampler.guidance_scale,
            generator=torch.Generator().manual_seed(start),
        ).images
        for number, image in enumerate(images, start):
            image.save(folder / f"{number}.png")


def ours(base: Base, sampler: Sampler, count: int, folder: Path) -> None:
    """As `render` and `evaluate` generate them."""
    requests = [ImageRequest(folder / f"{n}.png", PROMPT, n) for n in range(count)]
    generate_missing(lambda: base, requests, sampler, "generate")


def sample(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each variant in each round: {base, images, rounds, seconds, cpu_seconds, ratio}."""
    options = EvaluateConfig(pretrained_model_name_or_path=args.base, num_inference_steps=args.inference_steps)
    source = find_base(options)
    base = load_base(source)
    base.pipeline.set_progress_bar_config(disable=True)
    sampler = resolve_sampler(options, source)
    measured: dict[str, list[tuple[float, float]]] = {"bare": [], "ours": []}
    for number in range(args.rounds + 1):
        for name, generate in {"bare": bare, "ours": ours}.items():
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter(), time.process_time()
                generate(base, sampler, args.images, Path(folder))
                if number:  # caches and allocators fill in the first round
                    measured[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    wall, cpu = ({n: statistics.median(both[i] for both in m) for n, m in measured.items()} for i in (0, 1))
    return {
        "base": args.base,
        "images": args.images,
        "batch_size": sampler.batch_size,
        "steps": sampler.steps,
        "seconds": wall,
        "cpu_seconds": cpu,
        "ratio": wall["ours"] / wall["bare"],
        "cpu_ratio": cpu["ours"] / cpu["bare"],
    }


def sample_table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = ["| variant | seconds | / bare | CPU seconds | / bare |", "|---|---|---|---|---|"]
    wall, cpu = result["seconds"], result["cpu_seconds"]
    for name in wall:
        ratios = wall[name] / wall["bare"], cpu[name] / cpu["bare"]
        lines.append(f"| {name} | {wall[name]:.2f} | {ratios[0]:.2f} | {cpu[name]:.2f} | {ratios[1]:.2f} |")
    size, steps = result["batch_size"], result["steps"]
    return "\n".join([*lines, "", f"{result['base']}: {result['images']} images in batches of {size}, {steps} steps."])
