"""The memory that a base's networks take, in bytes: weights, a training step, generating and encoding images.

Counted from the configuration alone (meta.py, counting.py), for the device that runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sd_unlearn.choices import Precision
from sd_unlearn.config.loop import Attention, Quantization
from sd_unlearn.config.objective import LoraTargets
from sd_unlearn.config.train import TARGETS_OF, TrainConfig, resolve_teacher_reuse
from sd_unlearn.models.counting import DeviceKernels, LiveBytes, SavedBytes
from sd_unlearn.models.denoiser import Denoiser
from sd_unlearn.models.diffusion import Diffusion
from sd_unlearn.models.kinds import KINDS
from sd_unlearn.models.meta import Configs, MetaBase, build_meta_base
from sd_unlearn.models.offload import offloaded_layers
from sd_unlearn.models.quantized import quantize_linear_layers
from sd_unlearn.models.student import make_student
from sd_unlearn.models.vae import decoded, posterior

HALF = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
COUNTED = 2  # images of a counted pass; with a single one some copies are left out, as its rows are contiguous already
EIGHT_BIT_FROM = 4096  # elements of a tensor; bitsandbytes keeps the moments of smaller ones in full precision


@dataclass(frozen=True, kw_only=True)
class InferenceFootprint:
    """Of generating and encoding images with a frozen base."""

    network: int  # weights of the UNet or transformer; without those that --offload keeps elsewhere
    vae: int
    text_encoders: int
    upcast: int  # more weights while the VAE works: SDXL's is in full precision then
    sample: int  # per image: the network, with guidance two rows unless each has a pass of its own
    decode: int  # per image
    encode: int  # per image
    slices: bool = False  # whether the VAE decodes and encodes the images of a batch one by one
    caption: int  # per caption
    largest_weight: int  # of the network
    resolution: int  # in pixels, for which all of this holds
    title: str = "UNet"  # what the network is called
    captions_at_once: int = 256  # at most

    @property
    def weights(self) -> int:
        return self.network + self.vae + self.text_encoders


@dataclass(frozen=True, kw_only=True)
class TrainingFootprint:
    """Of a training step."""

    network: int  # weights of the base's network, smaller than in InferenceFootprint if quantized
    trained: int  # the LoRA, or 0 if the UNet itself is trained
    gradients: int
    optimizer: int  # AdamW's two moments
    average: int  # of --ema_decay
    teacher_copy: int  # the second UNet of --method full
    casts: int  # autocast's copies of weights in full precision
    saved: int  # per image: what autograd keeps for the backward pass
    activations: int  # per image: that, and the largest gradient of the backward pass
    checkpointed: int  # per image: the same with gradient checkpointing
    forward: int  # per image: a pass without gradient, as of the teacher
    text_encoder: int = 0  # weights that stay, because they or their input are trained, too
    predictions: int = 0  # per image: two of the base and the offset, in full precision, if --teacher_reuse stores them

    @property
    def constant(self) -> int:
        """What does not depend on the number of images, besides the base."""
        trained = self.trained + self.gradients + self.optimizer + self.average
        return trained + self.teacher_copy + self.casts + self.text_encoder


class StepOptions(NamedTuple):
    """The options of `train` that decide what a step keeps in memory, by their names there."""

    method: str = "lora"
    rank: int = 8
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    use_dora: bool = False
    lora_targets: LoraTargets | None = None
    train_text_encoder: bool = False
    attention: Attention = "sdpa"
    optimizer: str = "adamw"
    ema_decay: float | None = None
    target: str = "teacher"
    quantize_base: Quantization | None = None
    teacher_reuse: int = 1
    robust: bool = False

    @classmethod
    def of(cls, config: TrainConfig) -> StepOptions:
        options = cls(*(getattr(config, name) for name in cls._fields))
        return options._replace(
            lora_targets=config.lora_targets or TARGETS_OF.get(config.objective),
            teacher_reuse=resolve_teacher_reuse(config, concepts=1),
        )


@cache
def count_inference(configs: Configs, precision: Precision, resolution: int | None) -> InferenceFootprint:
    """Count the passes of a frozen base, whose weights are in the precision (as load_base has them).

    resolution: in pixels; None for the base's own.
    """
    base = build_meta_base(configs, HALF[precision] or torch.float32)
    side = (resolution or base.resolution) // base.pixels_per_latent
    largest = max(p.numel() * p.element_size() for p in base.network.parameters())
    upcast = base.kind == "sdxl" and precision == "fp16" and base.vae.config.force_upcast
    vae, network, encoders = base.vae, base.network, base.text_encoders
    vae_weights = size_of(vae)
    if upcast:
        vae.float()
    width, kind = side * base.pixels_per_latent, KINDS[base.kind]
    rows = 2 if kind.uses_guidance and kind.prompts_in != "first pass" else 1
    with torch.device("meta"):
        latents = torch.empty(COUNTED, base.channels, side, side, dtype=vae.dtype)
        pixels = torch.empty(COUNTED, 3, width, width, dtype=vae.dtype)
        ids = [torch.empty(COUNTED, base.length_for(encoder), dtype=torch.long) for encoder in encoders]
    denoiser = meta_denoiser(base, network)
    return InferenceFootprint(
        network=resident(network, configs.offload),
        vae=vae_weights,
        text_encoders=sum(resident(encoder, configs.offload) for encoder in encoders),
        upcast=size_of(vae) - vae_weights,
        sample=rows * peak_of(network, lambda: denoiser.predict(*inputs(base, side, network.dtype))),
        decode=peak_of(vae, lambda: decoded(vae, latents)),
        encode=peak_of(vae, lambda: posterior(vae, pixels)),
        slices=kind.is_large,
        caption=sum(
            peak_of(encoder, partial(encoder, own, output_hidden_states=True))
            for encoder, own in zip(encoders, ids, strict=True)
        ),
        largest_weight=largest,
        resolution=width,
        title=kind.title,
        captions_at_once=kind.captions_at_once,
    )


@cache
def count_training(
    configs: Configs, options: StepOptions, precision: Precision, resolution: int | None
) -> TrainingFootprint:
    """Count a training step.

    precision: of autocast; the frozen weights have it, too, but a UNet that is trained itself is in full precision.
    """
    full, half = options.method == "full", HALF[precision]
    base = build_meta_base(configs, torch.float32 if full or not half else half)
    side = (resolution or base.resolution) // base.pixels_per_latent
    if options.attention == "eager" and not KINDS[base.kind].is_flow:  # xformers and sdpa keep the same
        base.network.set_attn_processor(AttnProcessor())
    if options.quantize_base:
        quantize_linear_layers(base.network, options.quantize_base)
    frozen_weights = resident(base.network, configs.offload and not options.quantize_base)
    with torch.device("meta"):
        student = make_student(base, options, seed=0, needs_teacher=options.target == "teacher")  # type: ignore[arg-type]
    model, weights = student.model, [p.numel() * p.element_size() for p in student.trainable()]
    denoiser = meta_denoiser(base, model)
    given = inputs(base, side, torch.float32, ids=options.train_text_encoder)
    kernels = DeviceKernels(half)
    saved = SavedBytes(model, kernels)
    base.network.enable_gradient_checkpointing(saved.run_block)
    with kernels, saved_tensors_hooks(saved.save, lambda tensor: tensor):
        denoiser.predict(*given)
    base.network.disable_gradient_checkpointing()
    with student.frozen() as frozen:
        forward = peak_of(frozen, lambda: meta_denoiser(base, frozen).predict(*given), half)
    return TrainingFootprint(
        network=frozen_weights,
        trained=0 if full else sum(weights),
        gradients=sum(weights),
        optimizer=sum(_moments(p, options.optimizer) for p in student.trainable()),
        average=sum(weights) if options.ema_decay else 0,
        teacher_copy=size_of(student.base_copy) if student.base_copy is not None else 0,
        casts=saved.casts,
        saved=saved.total // COUNTED,
        activations=(saved.total + saved.largest) // COUNTED,
        checkpointed=(saved.kept + saved.largest_block + saved.largest) // COUNTED,
        forward=forward,
        text_encoder=sum(map(size_of, base.text_encoders)) if options.train_text_encoder or options.robust else 0,
        predictions=3 * base.channels * side * side * torch.float32.itemsize if options.teacher_reuse > 1 else 0,
    )


def inputs(base: MetaBase, side: int, dtype: torch.dtype, ids: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """What Denoiser.predict takes: latents, timesteps, and captions as embeddings or token ids, of COUNTED images."""
    with torch.device("meta"):
        text = torch.empty(COUNTED, *base.text_shape, dtype=dtype)
        text = torch.empty(COUNTED, base.tokens, dtype=torch.long) if ids else text
        latents = torch.empty(COUNTED, base.channels, side, side, dtype=dtype)
        return latents, torch.empty(COUNTED, dtype=torch.float if KINDS[base.kind].is_flow else torch.long), text


def meta_denoiser(base: MetaBase, model: nn.Module) -> Denoiser:
    return Denoiser(model, Diffusion(torch.empty(0)), base.conditioning)


def size_of(network: nn.Module) -> int:
    """Bytes of a network's weights."""
    return sum(map(_bytes, (*network.parameters(), *network.buffers())))


def resident(network: nn.Module, offload: bool) -> int:
    """Bytes of a network's weights on the device. offload: whether large layers are kept elsewhere."""
    names = offloaded_layers(network) if offload else iter(())
    elsewhere = sum(_bytes(network.get_parameter(f"{name}.weight")) for name in names)
    return size_of(network) - elsewhere


def peak_of(network: nn.Module, work: Callable[[], Any], half: torch.dtype | None = None) -> int:
    """The most bytes per image of a pass of COUNTED images without gradient, without weights. half: of autocast."""
    live = LiveBytes().ignore(network)
    with torch.no_grad(), DeviceKernels(half), live:
        work()
    return live.peak // COUNTED


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _moments(parameter: Tensor, optimizer: str) -> int:
    """Bytes of AdamW's two moments of a parameter."""
    eight_bit = optimizer == "adamw8bit" and parameter.numel() >= EIGHT_BIT_FROM
    return 2 * parameter.numel() * (1 if eight_bit else 4)
