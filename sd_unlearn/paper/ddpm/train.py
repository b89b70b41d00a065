"""Train one DDPM of the paper with the same loop, batches and risks as Stable Diffusion."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from sd_unlearn.choices import Risk
from sd_unlearn.config.batching import Batching, share_of
from sd_unlearn.config.loop import LoopOptions
from sd_unlearn.data.batch import Batch
from sd_unlearn.data.batches import EncodedImages, NoiseSampling, Sharding, StratifiedBatches
from sd_unlearn.data.dataset import Example
from sd_unlearn.data.layout import Layout
from sd_unlearn.io.paths import slugify
from sd_unlearn.io.reading import read_jsonl
from sd_unlearn.io.run_folder import METRICS
from sd_unlearn.models.conditioning import ClassConditioning, NoConditioning
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.diffusion import Diffusion
from sd_unlearn.models.student import Student
from sd_unlearn.objectives.losses import example_losses
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
from sd_unlearn.training.optim import set_first_scale
from sd_unlearn.training.provenance import device_name, peak_memory_mb


@dataclass(frozen=True)
class TrainingJob:
    """One model to train: the experiment, its images, the seed and the folder."""

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
        """The class numbers that the network is conditioned on for images with these labels: a digit's pair, which
        holds a normal and a sensitive digit; 0 without conditioning."""
        return [label // 2 if self.settings.conditional else 0 for label in labels]


def train(run: TrainingJob) -> dict[str, Any]:
    """Minimise the run's risk and save folder/pipeline. A run that was killed resumes from its last checkpoint.

    Returns what it cost, with "betas" if beta is estimated while training: [{step, beta, beta_low, beta_high}].

    Raises:
        Interrupted: Ctrl-C; a checkpoint was saved.
        UsageError, UnlearnError: see load_network and fit.
    """
    settings = run.settings
    accelerator = Accelerator(mixed_precision=settings.mixed_precision, cpu=not torch.cuda.is_available())
    set_seed(TRAIN_SEEDS[0] + run.seed, device_specific=True)
    if settings.base:
        network, schedule = load_network(settings.base, run.side, run.experiment.channels)
    else:
        schedule = make_schedule()
        network = make_network(run.size, run.side, run.experiment.channels, settings.conditions)
    run.folder.mkdir(parents=True, exist_ok=True)
    resume = checkpoint.resolve("latest", run.folder)
    training = _make_training(run, network, schedule, accelerator, resume)
    if resume:
        checkpoint.check_same(resume, training.identity, forced=False)
    state = fit(_loop_options(run), training, resume)
    if accelerator.is_main_process:
        save_pipeline(network, schedule, run.folder)
    accelerator.wait_for_everyone()
    cost = {
        "seconds": round(state.seconds, 1),
        "steps": state.step,
        "images_seen": state.step * training.batches.images_per_step,
        "device": device_name(accelerator.device),
        "peak_memory_mb": peak_memory_mb(),
        "processes": accelerator.num_processes,
    }
    estimates = [line for line in read_jsonl(run.folder / METRICS) if "beta" in line] if training.probe else []
    return cost | {"betas": [{k: line[k] for k in ("step", "beta", "beta_low", "beta_high")} for line in estimates]}


def _make_training(
    run: TrainingJob, network: nn.Module, schedule: Any, accelerator: Accelerator, resume: Path | None
) -> Training:
    settings, seed = run.settings, TRAIN_SEEDS[0] + run.seed
    student = Student(network.requires_grad_(True).train())
    wrapped = accelerator.prepare(network)
    denoiser = Denoiser(
        network,
        Diffusion(schedule.alphas_cumprod.to(accelerator.device)),
        ClassConditioning() if settings.conditions else NoConditioning(),
    )
    images = encoded_images(run)
    set_first_scale(accelerator.scaler, settings.reduction, images.mean)
    batches = StratifiedBatches(
        images,
        [None],
        layout_of(settings),
        NoiseSampling(denoiser.process),
        seed,
        sharding=Sharding(accelerator.process_index, accelerator.num_processes),
    )
    share = share_of(batches.images_per_step, accelerator.num_processes)
    whole = Batching(micro_batch_size=share, gradient_checkpointing=False, teacher_batch_size=share)
    objective = PUObjective(
        [[settings.beta or PAPER_BETA]], settings.correction, settings.eta, _risk(settings), settings.max_ratio
    )

    def losses(model: nn.Module, batch: Batch, teacher_batch_size: int) -> Tensor:
        of_model = dataclasses.replace(denoiser, model=model)
        return example_losses(of_model, batch, settings.reduction, snr_gamma=settings.snr_gamma)

    return Training(
        run.folder,
        f"forget {slugify(run.experiment.name)}",
        student,
        wrapped,
        losses,
        batches,
        [objective],
        accelerator,
        (checkpoint.saved_batching(resume) if resume else None) or whole,
        identity_of(run, accelerator.num_processes),
        probe=PriorProbe(denoiser, images, seed) if settings.beta_source == "estimated" else None,
    )


def encoded_images(run: TrainingJob) -> EncodedImages:
    """The run's images as pixels [N, C, side, side] in [-1, 1]; an example's caption is its class number."""
    groups = {"generic": run.split.normal, "mixed_in": run.split.mixed_in}
    if run.settings.objective != "unsupervised":
        groups["positive"] = run.split.positive
    if run.settings.objective == "pnu":
        groups["negative"] = run.split.negative
    indices = [(int(i), group) for group, members in groups.items() for i in members]
    classes = run.conditions([int(run.data.labels[i]) for i, _ in indices])
    examples = [Example(Path(str(i)), str(c), group) for (i, group), c in zip(indices, classes, strict=True)]
    pixels = run.data.pixels([i for i, _ in indices], run.side)
    std = torch.zeros(1).expand_as(pixels)  # pixels have no posterior to sample from
    return EncodedImages(examples, pixels, std, {str(c): torch.tensor([c]) for c in sorted(set(classes))})


def layout_of(settings: ExperimentSettings) -> Layout:
    """Every objective has the same number of unlabeled images per step, plus the labeled ones that it uses."""
    unlabeled = settings.train_batch_size
    labeled = max(1, unlabeled // LABELED_SHARE)
    if settings.objective == "unsupervised":
        return Layout(0, unlabeled, 0, sets=0)
    return Layout(labeled, unlabeled, 0, labeled if settings.objective == "pnu" else 0)


def identity_of(run: TrainingJob, processes: int) -> dict[str, Any]:
    """What a resumed run must have in common with its checkpoint, by name."""
    of_sampling = ("sampler", "num_inference_steps", "num_images")  # they do not affect training
    options = {f"--{k}": v for k, v in dataclasses.asdict(run.settings).items() if k not in of_sampling}
    options["--missing"] = list(run.settings.missing)
    return {
        "experiment": run.experiment.name,
        "--size": run.size,
        "--seed": run.seed,
        "processes": processes,
        **options,
        "data": run.data.sha256,
        "counts": run.counts,
    }


def _loop_options(run: TrainingJob) -> LoopOptions:
    settings = run.settings
    return LoopOptions(
        learning_rate=settings.learning_rate,
        lr_warmup_steps=settings.lr_warmup_steps,
        max_train_steps=settings.max_train_steps,
        ema_decay=settings.ema_decay,
        validation_steps=0,
        probe_steps=max(1, settings.max_train_steps // 10) if settings.beta_source == "estimated" else 0,
        gradient_share_steps=0,
        checkpointing_steps=run.checkpointing_steps,
        checkpoints_total_limit=1,
    )


def _risk(settings: ExperimentSettings) -> Risk:
    return "pu" if settings.objective == "pnu" else settings.objective
