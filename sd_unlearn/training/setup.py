"""From options, data folder and loaded base to everything the training loop needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sd_unlearn.config.batching import Batching, effective_batch_size
from sd_unlearn.config.checks import unused_options
from sd_unlearn.config.train import TrainConfig, default_lora_targets, resolve_steps, resolve_teacher_reuse
from sd_unlearn.data.batch import Batch
from sd_unlearn.data.batches import EncodedImages, NoiseSampling, Sharding, StratifiedBatches
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.dataset import members_of_sets
from sd_unlearn.data.encoding import encode_captions
from sd_unlearn.data.layout import BASELINES, compose_step
from sd_unlearn.data.repeated import REPEATED_STEPS, RepeatedBatches, Steps
from sd_unlearn.data.turns import SEED_STEP, InTurn, Turn
from sd_unlearn.errors import UsageError
from sd_unlearn.metrics.classifier_of import make_label_classifier
from sd_unlearn.models import performance
from sd_unlearn.models.base import Base
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.diffusion import Process
from sd_unlearn.models.kinds import KINDS
from sd_unlearn.models.sampling import resolve_sampler
from sd_unlearn.models.source import DIGITS
from sd_unlearn.models.student import Student, make_student
from sd_unlearn.objectives.movement import Movement
from sd_unlearn.objectives.registry import make_losses, make_objective
from sd_unlearn.objectives.teacher import PredictionBank, Teacher
from sd_unlearn.seeds import TRAIN_SEEDS
from sd_unlearn.training.encoded_data import Data, probe_name
from sd_unlearn.training.learned_captions import LearnedCaption, Network, RobustSteps
from sd_unlearn.training.loop import Training
from sd_unlearn.training.optim import set_first_scale
from sd_unlearn.training.previews import ImageGenerator, PreviewWriter
from sd_unlearn.training.probe import LeakageProbe, Probe, RatioProbe, hold_out

# The text encoder of digits gives the generic and the empty caption nearly the same embedding, so the unconditional
# prediction cannot be kept while the generic one changes.
UNCONDITIONAL = {DIGITS: 0.0}


def default_unconditional(base: Base, guidance_scale: float | None) -> float:
    """The share of keep images under the empty caption. None of them without guidance, which alone uses it.

    guidance_scale: at which images are generated.
    """
    return UNCONDITIONAL.get(base.name, 0.25) if base.guidance_of(guidance_scale) > 1 else 0.0


def resolve_defaults(config: TrainConfig, base: Base, data: Data, processes: int) -> TrainConfig:
    """The options with every default filled in, as they are recorded; without those on how the run was started.

    Options that objective or method do not use stay empty, so that the record can be given as options again.
    Of the options on how a step is cut, those that were given are kept, except for the number of micro-batches, which
    with --train_batch_size is that of this number of processes.
    """
    is_lora, has_teacher, unused = config.method == "lora", config.target == "teacher", unused_options(config.objective)
    beta = config.beta if data.beta is None else data.beta
    is_flow = KINDS[base.kind].is_flow
    targets = config.lora_targets or default_lora_targets(config.objective)
    guidance = resolve_sampler(config, base.source).guidance_scale
    unconditional = default_unconditional(base, guidance) if config.unconditional is None else config.unconditional
    return dataclasses.replace(
        config,
        beta=None if "beta" in unused else beta,
        effective_batch_size=effective_batch_size(config, processes),
        gradient_accumulation_steps=None if config.train_batch_size else config.gradient_accumulation_steps,
        guidance_scale=guidance,
        lora_targets=targets if is_lora else None,
        max_train_steps=resolve_steps(config, len(data.turns), is_flow),
        teacher_reuse=None if "teacher_reuse" in unused else resolve_teacher_reuse(config, len(data.turns)),
        lora_alpha=float(config.rank if config.lora_alpha is None else config.lora_alpha) if is_lora else None,
        unconditional=unconditional if has_teacher else None,
        pretrained_model_name_or_path=base.name,
        overwrite=False,
        resume_from_checkpoint=None,
        force_resume=False,
    )


def make_training(
    config: TrainConfig,
    concept: Concept,
    base: Base,
    data: Data,
    accelerator: Accelerator,
    batching: Batching,
    identity: dict[str, Any],
) -> Training:
    """Attach the trained weights to the base and assemble the run; drops the base's networks that nothing needs.

    config: with defaults filled in.
    """
    assert config.output_dir is not None
    seed, has_teacher = TRAIN_SEEDS[0] + config.seed, config.target == "teacher"
    performance.prepare(base.network, config)
    student = make_student(base, config, seed, needs_teacher=has_teacher)
    performance.compile_blocks(base.network, config)
    wrapped = accelerator.prepare(student.model)
    if student.base_copy is not None:
        student.base_copy = accelerator.prepare_model(student.base_copy, evaluation_mode=True)
    set_first_scale(accelerator.scaler, config.reduction, data.images.mean)
    process = base.process(config.resolution, config.timestep_sampling)
    denoiser = dataclasses.replace(Denoiser.of(base, student.model), process=process)
    seen, held_out = _seen_images(config, data, seed)
    samplers = [
        make_batches(config, turn.concept, of_turn, denoiser.process, accelerator, number)
        for number, (turn, of_turn) in enumerate(zip(data.turns, seen, strict=True))
    ]
    objectives = [
        make_objective(config, turn.betas, config.eta if b.layout.negative else 0.0, len(b.caption_groups))
        for turn, b in zip(data.turns, samplers, strict=True)
    ]
    of_examples = make_losses(config)
    teachers = [_make_teacher(config, turn, data, student, denoiser, base) for turn in data.turns if has_teacher]
    steps, teachers = _make_steps(config, samplers, teachers, seed, identity)

    def losses(model: nn.Module, batch: Batch, teacher_batch_size: int) -> Tensor:
        of_model = dataclasses.replace(denoiser, model=model)
        behind = dataclasses.replace(teachers[batch.turn], batch_size=teacher_batch_size) if teachers else None
        return of_examples(of_model, batch, behind)

    at_once = dataclasses.replace(config, render_batch_size=batching.preview_batch_size)
    generator = _make_generator(at_once, base, data, student)
    probe = _make_probe(config, concept, data, student, denoiser, generator, held_out)
    if config.robust:
        network = Network(base, denoiser, accelerator, batching.micro_batch_size)
        steps = RobustSteps(steps, _learned_captions(data.turns, seen, network, seed))
    preview = PreviewWriter(generator, concept, config.seed, config.output_dir) if generator else None
    return Training(
        config.output_dir,
        f"forget {concept.slug}",
        student,
        wrapped,
        losses,
        steps,
        objectives,
        accelerator,
        batching,
        identity | data.estimated,
        preview,
        probe,
        [teacher.movement for teacher in teachers],
        teachers[0].offsets if teachers else None,
    )


def _make_steps(
    config: TrainConfig,
    samplers: Sequence[StratifiedBatches],
    teachers: Sequence[Teacher],
    seed: int,
    identity: dict[str, Any],
) -> tuple[Steps, list[Teacher]]:
    """The batches of all turns and, with --teacher_reuse, the teachers that remember their predictions on them."""
    in_turn = samplers[0] if len(samplers) == 1 else InTurn(samplers, seed)
    reuse = config.teacher_reuse or 1
    if not teachers or reuse == 1:
        return in_turn, list(teachers)
    _check_equal_sizes(samplers)
    bank, offsets = PredictionBank(), PredictionBank()
    repeated = RepeatedBatches(in_turn, REPEATED_STEPS, reuse, identity)
    return repeated, [dataclasses.replace(teacher, bank=bank, offsets=offsets) for teacher in teachers]


def _seen_images(config: TrainConfig, data: Data, seed: int) -> tuple[list[EncodedImages], list[int]]:
    """The images as each turn takes them, and the indices of those that --probe ratio holds out."""
    images = data.images
    held_out: list[int] = []
    if probe_name(config) == "ratio":
        kept, held_out = hold_out(images.examples, seed)
        images = images.subset(kept)
    if len(data.turns) == 1:
        return [images], held_out
    return [dataclasses.replace(images, examples=turn.examples) for turn in data.turns], held_out


def make_batches(
    config: TrainConfig,
    concept: Concept,
    images: EncodedImages,
    process: Process,
    accelerator: Accelerator,
    number: int = 0,
) -> StratifiedBatches:
    """The batches of a concept, with this number among several; config: with defaults filled in."""
    baseline = BASELINES.get(config.objective)
    if baseline and baseline.images == "unlabeled":  # those known to show the concept are for pu, which needs a beta
        images = images.subset([n for n, e in enumerate(images.examples) if e.group != "mixed_in"])
    has_teacher, examples = config.target == "teacher", images.examples
    groups, layout = compose_step(
        config,
        concept,
        accelerator.num_processes,
        has_keep=has_teacher or any(e.group == "keep" for e in examples),
        sets=len(members_of_sets(examples)),
        negatives=any(e.is_negative for e in examples),
    )
    return StratifiedBatches(
        images,
        groups,
        layout,
        NoiseSampling(process, config.timestep_bias, config.share_timesteps),
        TRAIN_SEEDS[0] + config.seed + SEED_STEP * number,
        unconditional=(config.unconditional or 0.0) if has_teacher else None,
        sharding=Sharding(accelerator.process_index, accelerator.num_processes),
    )


def _learned_captions(
    turns: Sequence[Turn], seen: Sequence[EncodedImages], network: Network, seed: int
) -> list[LearnedCaption]:
    """The learned caption of each concept. seen: the images as each turn takes them."""
    return [
        LearnedCaption(turn.concept, images, network, seed + SEED_STEP * number)
        for number, (turn, images) in enumerate(zip(turns, seen, strict=True))
    ]


def _check_equal_sizes(samplers: Sequence[StratifiedBatches]) -> None:
    """Predictions can be stored only if all steps have the same number of images.

    Raises:
        UsageError
    """
    if len({(len(sampler.caption_groups), sampler.layout) for sampler in samplers}) > 1:
        raise UsageError(
            "--teacher_reuse needs the same number of images in every step, but the concepts differ in their number of "
            "paraphrases. Use --teacher_reuse 1."
        )


def _make_teacher(
    config: TrainConfig, turn: Turn, data: Data, student: Student, denoiser: Denoiser, base: Base
) -> Teacher:
    """The teacher of a concept's steps."""
    generic, empty = (data.images.text[caption].to(base.device) for caption in (turn.concept.generic, ""))
    guidance = base.guidance_of(config.guidance_scale)
    movement = Movement(every=len(data.turns))
    return Teacher(
        denoiser, student.frozen, generic, empty, guidance, config.push, 1 / sum(turn.betas), movement=movement
    )


