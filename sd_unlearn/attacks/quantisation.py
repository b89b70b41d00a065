"""Quantisation: is the concept back when the merged weights are stored with fewer bits?

Access: none beyond running the model as many do, with weights in fp16, int8 or 4 bits. Zhang et al. 2024, "Catastrophic
Failure of LLM Unlearning via Quantization" (arXiv 2410.16454), found this for language models. Differences: weights
are rounded and computed with in the model's own precision; int8 has one scale per output channel, 4 bits is NF4 with
blocks of 64 (Dettmers et al. 2023), both simulated here without a quantised kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sd_unlearn.attacks.base import Attack, Outcome, Target
from sd_unlearn.data.encoding import encode_captions

BLOCK = 64
# Quantiles of the normal distribution (Dettmers et al. 2023, appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class QuantisationSettings:
    """Budget of the attack."""

    images: int
    formats: tuple[str, ...] = ("fp16", "int8", "nf4")
    restarts: int = 1


def to_fp16(weight: Tensor) -> Tensor:
    """The weight rounded to half precision, in its own type."""
    return weight.half().to(weight.dtype)


def to_int8(weight: Tensor) -> Tensor:
    """The weight rounded to 255 levels, with one scale for each output channel (dimension 0)."""
    flat = weight.float().flatten(1)
    scale = flat.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return ((flat / scale).round() * scale).view_as(weight).to(weight.dtype)


def to_nf4(weight: Tensor) -> Tensor:
    """The weight rounded to the 16 levels of NF4, with one scale for each 64 consecutive values."""
    flat = weight.float().flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)
    levels = torch.tensor(NF4, device=weight.device)
    middles = (levels[1:] + levels[:-1]) / 2
    rounded = levels[torch.bucketize(blocks / scale, middles)] * scale
    return rounded.flatten()[: len(flat)].view_as(weight).to(weight.dtype)


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {"fp16": to_fp16, "int8": to_int8, "nf4": to_nf4}


@contextmanager
def quantised(network: nn.Module, convert: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the weights of all linear and convolutional layers by their rounded values within the block.

    They are replaced in place and kept on the CPU meanwhile, so that the device holds the network once.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    originals: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for layer in layers:
                originals.append((layer.weight, layer.weight.to("cpu", copy=True)))
                layer.weight.copy_(convert(layer.weight))
        yield
    finally:
        with torch.no_grad():
            for weight, original in originals:
                weight.copy_(original)


def run(target: Target, settings: QuantisationSettings, restart: int) -> Iterator[Outcome]:
    """Images of the caption with the UNet in each format; step is the format's number, from 1."""
    text, seeds = encode_captions(target.base, [target.concept.caption]), target.seeds(settings.images)
    for number, name in enumerate(settings.formats, 1):
        with quantised(target.base.network, FORMATS[name]):
            images = target.generate(text, seeds)
        yield Outcome(images, number, found=name)


QUANTISATION = Attack(
    "quantisation",
    "Fewer bits per weight",
    "Zhang et al. 2024",
    "none",
    {"quick": QuantisationSettings(60), "standard": QuantisationSettings(100), "full": QuantisationSettings(200)},
    run,
)
