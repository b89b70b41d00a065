"""The ResNet that classifies the images of a dataset, and its training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_unlearn.io.progress import Progress


@dataclass(frozen=True)
class ClassifierSettings:
    """How a classifier is built and trained. Classifiers with equal settings and data are trained once."""

    side: int  # of its input, in pixels
    stem_stride: int
    depths: tuple[int, ...]  # residual blocks of each stage
    widths: tuple[int, ...]
    epochs: int
    learning_rate: float
    mirror: bool  # flip horizontally; not for digits
    turn: float  # largest rotation in degrees
    shift: float  # largest translation, as a share of the side
    num_train: int
    num_held_out: int
    seed: int
    flatten: float = 0.3  # largest loss of contrast, as a share
    noise: float = 0.3  # largest standard deviation of the added noise
    batch_size: int = 64
    weight_decay: float = 0.05
    label_smoothing: float = 0.05


def build_network(channels: int, classes: int, settings: ClassifierSettings) -> nn.Module:
    """A ResNet of basic blocks (He et al. 2016) with a stem for small images: 3x3, no max pooling.

    Its weights depend on the seed only; it is on the CPU.
    """
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=channels,
        embedding_size=settings.widths[0],
        hidden_sizes=list(settings.widths),
        depths=list(settings.depths),
        layer_type="basic",
        num_labels=classes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = ResNetForImageClassification(config)
        stem = network.resnet.embedder
        width, stride = settings.widths[0], settings.stem_stride
        stem.embedder.convolution = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        stem.pooler = nn.Identity()
    return network


def fit(
    network: nn.Module, pixels: Tensor, labels: Tensor, settings: ClassifierSettings, device: str, title: str
) -> None:
    """Train on pixels [n, C, side, side] uint8 and labels [n]. Leaves the network in evaluation mode."""
    generator = torch.Generator().manual_seed(settings.seed)
    steps = settings.epochs * math.ceil(len(pixels) / settings.batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=steps)
    network.train()
    with Progress(steps, title, "step") as progress:
        for batch in _batches(len(pixels), settings, generator):
            images = augment(to_float(pixels[batch]), settings, generator).to(device)
            loss = F.cross_entropy(
                network(images).logits, labels[batch].to(device), label_smoothing=settings.label_smoothing
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.advance()
    network.eval().requires_grad_(False)


def _batches(n: int, settings: ClassifierSettings, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(settings.epochs):
        yield from torch.randperm(n, generator=generator).tensor_split(math.ceil(n / settings.batch_size))


def augment(images: Tensor, settings: ClassifierSettings, generator: torch.Generator) -> Tensor:
    """Augment images [B, C, H, W] in [-1, 1]: random rotation, translation, flip, contrast and noise.

    Edges are filled by reflection. Contrast and noise vary because generated images are never as clean as real ones: a
    network trained on black backgrounds classifies every digit on a grey one as an eight.
    """
    n = len(images)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    angle = between(-1, 1) * math.radians(settings.turn)
    moved = between(-2, 2, 2) * settings.shift  # affine_grid's coordinates span 2
    mirrored = torch.where(between(0, 1) < (0.5 if settings.mirror else 0.0), -1.0, 1.0)
    cos, sin = angle.cos(), angle.sin()
    rows = [torch.stack([mirrored * cos, -sin, moved[:, 0]], 1), torch.stack([mirrored * sin, cos, moved[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    lost = between(0, settings.flatten, 1, 1, 1)
    images = images * (1 - lost) + lost * between(-1, 1, 1, 1, 1)
    noise = torch.randn(images.shape, generator=generator) * between(0, settings.noise, 1, 1, 1)
    return (images + noise).clamp(-1, 1)


def shrink(images: Tensor, side: int) -> Tensor:
    """[n, C, side, side] of [n, C, S, S], S at least `side`. Training and inference use the same scaling."""
    if images.shape[-1] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True).clamp(-1, 1)


def to_float(pixels: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1]."""
    return pixels.float() / 127.5 - 1
