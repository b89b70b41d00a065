"""The Accelerate loop that trains a LoRA to forget: read `fit` top to bottom."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from diffusers.optimization import get_scheduler
from PIL import Image
from tqdm import tqdm

from sd_unlearn import lora
from sd_unlearn.base import DIGITS, Base, choose_precision, load_base, resolve_name
from sd_unlearn.batches import Batch, StratifiedBatches
from sd_unlearn.checks import as_dict, check_train
from sd_unlearn.concept import Concept, load_concept, write_concept
from sd_unlearn.dataset import CACHE_DIR, encode_captions, encode_images, scan
from sd_unlearn.denoiser import Denoiser
from sd_unlearn.embeddings import embed
from sd_unlearn.errors import UnlearnError, UsageError
from sd_unlearn.objectives.accumulate import accumulate_gradients
from sd_unlearn.objectives.losses import example_losses
from sd_unlearn.objectives.pu import LOGGED, PUObjective
from sd_unlearn.objectives.teacher import Teacher
from sd_unlearn.prior import check_countable, resolve_beta
from sd_unlearn.provenance import device_name, peak_memory_mb, training_record
from sd_unlearn.records import (
    CONCEPT,
    CONFIG,
    DATA_MANIFEST,
    METRICS,
    POSITIVE,
    PREVIEW_DIR,
    TRAIN_SEEDS,
    TRAINING,
    UNLABELED,
    check_writable,
    image_seed,
    write_json,
    write_text,
)
from sd_unlearn.render import data_dir_of, draw, plan, render_concept, sampler_of, save_image
from sd_unlearn.train_config import TrainConfig

LOG_EVERY = 10
# The text encoder of digits gives the generic caption nearly the empty one's embedding: both forget, or neither does.
UNCONDITIONAL = {DIGITS: 0.0}


def run(config: TrainConfig) -> Path:
    """Train the LoRA of a concept, rendering its folders first if they are missing. Returns the run folder.

    Raises:
        UsageError, UnlearnError: what is wrong, checked before a model is loaded wherever that is possible.
    """
    concept = load_concept(config.concept, config.anchor)
    check_train(config)
    groups = [group for group, _, count in plan(concept, config) for _ in range(count)]
    name = resolve_name(config.pretrained_model_name_or_path, concept.base)
    folder, output = data_dir_of(config, concept), config.output_dir or Path("runs") / concept.slug
    own_photos = _own_photos(folder)
    if own_photos:
        groups = [example.group for example in scan(folder, concept)]
    if config.beta == "estimate":
        positives = groups.count("positive")
        check_countable(positives, len(groups) - positives - groups.count("keep"))
    check_output(output, config.overwrite)
    check_writable(folder, "--data_dir")

    precision = choose_precision(config.mixed_precision)
    tracker = choose_tracker(config.report_to)
    accelerator = Accelerator(mixed_precision=precision, log_with=tracker, project_dir=str(output))
    set_seed(TRAIN_SEEDS[0] + config.seed, device_specific=True)
    loaded: list[Base] = []

    def get_base() -> Base:
        if not loaded:
            loaded.append(load_base(name, precision, accelerator.device))
        return loaded[0]

    if not own_photos:
        if not (folder / DATA_MANIFEST).is_file():
            print(f"{folder} is missing or unfinished: rendering it first.", file=sys.stderr)
        render_concept(concept, config, name, get_base)
        accelerator.wait_for_everyone()  # the metadata is written by the first process, after the last image
    return _train(config, concept, get_base(), folder, output, accelerator)


def _own_photos(folder: Path) -> bool:
    """Whether somebody put images there by hand: folders that `render` did not start."""
    started = (folder / "settings.json").is_file() or (folder / DATA_MANIFEST).is_file()
    return not started and ((folder / UNLABELED).is_dir() or (folder / POSITIVE).is_dir())


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse, touching nothing, a run folder that must not or cannot be written.

    Raises:
        UsageError: a finished run without --overwrite, a folder of something else, a place that cannot be written.
    """
    if (output / TRAINING).is_file() and not overwrite:
        raise UsageError(f"--output_dir {output} holds a finished run. Name another --output_dir, or add --overwrite.")
    if output.is_dir() and any(output.iterdir()) and not (output / CONCEPT).is_file():
        raise UsageError(f"--output_dir {output} holds files that are no run of sd-unlearn; name an empty folder.")
    check_writable(output, "--output_dir")


