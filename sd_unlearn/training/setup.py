"""From options, folders and a loaded base to everything the loop works with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from sd_unlearn.config.train import TrainConfig
from sd_unlearn.data.batches import StratifiedBatches
from sd_unlearn.data.concept import Concept
from sd_unlearn.data.dataset import (
    CACHE_DIR,
    Example,
    encode_captions,
    encode_images,
    positive_sets,
    scan,
    share_beta,
    tokenize,
)
from sd_unlearn.data.embeddings import embed
from sd_unlearn.data.prior import Prior, resolve_beta
from sd_unlearn.metrics.registry import make_judge
from sd_unlearn.models import performance
from sd_unlearn.models.base import Base
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.sampling import resolve_sampler
from sd_unlearn.models.source import DIGITS
from sd_unlearn.models.student import Student, make_student
from sd_unlearn.objectives.pu import PUObjective
from sd_unlearn.objectives.teacher import Teacher
from sd_unlearn.seeds import TRAIN_SEEDS
from sd_unlearn.training.loop import Training
from sd_unlearn.training.previews import Painter, preview_prompts
from sd_unlearn.training.probe import LeakageProbe, Probe, RatioProbe, hold_out, probe_prompts

# The text encoder of digits gives the generic caption nearly the empty one's embedding: both forget, or neither does.
UNCONDITIONAL = {DIGITS: 0.0}


@dataclass(frozen=True)
class Data:
    """What is trained on, encoded: the VAE and the text encoder are not needed for it any more."""

    examples: list[Example]
    latents: tuple[Tensor, Tensor]  # mean and standard deviation, each [N, 4, H/8, W/8]
    captions: dict[str, Tensor]  # embeddings [tokens, width]; token ids [tokens] where the encoder is trained
    betas: dict[str, float]  # share of each set of positives among the unlabeled images
    prior: Prior  # where they are from

    def counts(self) -> str:
        """How many images there are of each kind, in words."""
        positive, negative = (sum(getattr(e, f"is_{kind}") for e in self.examples) for kind in ("positive", "negative"))
        known = f" and {negative} known to be normal" if negative else ""
        return f"{len(self.examples) - positive - negative} unlabeled and {positive} positive images{known}"


def read_data(config: TrainConfig, concept: Concept, base: Base) -> Data:
    """Scan the data folder, encode it (cached), and find beta.

    Raises:
        UsageError: images, captions or betas that cannot be meant.
    """
    assert config.data_dir is not None
    examples = scan(config.data_dir, concept, config.eta)
    latents = encode_images(base, examples, config.resolution or base.resolution, config.data_dir / CACHE_DIR)
    prior = resolve_beta(config.beta, config.data_dir, lambda: embed(base, examples, latents[0]))
    prior = broadcast_object_list([prior])[0]  # rounding may differ between devices: one beta for all
    sets = positive_sets(config.data_dir)
    shared, source = share_beta(concept, sets, prior.beta, prior.source)
    texts = ["", concept.generic, *concept.captions, *preview_prompts(concept), *(e.caption for e in examples)]
    if _probing(config) == "leakage":
        texts += probe_prompts(concept)
    texts = list(dict.fromkeys(texts))
    encode = tokenize if config.train_text_encoder else encode_captions
    captions = dict(zip(texts, encode(base, texts), strict=True))
    betas = dict(zip(sets, shared, strict=True))
    return Data(examples, latents, captions, betas, dataclasses.replace(prior, source=source))


def resolved(config: TrainConfig, base: Base, data: Data) -> TrainConfig:
    """The options with every default looked up, as they are recorded: how the run was begun is no part of it."""
    usual = UNCONDITIONAL.get(base.name, 0.25)
    return dataclasses.replace(
        config,
        beta=sum(data.betas.values()),
        guidance_scale=resolve_sampler(config, base.name).guidance_scale,
        lora_alpha=float(config.rank if config.lora_alpha is None else config.lora_alpha),
        unconditional=usual if config.unconditional is None else config.unconditional,
        pretrained_model_name_or_path=base.name,
        overwrite=False,
        resume_from_checkpoint=None,
        force_resume=False,
    )


def assemble(
    config: TrainConfig, concept: Concept, base: Base, data: Data, accelerator: Accelerator, identity: dict[str, Any]
) -> Training:
    """Attach what is trained to the base and bring all together; the base's other networks go if nobody needs them."""
    assert config.output_dir is not None
    seed, teaches = TRAIN_SEEDS[0] + config.seed, config.target == "teacher"
    performance.prepare(base.pipeline.unet, config)
    student = make_student(base, config, seed, needs_teacher=teaches)
    performance.compile_blocks(base.pipeline.unet, config)
    wrapped = accelerator.prepare(student.model)
    if student.base_copy is not None:
        student.base_copy = accelerator.prepare_model(student.base_copy, evaluation_mode=True)
    alone = Denoiser.of(base, student.model)
    held: list[int] = []
    kept = list(range(len(data.examples)))
    if _probing(config) == "ratio":
        kept, held = hold_out(data.examples, seed)
    mean, std = data.latents
    batches = StratifiedBatches(
        [data.examples[i] for i in kept],
        (mean[kept], std[kept]),
        data.captions,
        concept,
        config.caption_mode,
        config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes,
        alone.num_train_timesteps,
        seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        micro_batches=config.gradient_accumulation_steps,
        device=accelerator.device,
        teacher=teaches,
        timestep_bias=config.timestep_bias,
        share_timesteps=config.share_timesteps,
        unconditional=config.unconditional or 0.0,
        noise_offset=config.noise_offset,
    )
    eta = config.eta if batches.layout.negative else 0.0
    betas = [list(data.betas.values())] * len(batches.brackets)
    objective = PUObjective(betas, config.correction, eta, config.objective)
    painter = _painter(config, base, data, student)
    probe = _probe(config, concept, data, student, alone, painter, held)
    return Training(
        config,
        concept,
        config.output_dir,
        student,
        wrapped,
        dataclasses.replace(alone, model=wrapped),
        batches,
        objective,
        _teacher(config, concept, data, student, alone) if teaches else None,
        painter,
        probe,
        identity,
        accelerator,
    )


