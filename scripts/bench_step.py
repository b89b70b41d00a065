"""Measure one variant of `bench.py step` in a process of its own, so that the peak memory is its own. Prints JSON."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch.nn.functional import mse_loss
from torch.optim.optimizer import register_optimizer_step_post_hook

from sd_unlearn.config.batching import EFFECTIVE_BATCH_SIZE
from sd_unlearn.config.objective import Weights
from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.layout import Layout
from sd_unlearn.io.files import write_jsonl
from sd_unlearn.io.reading import read_json
from sd_unlearn.io.run_folder import METADATA, POSITIVE, UNLABELED, ImageRecord
from sd_unlearn.models import lora
from sd_unlearn.models.source import DIGITS, DIGITS_DIR
from sd_unlearn.training.provenance import device_name, peak_memory_mb

WARM_UP = 2  # steps that are not measured, while allocators and caches fill
RANK, CONCEPT, IMAGES = 8, "seven", 16


@dataclass(frozen=True)
class Setting:
    """The sizes that all variants have in common."""

    source: Path
    name: str
    pixels: int  # side of an image
    side: int  # side of the latents
    batch_size: int
    tokens: int
    width: int  # of the text embeddings

    @classmethod
    def of(cls, base: str) -> Setting:
        """Digits with its default settings, or a folder with a base of the size of SD 1.5: 128 pixels, batch size 5."""
        source = DIGITS_DIR if base == DIGITS else Path(base)
        text, vae, unet = (read_json(source / part / "config.json") for part in ("text_encoder", "vae", "unet"))
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        side, batch = (unet["sample_size"], EFFECTIVE_BATCH_SIZE) if base == DIGITS else (128 // factor, 5)
        return cls(source, base, side * factor, side, batch, text["max_position_embeddings"], text["hidden_size"])

    @property
    def rows(self) -> int:
        """Images in a step of the trainer, with the two caption groups of --caption_mode both."""
        return Layout.of(self.batch_size, 2, True).total(2)


class Recorder:
    """Records the time of every optimizer step in this process, and the number of rows that the UNet processes."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []  # wall time and CPU time
        self.forward_rows, forward = 0, UNet2DConditionModel.forward

        def counted(unet: Any, sample: Any, *arguments: Any, **options: Any) -> Any:
            self.forward_rows += len(sample) if sample.device.type != "meta" else 0  # the plan counts on that device
            return forward(unet, sample, *arguments, **options)

        UNet2DConditionModel.forward = counted
        register_optimizer_step_post_hook(self.mark)

    def mark(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # so that the time includes the work of the GPU
        self.marks.append((time.perf_counter(), time.process_time()))

    def result(self) -> dict[str, Any]:
        steps = np.diff(self.marks, axis=0)[WARM_UP - 1 :].round(5)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return {
            "seconds": steps[:, 0].tolist(),
            "cpu_seconds": steps[:, 1].tolist(),
            "peak_memory_mb": peak_memory_mb(),
            "forward_rows": self.forward_rows / len(self.marks),
            "device": device_name(device),
            "threads": torch.get_num_threads(),
        }


def floor(setting: Setting, steps: int, work: Path) -> None:
    """The lower bound of a LoRA step: forward, backward and AdamW of a bare UNet, on tensors in memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = UNet2DConditionModel.from_pretrained(setting.source / "unet").requires_grad_(False).eval().to(device)
    model = lora.attach(unet, Weights(rank=RANK), lora.network_targets(unet, None), 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)
    noisy, target = torch.randn(2, setting.rows, 4, setting.side, setting.side, device=device)
    timesteps = torch.randint(0, 1000, (setting.rows,), device=device)
    text = torch.randn(setting.rows, setting.tokens, setting.width, device=device)
    for _ in range(steps):
        mse_loss(model(noisy, timesteps, encoder_hidden_states=text).sample, target).backward()
        optimizer.step()
        optimizer.zero_grad()


def common(setting: Setting, steps: int, work: Path) -> None:
    """A step of common trainers: VAE and text encoder run on every batch, all weights of the UNet are trained."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        setting.source, safety_checker=None, requires_safety_checker=False
    )
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    unet, vae, schedule = pipeline.unet, pipeline.vae.requires_grad_(False), pipeline.scheduler
    pipeline.text_encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.train().parameters(), lr=1e-6, fused=True)
    pixels = torch.randn(setting.rows, 3, setting.pixels, setting.pixels)
    ids = pipeline.tokenizer(
        ["a photo of the digit seven"] * setting.rows,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
        max_length=setting.tokens,
    ).input_ids
    for _ in range(steps):
        with torch.no_grad():
            latents = vae.encode(pixels.to(vae.device)).latent_dist.sample() * vae.config.scaling_factor
            text = pipeline.text_encoder(ids.to(vae.device))[0]
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (setting.rows,), device=vae.device)
        noisy = schedule.add_noise(latents, noise, timesteps)
        mse_loss(unet(noisy, timesteps, encoder_hidden_states=text).sample, noise).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def ours(target: Literal["teacher", "noise"]) -> Callable[[Setting, int, Path], None]:
    """The trainer's loop as a user starts it, on a folder of images."""

    def run(setting: Setting, steps: int, work: Path) -> None:
        from sd_unlearn.training import trainer

        data = make_folder(work / f"data-{setting.pixels}", setting.pixels)
        trainer.run(
            TrainConfig(
                concept=CONCEPT,
                pretrained_model_name_or_path=setting.name,
                data_dir=data,
                resolution=setting.pixels,
                output_dir=work / f"run-{target}",
                overwrite=True,
                target=target,
                rank=RANK,
                max_train_steps=steps,
                effective_batch_size=setting.batch_size,
                beta=0.1,
                validation_steps=0,
                checkpointing_steps=0,
                gradient_share_steps=0,
                report_to="none",
                mixed_precision="no",
            )
        )

    return run


def make_folder(folder: Path, pixels: int) -> Path:
    """Write a data folder of random images: IMAGES each of the generic prompt, of keep prompts and of the concept."""
    rng = np.random.default_rng(0)
    for sub, groups in ((UNLABELED, ("generic", "keep")), (POSITIVE, ("positive",))):
        (folder / sub).mkdir(parents=True, exist_ok=True)
        records = []
        for group in groups:
            for i in range(IMAGES):
                name, text = f"{group}-{i}.png", "a photo of the digit " + ("seven" if group == "positive" else "four")
                Image.fromarray(rng.integers(0, 255, (pixels, pixels, 3), np.uint8)).save(folder / sub / name)
                records.append(ImageRecord(name, text, i, 0.0, 0, group))
        write_jsonl(folder / sub / METADATA, records)
    return folder


VARIANTS = {"floor": floor, "noise": ours("noise"), "teacher": ours("teacher"), "common": common}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("base", help="digits, or a Diffusers folder made by bench_base.py")
    parser.add_argument("steps", type=int, help="measured steps")
    parser.add_argument("work_dir", type=Path, help="folder for images and the run")
    args = parser.parse_args()
    setting, recorder = Setting.of(args.base), Recorder()
    VARIANTS[args.variant](setting, WARM_UP + args.steps, args.work_dir)
    print(json.dumps({"variant": args.variant, "rows": setting.rows, **recorder.result()}))


if __name__ == "__main__":
    main()
