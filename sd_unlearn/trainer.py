"""`train` from options to run folder: read `run`, then `_train`; the loop itself is loop.py."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed

from sd_unlearn import checkpoint, speed
from sd_unlearn.base import (
    DIGITS,
    Base,
    check_zero_terminal_snr,
    choose_precision,
    load_base,
    resolve_name,
    use_zero_terminal_snr,
)
from sd_unlearn.batches import StratifiedBatches
from sd_unlearn.checks import as_dict, check_train
from sd_unlearn.concept import Concept, load_concept, write_concept
from sd_unlearn.dataset import CACHE_DIR, Example, encode_captions, encode_images, fingerprint, scan, tokenize
from sd_unlearn.denoiser import Denoiser
from sd_unlearn.errors import UsageError
from sd_unlearn.loop import Progress, Training, fit
from sd_unlearn.metrics.judge import make_judge
from sd_unlearn.objectives.pu import PUObjective
from sd_unlearn.objectives.teacher import Teacher
from sd_unlearn.optimizing import check_optimizer
from sd_unlearn.painter import Painter, preview_prompts
from sd_unlearn.prior import resolve_beta
from sd_unlearn.probe import LeakageProbe, Probe, RatioProbe, hold_out, probe_prompts
from sd_unlearn.provenance import device_name, identity_of, peak_memory_mb, training_record
from sd_unlearn.records import (
    BEST_DIR,
    CONCEPT,
    CONFIG,
    DATA_MANIFEST,
    POSITIVE,
    TRAIN_SEEDS,
    TRAINING,
    UNLABELED,
    check_writable,
    write_json,
    write_text,
)
from sd_unlearn.render import data_dir_of, plan, render_concept, sampler_of
from sd_unlearn.student import Student, make_student
from sd_unlearn.train_config import TrainConfig

# The text encoder of digits gives the generic caption nearly the empty one's embedding: both forget, or neither does.
UNCONDITIONAL = {DIGITS: 0.0}


def run(config: TrainConfig) -> Path:
    """Train on a concept, rendering its folders first if they are missing. Returns the run folder.

    Raises:
        UsageError, UnlearnError: what is wrong, checked before a model is loaded wherever that is possible.
        Interrupted: Ctrl-C or SIGTERM while training; a checkpoint was saved.
    """
    concept = load_concept(config.concept, config.anchor)
    check_train(config)
    check_optimizer(config)
    plan(concept, config)
    name = resolve_name(config.pretrained_model_name_or_path, concept.base)
    if config.zero_terminal_snr:
        check_zero_terminal_snr(name)
    folder, output = data_dir_of(config, concept), config.output_dir or Path("runs") / concept.slug
    own_photos = _own_photos(folder)
    if own_photos:
        scan(folder, concept)
    check_output(output, config)
    resume = checkpoint.resolve(config.resume_from_checkpoint, output)
    check_writable(folder, "--data_dir")

    precision = choose_precision(config.mixed_precision)
    tracker = choose_tracker(config.report_to)
    accelerator = Accelerator(mixed_precision=precision, log_with=tracker, project_dir=str(output))
    speed.check(config, accelerator.device)
    set_seed(TRAIN_SEEDS[0] + config.seed, device_specific=True)
    loaded: list[Base] = []

    def get_base() -> Base:
        if not loaded:  # what is trained must be in full precision; autocast computes in half all the same
            loaded.append(load_base(name, "no" if config.method == "full" else precision, accelerator.device))
        return loaded[0]

    if not own_photos:
        if not (folder / DATA_MANIFEST).is_file():
            print(f"{folder} is missing or unfinished: rendering it first.", file=sys.stderr)
        render_concept(concept, config, name, get_base)
        accelerator.wait_for_everyone()  # the metadata is written by the first process, after the last image
    config = dataclasses.replace(config, data_dir=folder, output_dir=output)
    return _train(config, concept, get_base(), accelerator, resume)


def _own_photos(folder: Path) -> bool:
    """Whether somebody put images there by hand: folders that `render` did not start."""
    started = (folder / "settings.json").is_file() or (folder / DATA_MANIFEST).is_file()
    return not started and ((folder / UNLABELED).is_dir() or (folder / POSITIVE).is_dir())


def check_output(output: Path, config: TrainConfig) -> None:
    """Refuse, touching nothing, a run folder that must not or cannot be written.

    Raises:
        UsageError: a finished run or one that can go on without --overwrite, a folder of something else, a place that
            cannot be written.
    """
    if output.is_dir() and any(output.iterdir()) and not (output / CONCEPT).is_file():
        raise UsageError(f"--output_dir {output} holds files that are no run of sd-unlearn; name an empty folder.")
    kept = checkpoint.found(output)
    if config.resume_from_checkpoint is None and not config.overwrite:
        if (output / TRAINING).is_file():
            raise UsageError(
                f"--output_dir {output} holds a finished run. Name another --output_dir, or add --overwrite."
            )
        if kept:
            raise UsageError(
                f"--output_dir {output} holds an unfinished run, saved at {kept[-1].name}. Go on from there with "
                "--resume_from_checkpoint latest, or start over with --overwrite."
            )
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
    config: TrainConfig, concept: Concept, base: Base, accelerator: Accelerator, resume: Path | None
) -> Path:  # fmt: skip
    assert config.data_dir is not None
    assert config.output_dir is not None
    output = config.output_dir
    if config.zero_terminal_snr:  # not sooner: the folders are rendered with the base's own schedule
        use_zero_terminal_snr(base)
    examples = scan(config.data_dir, concept)
    config, beta_source = _resolved(config, base)
    data = _encode(config, concept, base, examples)
    identity = identity_of(config, concept, base, fingerprint(examples), accelerator.num_processes)
    if resume:
        checkpoint.check_same(resume, identity, config.force_resume)
        if (output / TRAINING).is_file() and not config.force_resume:
            accelerator.print(f"{output} is finished; --overwrite starts over.", file=sys.stderr)
            return output
    training = _assemble(config, concept, base, data, accelerator, identity)
    _open_run(training, keep=resume is not None)
    accelerator.init_trackers("tensorboard")
    positives = sum(e.is_positive for e in examples)
    accelerator.print(
        f"Forgetting {concept.name!r} in {base.name}: {len(examples) - positives} unlabeled and {positives} positive "
        f"images, beta {config.beta:g} ({beta_source}).",
        file=sys.stderr,
    )
    progress = fit(training, resume)
    if accelerator.is_main_process:
        _close_run(training, progress, base, beta_source)
    accelerator.wait_for_everyone()
    accelerator.end_training()  # last: it takes the process group down
    return output


def _resolved(config: TrainConfig, base: Base) -> tuple[TrainConfig, str]:
    """The options with every default looked up, and where beta is from."""
    assert config.data_dir is not None
    beta, source = resolve_beta(config.beta, config.data_dir)  # type: ignore[arg-type]
    usual = UNCONDITIONAL.get(base.name, 0.25)
    resolved = dataclasses.replace(
        config, beta=beta, lora_alpha=float(config.rank if config.lora_alpha is None else config.lora_alpha),
        guidance_scale=sampler_of(config, base.name).guidance_scale, pretrained_model_name_or_path=base.name,
        unconditional=usual if config.unconditional is None else config.unconditional,
    )  # fmt: skip
    return resolved, source


@dataclasses.dataclass(frozen=True)
class Data:
    """What is trained on, encoded: the VAE and the text encoder are not needed any more."""

    examples: list[Example]
    latents: tuple[torch.Tensor, torch.Tensor]  # mean and standard deviation, each [N, 4, H/8, W/8]
    captions: dict[str, torch.Tensor]  # embeddings [tokens, width]; token ids [tokens] where the encoder is trained


def _encode(config: TrainConfig, concept: Concept, base: Base, examples: list[Example]) -> Data:
    assert config.data_dir is not None
    latents = encode_images(base, examples, config.resolution or base.resolution, config.data_dir / CACHE_DIR)
    texts = ["", concept.caption, concept.generic, *preview_prompts(concept), *(e.caption for e in examples)]
    if config.probe_steps and config.probe == "leakage":
        texts += probe_prompts(concept)
    texts = list(dict.fromkeys(texts))
    encode = tokenize if config.train_text_encoder else encode_captions
    return Data(examples, latents, dict(zip(texts, encode(base, texts), strict=True)))


def _assemble(
    config: TrainConfig, concept: Concept, base: Base, data: Data, accelerator: Accelerator, identity: dict[str, Any]
) -> Training:
    """Everything that the loop works with."""
    seed = TRAIN_SEEDS[0] + config.seed
    teaches = config.target == "teacher"
    speed.prepare(base.pipeline.unet, config)
    student = make_student(base, config, seed, needs_teacher=teaches)
    speed.compile_blocks(base.pipeline.unet, config)
    wrapped = accelerator.prepare(student.model)
    if student.base_copy is not None:
        student.base_copy = accelerator.prepare_model(student.base_copy, evaluation_mode=True)
    alone = Denoiser.of(base, student.model)
    probing = "" if not config.probe_steps else config.probe
    kept, held = hold_out(data.examples, seed) if probing == "ratio" else (list(range(len(data.examples))), [])
    mean, std = data.latents
    batches = StratifiedBatches(
        [data.examples[i] for i in kept], (mean[kept], std[kept]), data.captions, concept, config.caption_mode,
        config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes,
        alone.num_train_timesteps, seed, rank=accelerator.process_index, world=accelerator.num_processes,
        micro_batches=config.gradient_accumulation_steps, device=accelerator.device, teacher=teaches,
        timestep_bias=config.timestep_bias, share_timesteps=config.share_timesteps,
        unconditional=config.unconditional or 0.0, noise_offset=config.noise_offset,
    )  # fmt: skip
    teacher = _teacher(config, concept, data, student, alone) if teaches else None
    painter = _painter(config, concept, base, data, student)
    probe: Probe | None = None
    if probing == "ratio":
        texts = torch.stack([data.captions[c] for c in (concept.caption, concept.generic) for _ in held])
        positive = torch.tensor([data.examples[i].is_positive for i in held] * 2)
        probe = RatioProbe(alone, student, mean[held].repeat(2, 1, 1, 1), texts, positive, seed)
    elif probing == "leakage" and painter:
        probe = LeakageProbe(painter, make_judge(concept), concept, config.seed)
    assert isinstance(config.beta, float)
    assert config.output_dir is not None
    return Training(
        config, concept, config.output_dir, student, wrapped, dataclasses.replace(alone, model=wrapped), batches,
        PUObjective([config.beta] * len(batches.brackets), config.correction), teacher, painter, probe, identity,
        accelerator,
    )  # fmt: skip


def _teacher(config: TrainConfig, concept: Concept, data: Data, student: Student, denoiser: Denoiser) -> Teacher:
    device = denoiser.alphas_cumprod.device
    generic, empty = (data.captions[caption].to(device) for caption in (concept.generic, ""))
    assert isinstance(config.beta, float)
    guidance = max(1.0, config.guidance_scale or 1.0)
    return Teacher(denoiser, student.frozen, generic, empty, guidance, config.push / config.beta)


def _painter(config: TrainConfig, concept: Concept, base: Base, data: Data, student: Student) -> Painter | None:
    """What draws previews and probes; None, the VAE gone, if nothing is to be drawn."""
    pipeline = base.pipeline
    if not config.train_text_encoder:
        pipeline.text_encoder = None
    if not config.validation_steps and not (config.probe_steps and config.probe == "leakage"):
        pipeline.vae = None
        return None
    pipeline.vae.to("cpu")

    def embed(captions: Any) -> torch.Tensor:
        if config.train_text_encoder:
            return encode_captions(base, captions)
        return torch.stack([data.captions[caption] for caption in captions])

    return Painter(base, sampler_of(config, base.name), embed, student.model)


def _open_run(training: Training, keep: bool) -> None:
    """Make the run folder; an earlier run goes only now that nothing can be refused any more."""
    if training.accelerator.is_main_process:
        output = training.output
        if not keep:
            shutil.rmtree(output, ignore_errors=True)
        (output / TRAINING).unlink(missing_ok=True)
        settings = yaml.safe_dump(as_dict(training.config), sort_keys=False, allow_unicode=True)
        for folder in (output, output / BEST_DIR) if training.probe else (output,):
            write_text(folder / CONFIG, settings)
            write_concept(folder / CONCEPT, training.concept)
    training.accelerator.wait_for_everyone()


def _close_run(training: Training, progress: Progress, base: Base, beta_source: str) -> None:
    """Save what was learned, and last the record that says the run is finished."""
    accelerator, config = training.accelerator, training.config
    training.student.save(training.output)
    cost = {
        "seconds": round(progress.seconds, 1), "steps": progress.step,
        "images_seen": progress.step * training.batches.layout.total(len(training.batches.brackets)),
        "peak_memory_mb": peak_memory_mb(), "device": device_name(accelerator.device),
        "processes": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision,
        "stopped": progress.stopped or "max_train_steps",
    }  # fmt: skip
    best = training.output / BEST_DIR
    if training.probe and progress.best_step:
        of_best = cost | {"steps": progress.best_step, "stopped": f"best of the probes, {config.probe}"}
        write_json(best / TRAINING, training_record(config, training.concept, base, beta_source, of_best))
        said = f"The best by --probe {config.probe} was step {progress.best_step}: {best}."
        print(said, file=sys.stderr)
    write_json(training.output / TRAINING, training_record(config, training.concept, base, beta_source, cost))
    why = f" ({progress.stopped})" if progress.stopped else ""
    print(f"Trained {progress.step} steps in {progress.seconds:.0f} s{why}: {training.output}.", file=sys.stderr)
