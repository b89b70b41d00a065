"""Train one DDPM of the paper through the same loop, batches and risks as everything else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.batches import Layout, StratifiedBatches
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.dataset import Example
from sd_unlearn.io.files import read_jsonl
from sd_unlearn.io.run_folder import METRICS
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.student import Student
from sd_unlearn.objectives.pu import PUObjective
from sd_unlearn.paper.ddpm.beta_probe import PriorProbe
from sd_unlearn.paper.ddpm.datasets import ImageData
from sd_unlearn.paper.ddpm.split import Split
from sd_unlearn.paper.ddpm.unet import load_network, make_network, make_schedule, save_pipeline
from sd_unlearn.paper.experiments import Experiment, Size
from sd_unlearn.paper.settings import LABELED_SHARE, PAPER_BETA, ExperimentSettings
from sd_unlearn.seeds import TRAIN_SEEDS
from sd_unlearn.training import checkpoint
from sd_unlearn.training.loop import Training, fit
from sd_unlearn.training.provenance import device_name, peak_memory_mb


@dataclass(frozen=True)
class TrainingJob:
    """One model to be trained: what, on which images, with which seed, into which folder."""

    experiment: Experiment
    settings: ExperimentSettings
    size: Size
    seed: int
    data: ImageData
    split: Split
    folder: Path
    checkpointing_steps: int

    @property
    def side(self) -> int:
        return self.experiment.side_of(self.size)

    @property
    def counts(self) -> dict[str, int]:
        """Images of each kind: normal, mixed_in, positive, negative."""
        return {field.name: len(getattr(self.split, field.name)) for field in dataclasses.fields(self.split)}

    def conditions(self, labels: Sequence[int]) -> list[int]:
        """What the network is told of images with these labels: a digit's pair, which holds a normal and a sensitive
        one; 0 where it is told nothing."""
        return [label // 2 if self.settings.conditional else 0 for label in labels]


def train(run: TrainingJob) -> dict[str, Any]:
    """Minimise the run's risk; a run that was killed goes on from its last checkpoint. Saves folder/pipeline.

    Returns what it cost, with "betas" where beta was estimated on the way: [{step, beta, beta_low, beta_high}].

    Raises:
        Interrupted: Ctrl-C; a checkpoint was saved.
        UsageError, UnlearnError: as load_network, fit.
    """
    settings = run.settings
    config = _config(run)
    accelerator = Accelerator(mixed_precision=settings.mixed_precision, cpu=not torch.cuda.is_available())
    set_seed(TRAIN_SEEDS[0] + run.seed, device_specific=True)
    if settings.base:
        network, schedule = load_network(settings.base, run.side, run.experiment.channels)
    else:
        schedule = make_schedule()
        network = make_network(run.size, run.side, run.experiment.channels, settings.conditions)
    student = Student(network.requires_grad_(True).train())
    wrapped = accelerator.prepare(network)
    denoiser = Denoiser(
        wrapped,
        schedule.alphas_cumprod.to(accelerator.device),
        "epsilon",
        schedule.config.num_train_timesteps,
        conditioning="class" if settings.conditions else "none",
    )
    examples, pixels, captions = examples_of(run)
    about = Concept(run.experiment.name, run.experiment.name, run.experiment.name)
    batches = StratifiedBatches(
        examples,
        (pixels, torch.zeros(1).expand_as(pixels)),  # pixels have no posterior to be drawn from
        captions,
        about,
        config.caption_mode,
        config.train_batch_size,
        denoiser.num_train_timesteps,
        TRAIN_SEEDS[0] + run.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        device=accelerator.device,
        layout=layout_of(settings),
    )
    objective = PUObjective(
        [[settings.beta or PAPER_BETA]], settings.correction, settings.eta, _risk(settings), settings.max_ratio
    )
    probe = None
    if settings.beta_source == "estimated":
        text = torch.stack([captions[example.caption] for example in examples])
        alone = dataclasses.replace(denoiser, model=network)
        probe = PriorProbe(alone, examples, pixels, text, TRAIN_SEEDS[0] + run.seed)
    training = Training(
        config,
        about,
        run.folder,
        student,
        wrapped,
        denoiser,
        batches,
        objective,
        None,
        None,
        probe,
        identity_of(run, accelerator.num_processes),
        accelerator,
    )
    run.folder.mkdir(parents=True, exist_ok=True)
    resume = checkpoint.resolve("latest", run.folder)
    if resume:
        checkpoint.check_same(resume, training.identity, forced=False)
    progress = fit(training, resume)
    if accelerator.is_main_process:
        save_pipeline(network, schedule, run.folder)
    accelerator.wait_for_everyone()
    cost = {
        "seconds": round(progress.seconds, 1),
        "steps": progress.step,
        "images_seen": progress.step * batches.layout.total(1),
        "device": device_name(accelerator.device),
        "peak_memory_mb": peak_memory_mb(),
        "processes": accelerator.num_processes,
    }
    found = [line for line in read_jsonl(run.folder / METRICS) if "beta" in line] if probe else []
    return cost | {"betas": [{k: line[k] for k in ("step", "beta", "beta_low", "beta_high")} for line in found]}


def examples_of(run: TrainingJob) -> tuple[list[Example], Tensor, dict[str, Tensor]]:
    """(examples, their pixels [N, C, side, side] in [-1, 1], what the network is told [1] by caption)."""
    groups = {"generic": run.split.normal, "mixed_in": run.split.mixed_in}
    if run.settings.objective != "unsupervised":
        groups["positive"] = run.split.positive
    if run.settings.objective == "pnu":
        groups["negative"] = run.split.negative
    indices = [(int(i), group) for group, members in groups.items() for i in members]
    told = run.conditions([int(run.data.labels[i]) for i, _ in indices])
    examples = [Example(Path(str(i)), str(c), group) for (i, group), c in zip(indices, told, strict=True)]
    captions = {str(c): torch.tensor([c]) for c in sorted(set(told))}
    return examples, run.data.pixels([i for i, _ in indices], run.side), captions


def layout_of(settings: ExperimentSettings) -> Layout:
    """Every objective sees the same number of unlabeled images a step; labeled ones come on top."""
    unlabeled = settings.train_batch_size
    labeled = max(1, unlabeled // LABELED_SHARE)
    if settings.objective == "unsupervised":
        return Layout(0, unlabeled, 0, sets=0)
    return Layout(labeled, unlabeled, 0, labeled if settings.objective == "pnu" else 0)


def identity_of(run: TrainingJob, processes: int) -> dict[str, Any]:
    """What a resumed run must have in common with its checkpoint, by name."""
    drawn = ("sampler", "num_inference_steps", "num_images")
    told = {f"--{k}": v for k, v in dataclasses.asdict(run.settings).items() if k not in drawn}
    told["--missing"] = list(run.settings.missing)
    data = {"data": run.data.sha256, "counts": run.counts}
    return {
        "experiment": run.experiment.name,
        "--size": run.size,
        "--seed": run.seed,
        "processes": processes,
        **told,
        **data,
    }


def _config(run: TrainingJob) -> TrainConfig:
    """The trainer's own options, as far as the loop reads them."""
    s = run.settings
    return TrainConfig(
        seed=run.seed,
        beta=s.beta,
        correction=s.correction,
        eta=s.eta,
        reduction=s.reduction,
        snr_gamma=s.snr_gamma,
        target="noise",
        caption_mode="own",
        method="full",
        learning_rate=s.learning_rate,
        lr_warmup_steps=s.lr_warmup_steps,
        max_train_steps=s.max_train_steps,
        ema_decay=s.ema_decay,
        train_batch_size=layout_of(s).total(1),
        output_dir=run.folder,
        validation_steps=0,
        probe_steps=max(1, s.max_train_steps // 10) if s.beta_source == "estimated" else 0,
        gradient_share_steps=0,
        checkpointing_steps=run.checkpointing_steps,
        checkpoints_total_limit=1,
        mixed_precision=s.mixed_precision,  # type: ignore[arg-type]
    )


def _risk(settings: ExperimentSettings) -> Any:
    return "pu" if settings.objective == "pnu" else settings.objective