def choose_tracker(asked: str | None) -> str | None:
    """The tracker's name for Accelerate: the option, else TensorBoard if it is installed.

    Raises:
        UsageError: a tracker that is not installed.
    """
    if asked == "none":
        return None
    if asked and not find_spec(asked):
        raise UsageError(f"--report_to {asked} is not installed: pip install {asked}, or --report_to none.")
    return asked or ("tensorboard" if find_spec("tensorboard") else None)


def _train(
    config: TrainConfig, concept: Concept, base: Base, folder: Path, output: Path, accelerator: Accelerator
) -> Path:
    examples = scan(folder, concept)
    guidance_scale = sampler_of(config, base.name).guidance_scale
    unconditional = UNCONDITIONAL.get(base.name, 0.25) if config.unconditional is None else config.unconditional
    alpha = float(config.rank if config.lora_alpha is None else config.lora_alpha)
    latents = encode_images(base, examples, config.resolution or base.resolution, folder / CACHE_DIR)
    prior = resolve_beta(config.beta, folder, lambda: embed(base, examples, latents[0]))
    prior = broadcast_object_list([prior])[0]  # rounding may differ between devices: one beta for all
    beta = prior.beta
    texts = list(dict.fromkeys(["", concept.caption, concept.generic, *(e.caption for e in examples)]))
    captions = dict(zip(texts, encode_captions(base, texts), strict=True))
    batches = StratifiedBatches(
        examples, latents, captions, concept, config.caption_mode,
        config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes,
        base.pipeline.scheduler.config.num_train_timesteps, TRAIN_SEEDS[0] + config.seed,
        rank=accelerator.process_index, world=accelerator.num_processes,
        micro_batches=config.gradient_accumulation_steps, device=accelerator.device,
        teacher=config.target == "teacher", timestep_bias=config.timestep_bias,
        share_timesteps=config.share_timesteps, unconditional=unconditional,
    )  # fmt: skip
    model = lora.attach(base.pipeline.unet, config.rank, alpha, TRAIN_SEEDS[0] + config.seed)
    resolved = dataclasses.replace(
        config, beta=beta, lora_alpha=alpha, data_dir=folder, output_dir=output, guidance_scale=guidance_scale,
        unconditional=unconditional, pretrained_model_name_or_path=base.name,
    )  # fmt: skip
    teacher = None
    if config.target == "teacher":
        generic, empty = (captions[caption].to(accelerator.device) for caption in (concept.generic, ""))
        teacher = Teacher(Denoiser.of(base, model), generic, empty, max(1.0, guidance_scale), config.push / beta)
    if accelerator.is_main_process:
        shutil.rmtree(output, ignore_errors=True)  # an earlier run goes only now that nothing can be refused any more
        write_text(output / CONFIG, yaml.safe_dump(as_dict(resolved), sort_keys=False, allow_unicode=True))
        write_concept(output / CONCEPT, concept)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("tensorboard")
    positives = sum(e.is_positive for e in examples)
    counts = f"{len(examples) - positives} unlabeled and {positives} positive images"
    for note in prior.notes:
        accelerator.print(note, file=sys.stderr)
    accelerator.print(
        f"Forgetting {concept.name!r} in {base.name}: {counts}, beta {beta:g} ({prior.source}).",
        file=sys.stderr,
    )

    started = time.monotonic()
    objective = PUObjective([beta] * len(batches.brackets), config.correction)
    steps = fit(resolved, base, model, batches, objective, concept, accelerator, teacher)
    seconds = time.monotonic() - started
    if accelerator.is_main_process:
        lora.save(model, output)
        cost = {
            "seconds": round(seconds, 1), "steps": steps,
            "images_seen": steps * batches.layout.total(len(batches.brackets)),
            "peak_memory_mb": peak_memory_mb(), "device": device_name(accelerator.device),
            "processes": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision,
        }  # fmt: skip
        write_json(output / TRAINING, training_record(resolved, concept, base, prior, cost))
        print(f"Trained {steps} steps in {seconds:.0f} s; the LoRA is in {output / lora.ADAPTER_DIR}.", file=sys.stderr)
    accelerator.wait_for_everyone()
    accelerator.end_training()  # last: it takes the process group down
    return output


