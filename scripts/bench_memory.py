"""Compare the predicted memory of a training step with the measured one. Prints a Markdown table.

    python scripts/bench_memory.py --json build/memory.json

A UNet of the size of SD 1.5 with random weights (memory does not depend on their values) takes one LoRA step on the
CPU, at 128 and 256 pixels, with and without gradient checkpointing, with 1 to 4 images, on one thread. Each cell is a
process of its own, of which the growth of the peak (VmHWM, so Linux only) is measured, from before the UNet is created.
It takes about 4 GB of weights and a quarter of an hour. --json keeps finished cells, so an interrupted run continues.

ratio: predicted / measured growth, weights included. ratio of the step: the same without the weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from sd_unlearn.config.objective import LoraTargets
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.io.reading import read_json
from sd_unlearn.models import performance
from sd_unlearn.models.fit import MIB, Device, Training
from sd_unlearn.models.footprint import StepOptions, count_inference, count_training
from sd_unlearn.models.meta import read_configs
from sd_unlearn.models.source import SINGLE_FILE_DIR, Source
from sd_unlearn.models.student import make_student
from sd_unlearn.training.optim import make_optimizer

LAYERS: LoraTargets = "attention"  # of the runs on the page
BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
CELLS = [(pixels, on, images) for images, on, pixels in product((1, 2, 3, 4), (False, True), (128, 256))]


def status(key: str) -> int:
    """A value of /proc/self/status in bytes: VmRSS, the memory now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key))) * 1024


def measure(pixels: int, checkpointing: bool, images: int) -> dict[str, float]:
    """Growth of this process in MiB: of the weights, and of the peak of the first step. Run it in a fresh process."""
    torch.set_num_threads(1)
    options = TrainConfig(gradient_checkpointing=checkpointing, lora_targets=LAYERS)
    config = read_json(SINGLE_FILE_DIR / "sd1" / "unet" / "config.json")
    gc.collect()
    start = status("VmRSS")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config).requires_grad_(False).eval()
    unet.to_empty(device="cpu")
    for weight in (*unet.parameters(), *unet.buffers()):
        torch.nn.init.uniform_(weight, -0.02, 0.02)
    performance.prepare(unet, options)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    student = make_student(SimpleNamespace(network=unet), options, 0, True)  # type: ignore[arg-type]
    optimizer = make_optimizer(student.trainable(), options)
    weights = status("VmRSS") - start
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    latents, text = torch.randn(images, 4, pixels // 8, pixels // 8), torch.randn(images, 77, 768)
    student.model(latents, torch.zeros(images).long(), encoder_hidden_states=text).sample.pow(2).mean().backward()
    optimizer.step()
    return {"weights": weights / MIB, "peak": (status("VmHWM") - start) / MIB}


def predict(pixels: int, checkpointing: bool, images: int) -> dict[str, float]:
    """What the plan of a training says for the same: MiB of the weights and of the step's peak, without a VAE."""
    configs = read_configs(Source(BASE))
    frozen = count_inference(configs, "no", pixels)
    trained = count_training(configs, StepOptions(lora_targets=LAYERS), "no", pixels)
    step = Training(frozen, Device("cpu", "the CPU", 0), trained).step(images, checkpointing)
    return {"weights": frozen.network / MIB, "peak": (step.total - frozen.vae) / MIB}


def table(measured: dict[str, dict[str, float]]) -> str:
    """Markdown with a row per cell; measured: by name."""
    lines = ["| pixels | checkpointing | images | predicted | measured | ratio | ratio of the step |", "|" + "---|" * 7]
    for pixels, on, images in CELLS:
        found, foreseen = measured.get(name_of(pixels, on, images)), predict(pixels, on, images)
        if found:
            found_peak = f"{found['peak']:,.0f} MB"
            steps = [values["peak"] - values["weights"] for values in (foreseen, found)]
            lines.append(
                f"| {pixels} | {'yes' if on else 'no'} | {images} | {foreseen['peak']:,.0f} MB | {found_peak} "
                f"| {foreseen['peak'] / found['peak']:.2f} | {steps[0] / steps[1]:.2f} |"
            )
    return "\n".join(lines)


def name_of(pixels: int, checkpointing: bool, images: int) -> str:
    return f"{pixels} {'checkpointing' if checkpointing else 'plain'} {images}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file that keeps the measured values")
    parser.add_argument("--cell", nargs=3, type=int, metavar=("PIXELS", "CHECKPOINTING", "IMAGES"), help="measure one")
    args = parser.parse_args(arguments)
    if args.cell:
        pixels, on, images = args.cell
        print(json.dumps(measure(pixels, bool(on), images)))
        return
    measured: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.is_file() else {}
    for cell in CELLS:
        if name_of(*cell) not in measured:
            command = [sys.executable, __file__, "--cell", *(str(int(value)) for value in cell)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            measured[name_of(*cell)] = json.loads(done.stdout.splitlines()[-1])
            print(name_of(*cell), measured[name_of(*cell)], file=sys.stderr, flush=True)
            if args.json:
                args.json.write_text(json.dumps(measured, indent=2) + "\n")
    print(table(measured))


if __name__ == "__main__":
    main()