def _probing(config: TrainConfig) -> str:
    return config.probe if config.probe_steps else "no"


def _teacher(config: TrainConfig, concept: Concept, data: Data, student: Student, denoiser: Denoiser) -> Teacher:
    device = denoiser.alphas_cumprod.device
    generic, empty = (data.captions[caption].to(device) for caption in (concept.generic, ""))
    guidance, beta = max(1.0, config.guidance_scale or 1.0), sum(data.betas.values())
    return Teacher(denoiser, student.frozen, generic, empty, guidance, config.push / beta)


def _painter(config: TrainConfig, base: Base, data: Data, student: Student) -> Painter | None:
    """What draws previews and probes; None, the VAE gone, if nothing is to be drawn."""
    pipeline = base.pipeline
    if not config.train_text_encoder:
        pipeline.text_encoder = None
        if base.kind == "sdxl":
            pipeline.text_encoder_2 = None
    if not config.validation_steps and _probing(config) != "leakage":
        pipeline.vae = None
        return None
    pipeline.vae.to("cpu")

    def embed(captions: Any) -> Tensor:
        if config.train_text_encoder:
            return encode_captions(base, captions)
        return torch.stack([data.captions[caption] for caption in captions])

    return Painter(base, resolve_sampler(config, base.name), embed, student.model)


def _probe(
    config: TrainConfig,
    concept: Concept,
    data: Data,
    student: Student,
    denoiser: Denoiser,
    painter: Painter | None,
    held: list[int],
) -> Probe | None:
    if _probing(config) == "leakage" and painter:
        return LeakageProbe(painter, make_judge(concept), concept, config.seed)
    if _probing(config) != "ratio":
        return None
    texts = torch.stack([data.captions[c] for c in (concept.caption, concept.generic) for _ in held])
    positive = torch.tensor([data.examples[i].is_positive for i in held] * 2)
    latents = data.latents[0][held].repeat(2, 1, 1, 1)
    return RatioProbe(denoiser, student, latents, texts, positive, TRAIN_SEEDS[0] + config.seed)