def fit(
    config: TrainConfig, base: Base, model: Any, batches: StratifiedBatches, objective: PUObjective, concept: Concept,
    accelerator: Accelerator, teacher: Teacher | None,
) -> int:  # fmt: skip
    """Minimise the objective over the LoRA; writes metrics.jsonl and previews as it goes. Returns the steps taken."""
    parameters = lora.trainable(model)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=1e-2)
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=config.max_train_steps
    )
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    denoiser = Denoiser.of(base, wrapped)
    brackets: torch.Tensor | None = None

    def losses(batch: Batch) -> torch.Tensor:
        return example_losses(denoiser, batch, config.reduction, teacher, config.temperature)

    log_path = (config.output_dir or Path()) / METRICS if accelerator.is_main_process else os.devnull
    with (
        open(log_path, "w", encoding="utf-8") as log,
        tqdm(total=config.max_train_steps, desc=f"forget {concept.slug}", unit="step", file=sys.stderr,
             disable=not accelerator.is_main_process) as bar,
    ):  # fmt: skip
        for step, parts in zip(range(1, config.max_train_steps + 1), batches, strict=False):
            logs, brackets = accumulate_gradients(accelerator, wrapped, losses, objective, parts, brackets)
            norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.update()
            if (
                step % LOG_EVERY == 0 or step == config.max_train_steps
            ):  # .tolist() waits for the device: not every step
                figures = _figures(step, logs, schedule.get_last_lr()[0], norm)
                bar.set_postfix(
                    U=f"{figures['mean_u']:.3g}", S=f"{figures['mean_s']:.3g}", ratio=f"{figures['ratio']:.2f}"
                )
                _log(accelerator, log, figures)
            if config.validation_steps and step % config.validation_steps == 0 and accelerator.is_main_process:
                preview(config, base, concept, step)
    return config.max_train_steps


def _figures(step: int, logs: torch.Tensor, learning_rate: float, norm: Any) -> dict[str, float]:
    figures = dict(zip(LOGGED, logs.tolist(), strict=True))
    figures["ratio"] = figures["mean_s"] / max(figures["mean_u"], 1e-12)
    return {"step": step, **figures, "lr": learning_rate, "grad_norm": float(norm)}


def _log(accelerator: Accelerator, log: Any, figures: dict[str, float]) -> None:
    if not all(torch.isfinite(torch.tensor(v)) for v in figures.values()):
        raise UnlearnError(
            f"Training diverged at step {figures['step']}: the loss is not finite. Try a lower --learning_rate."
        )
    accelerator.log(figures, step=int(figures["step"]))
    if accelerator.is_main_process:
        log.write(json.dumps(figures) + "\n")
        log.flush()


def preview(config: TrainConfig, base: Base, concept: Concept, step: int) -> None:
    """A grid of fixed seeds: a row each for the concept, the generic prompt and two prompts that must stay."""
    prompts = [concept.caption, concept.generic, *(p.text for p in concept.keep_prompts[:2])]
    sampler, columns = sampler_of(config, base.name), 4 if base.resolution > 64 else 8
    cells = [(prompt, image_seed(TRAIN_SEEDS, config.seed, prompt, i)) for prompt in prompts for i in range(columns)]
    images: list[Image.Image] = []
    base.pipeline.unet.eval()
    for chunk in (cells[i : i + sampler.batch_size] for i in range(0, len(cells), sampler.batch_size)):
        images += draw(base, [c[0] for c in chunk], [c[1] for c in chunk], sampler)
    base.pipeline.unet.train()
    side = images[0].width
    grid = Image.new("RGB", (columns * side, len(prompts) * side))
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * side, i // columns * side))
    place = (config.output_dir or Path()) / PREVIEW_DIR
    place.mkdir(exist_ok=True)
    save_image(grid, place / f"step-{step:06d}.png")
