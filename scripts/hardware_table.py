"""Print docs/hardware.md's tables: what is chosen for each card and base, and the memory it is predicted to take.

    python scripts/hardware_table.py

Needs no GPU, no weights and no network. What was measured is read from docs/hardware-measured.json, if it exists.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from sd_unlearn.config.batching import Batching
from sd_unlearn.config.loop import Quantization
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.repeated import REPEATED_STEPS
from sd_unlearn.models.fit import GIB, Training, other_device
from sd_unlearn.models.footprint import StepOptions, count_inference, count_training, size_of
from sd_unlearn.models.meta import Configs, build_meta_base, read_configs
from sd_unlearn.models.quantized import quantize_linear_layers
from sd_unlearn.models.sampling import DEFAULT_SAMPLER
from sd_unlearn.models.source import Source

MEASURED = Path(__file__).parents[1] / "docs" / "hardware-measured.json"
CARDS = (6, 8, 12, 16, 24, 40, 80)  # GB
BASES = {
    "SD 1.5": ("stable-diffusion-v1-5/stable-diffusion-v1-5", 512),
    "SD 2.1": ("stabilityai/stable-diffusion-2-1", 768),
    "SDXL": ("stabilityai/stable-diffusion-xl-base-1.0", 1024),
}
# In bf16, at 512 pixels.
FLOW_BASES = {
    "SD 3.5 medium": "stabilityai/stable-diffusion-3.5-medium",
    "FLUX.1 dev": "black-forest-labs/FLUX.1-dev",
    "FLUX.2 klein 4B": "black-forest-labs/FLUX.2-klein-base-4B",
    "Z-Image": "Tongyi-MAI/Z-Image",
    "Qwen-Image": "Qwen/Qwen-Image",
}
FLOW_CARDS = (12, 16, 24, 40, 80)
FLOW_OPTIONS: tuple[tuple[bool, Quantization | None], ...] = (
    (False, None),
    (True, None),
    (True, "int8"),
    (True, "nf4"),
)
FLOW_COLUMNS = ("card", "base", "options", "micro-batch", "images generated at once", "predicted peak", "in phase")
IMAGES, CAPTIONS = 40, 64  # of a training step; encoded at once
REPEATED = REPEATED_STEPS * IMAGES  # images of the steps that --teacher_reuse repeats
COLUMNS = (
    *("card", "base, pixels", "micro-batch", "checkpointing", "images a step", "images generated at once"),
    *(
        "predicted peak",
        "in phase",
        "micro-batch with int8, nf4",
        "measured peak",
        "seconds a step",
        "images a second of render",
    ),
)


def row(card: int, base: str, measured: dict[str, list[str]]) -> str:
    """A line of the table: fp16, LoRA of rank 8, the default options."""
    name, pixels = BASES[base]
    configs, device = read_configs(Source(name)), other_device(card * GIB)
    footprint = count_training(configs, step_options(), "fp16", pixels)
    training = Training(count_inference(configs, "fp16", pixels), device, footprint, repeated=REPEATED)
    quantized = [
        replace(training, trained=replace(footprint, network=quantized_size(configs, kind))) for kind in ("int8", "nf4")
    ]
    batching = choose(training)
    phases = training.phases(batching, CAPTIONS, rendering=True, teacher=True, previews=True)
    peak = max(phases, key=lambda phase: phase.total)
    size, render = batching.micro_batch_size, batching.render_batch_size
    cut = f"{IMAGES} = {math.ceil(IMAGES / size)} x {size}" if IMAGES % size == 0 else f"{IMAGES}, {size} at a time"
    cells = [
        f"{card} GB",
        f"{base}, {pixels}",
        str(size),
        "yes" if batching.gradient_checkpointing else "no",
        cut,
        f"{render}{', in tiles' if training.needs_tiles(render) else ''}",
        f"{peak.total / GIB:.1f} GB",
        peak.name,
        ", ".join(f"{b.micro_batch_size}{'*' * b.gradient_checkpointing}" for b in map(choose, quantized)),
    ]
    if peak.total > device.usable:
        cells = [*cells[:2], *["does not fit"], *["–"] * 3, *cells[6:8], "–"]
    return f"| {' | '.join([*cells, *measured.get(f'{card} GB, {base}', ['', '', ''])])} |"


def step_options(quantize_base: Quantization | None = None) -> StepOptions:
    """Those of a training with the default options."""
    return StepOptions.of(TrainConfig(concept=[""], quantize_base=quantize_base))


@cache
def quantized_size(configs: Configs, kind: Quantization) -> int:
    """Bytes of the weights of a quantized UNet; nothing else that a step keeps differs."""
    unet = build_meta_base(configs, torch.float16).network
    quantize_linear_layers(unet, kind)
    return size_of(unet)


def choose(training: Training) -> Batching:
    """The batches of a training with the default options."""
    captions = min(CAPTIONS, training.footprint.captions_at_once)
    return training.choose(IMAGES, DEFAULT_SAMPLER.batch_size, captions)


def table() -> str:
    measured = json.loads(MEASURED.read_text()) if MEASURED.is_file() else {}
    head = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    return "\n".join([*head, *(row(card, base, measured) for base in BASES for card in CARDS)])


def flow_row(card: int, base: str, offload: bool, quantize_base: Quantization | None) -> str:
    """A line of the table of flow-matching bases: bf16, LoRA of rank 8, 512 pixels."""
    configs, device = read_configs(Source(FLOW_BASES[base], offload=offload)), other_device(card * GIB)
    step = count_training(configs, step_options(quantize_base), "bf16", 512)
    training = Training(count_inference(configs, "bf16", 512), device, step, repeated=REPEATED)
    batching, captions = choose(training), training.footprint.captions_at_once
    phases = training.phases(batching, captions, rendering=True, teacher=True, previews=True)
    peak = max(phases, key=lambda phase: phase.total)
    options = ["--offload"] * offload + [f"--quantize_base {quantize_base}"] * bool(quantize_base)
    checkpointing = " with gradient checkpointing" * batching.gradient_checkpointing
    cells = [f"{batching.micro_batch_size}{checkpointing}", str(batching.render_batch_size)]
    if peak.total > device.usable:
        cells = ["does not fit", "–"]
    return f"| {' | '.join([f'{card} GB', base, ' '.join(options), *cells, f'{peak.total / GIB:.1f} GB', peak.name])} |"


def flow_table() -> str:
    head = [f"| {' | '.join(FLOW_COLUMNS)} |", "|" + "---|" * len(FLOW_COLUMNS)]
    rows = [flow_row(card, base, *options) for base in FLOW_BASES for card in FLOW_CARDS for options in FLOW_OPTIONS]
    return "\n".join([*head, *rows])


if __name__ == "__main__":
    print(table(), flow_table(), sep="\n\n")