def _make_generator(config: TrainConfig, base: Base, data: Data, student: Student) -> ImageGenerator | None:
    """The generator of previews and probes. Drops text encoders and VAE if nothing needs them."""
    pipeline = base.pipeline
    if not (config.train_text_encoder or config.robust):
        for name in base.properties.text_encoders:
            setattr(pipeline, name, None)
    if not config.validation_steps and probe_name(config) != "leakage":
        pipeline.vae = None
        return None
    pipeline.vae.to("cpu")

    def embed_captions(captions: Sequence[str]) -> Tensor:
        if config.train_text_encoder:
            return encode_captions(base, captions)
        return torch.stack([data.images.text[caption] for caption in captions])

    return ImageGenerator(base, resolve_sampler(config, base.source), embed_captions, student.model)


def _make_probe(
    config: TrainConfig,
    concept: Concept,
    data: Data,
    student: Student,
    denoiser: Denoiser,
    generator: ImageGenerator | None,
    held_out: list[int],
) -> Probe | None:
    if probe_name(config) == "leakage" and generator:
        return LeakageProbe(generator, make_label_classifier(concept), concept, config.seed)
    if probe_name(config) != "ratio":
        return None
    images = data.images.subset(held_out)
    text = torch.stack([images.text[c] for c in (concept.caption, concept.generic) for _ in held_out])
    positive = torch.tensor([e.is_positive for e in images.examples] * 2)
    return RatioProbe(denoiser, student, images.mean.repeat(2, 1, 1, 1), text, positive, TRAIN_SEEDS[0] + config.seed)
